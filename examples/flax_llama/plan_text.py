"""What the planner prints of a step: what it is, what it needs, and whether that fits."""

from examples.flax_llama.compile_step import Compiled, planned_state
from examples.flax_llama.config import Config
from examples.flax_llama.devices import Device
from examples.flax_llama.fit import Fit, Need
from examples.flax_llama.memory import Estimate
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.optimizers import micro_batches_at_rank
from examples.flax_llama.shapes import DIMENSIONS, PRESETS
from examples.flax_llama.sharding import planned_mesh, share
from examples.flax_llama.units import size, unit_of

MOMENTS = {
    "block": "the backward pass of a layer",
    "head": "the backward pass of the head",
    "update": "the optimizer's update of the layers' matrices",
    "embedding": "the optimizer's update of the embedding",
    "choice": "the choice of how to average micro-batches, for which XLA copies what stays",
}
# Of a unit.
LEAST_SHOWN = 0.1


def summary(config: Config, vocab_size: int, device: Device) -> str:
    has_rank = config.optimizer in IN_GALORE or config.adapter is not None
    rank = f", rank {config.rank}" if has_rank else ""
    how = "layers updated inside the backward pass" if config.layerwise else "ordinary updates"
    how += ", activations computed again" * (config.remat and not config.layerwise)
    shape, unit = config.shape(vocab_size), unit_of(device.memory)
    preset = PRESETS.get(config.preset, shape)
    own = all(getattr(config, name) == getattr(preset, name) for name in DIMENSIONS)
    return (
        f"{shape.architecture.title} of {shape.num_params:,} parameters"
        f"{f' ({config.preset})' * own}, vocabulary {shape.vocab_size:,}; "
        f"{config.optimizer}{rank}; {how}\n"
        f"{config.batch} x {config.seq} tokens per update"
        f"{f' in {config.accumulate} micro-batches' if config.accumulate > 1 else ''}; activations "
        f"{config.dtype}, parameters {config.param_dtype}, attention of "
        f"{'cuDNN' if config.attention == 'cudnn' else 'XLA'}\n"
        f"{device.description}: {size(device.memory)} ({device.source})"
        f"{f', {size(device.context, unit)} of them for the driver' if device.context else ''}\n"
        "For one device that computes the whole batch; each of several needs as much, but of "
        "inputs and working only its share"
    )


def table(estimated: Estimate, compiled: Compiled | None) -> str:
    """The parts, and the compiler's sums beside them."""
    notes = {
        "gradients": f"at the fullest moment, which is {MOMENTS[estimated.moment]}",
        "inputs": "of each layer, kept by the forward pass",
        "working": "what else is computed with at that moment",
    }
    lines = [f"{'':11}{'estimate':>12}{'XLA' if compiled else '':>12}".rstrip()]

    def cell(count: int | None) -> str:
        if not count:
            return f"{'' if count is None else 0:>8}    "
        # All in one unit, but for what would be too small to read in it.
        unit = unit_of(estimated.total)
        number, name = size(count, unit if count >= LEAST_SHOWN * unit[0] else None).split()
        return f"{number:>8} {name:3}"

    def row(name: str, count: int, xla: int | None = None, note: str = "") -> None:
        beside = cell(xla) if compiled else ""
        lines.append(f"{name:11}{cell(count)}{beside}   {note}".rstrip())

    for name, count in estimated.parts.items():
        row(name, count, note=notes.get(name, ""))
    row(
        "stays",
        estimated.arguments,
        compiled.arguments if compiled else None,
        "between updates: weights, projectors and moments",
    )
    row("passes", estimated.temporaries, compiled.temporaries if compiled else None, "the rest")
    row(
        "total",
        estimated.total,
        compiled.peak if compiled else None,
        "XLA's is what it needs at its fullest moment" if compiled else "",
    )
    return "\n".join(lines)


def in_the_machine(estimated: Estimate, compiled: Compiled | None) -> str:
    """What lies in the memory of the machine, and what an update copies from and to there."""
    xla = f" (XLA: {size(compiled.host)})" if compiled else ""
    return (
        f"In the memory of the machine: {size(estimated.host)}{xla}, which is in no sum above; an "
        f"update copies {size(estimated.moved)} between the memories."
    )


def on_mesh(config: Config, vocab_size: int, mesh: str) -> str:
    """What each device of a mesh has between updates of what one would have."""
    own, whole = map(size, share(planned_state(config, vocab_size, planned_mesh(mesh))))
    return f"On the mesh {mesh} a device has {own} of the {whole} that stay."


def kept_inputs(config: Config) -> str:
    """Why a layer-wise update keeps the inputs of several micro-batches."""
    line = (
        f"Inputs are those of all {config.accumulate} micro-batches, since one layer's gradient is "
        "averaged over them before the next one's is computed"
    )
    if config.optimizer in IN_GALORE and micro_batches_at_rank(config) > 1:
        line += "; between refreshes, where GaLore averages at rank r, those of one"
    return f"{line}."


def verdict(need: Need, device: Device, whose: str) -> str:
    """Whether it fits, by how much, and within which bounds that is known."""
    found = need.fit(device)
    by = {
        Fit.SURE: f", with at least {size(device.usable - need.most)} to spare",
        Fit.CLOSE: "",
        Fit.NOT: f", by at least {size(need.least - device.usable)}",
    }
    low, high = need.spread
    basis = "XLA's plan" if whose == "XLA" else "the estimate"
    return (
        f"{whose}: {size(need.total)} of {size(device.usable)}: {found.value}{by[found]}\n"
        f"({size(need.least)} to {size(need.most)}: what stays is exact; of what passes, other "
        f"steps needed {low:g} to {high:g} times {basis})"
    )
