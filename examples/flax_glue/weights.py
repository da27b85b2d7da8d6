"""Takes the weights of an encoder out of a directory of Hugging Face, a tensor at a time."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.flax_glue import names
from examples.flax_glue.model import Encoder
from examples.flax_glue.names import Source, left_over, plain_names, sources
from examples.flax_glue.shapes import EncoderConfig
from examples.flax_llama.usage import UsageError
from examples.hf.names import some
from examples.hf.tensors import DTYPES, Tensor, open_tensors, read

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The parameters that fine-tuning begins with.

    Attributes:
      params: of an `Encoder`, by path.
      drawn: the paths of those that the checkpoint has not, which are newly drawn.
      note: what was skipped and what was drawn, in a line.
    """

    params: Params
    drawn: frozenset[names.Path]
    note: str


def load_weights(directory: Path, config: EncoderConfig, seed: int) -> Loaded:
    """The parameters of an encoder, those of a checkpoint where it has them.

    Args:
      directory: has the checkpoint, in safetensors.
      config: of the encoder.
      seed: of what is newly drawn, which does not depend on what is not.

    Raises:
      UsageError: the checkpoint cannot be read, lacks a tensor, has one of another shape, or one
        that such models have not.
    """
    found = find(directory, config)
    drawn = found.shapes.keys() - found.table.keys()
    params = {**stored(found), **draw(config, frozenset(drawn), seed)}
    parts = sorted({part_of(path) for path in drawn})
    note = f"{directory}: " + "; ".join(
        [
            f"{len(found.used)} tensors taken",
            *([f"skipped {', '.join(found.skipped)}"] if found.skipped else []),
            *([f"newly drawn {', '.join(parts)}"] if parts else []),
        ]
    )
    return Loaded(unflatten_dict(params), frozenset(drawn), note)


@dataclasses.dataclass(frozen=True)
class Found:
    """What of a checkpoint goes where.

    Attributes:
      table: what each parameter is made of that the checkpoint has.
      shapes: of all parameters, by path.
      tensors: of the checkpoint.
      plain: their full names, by the name without a prefix.
      skipped: the heads that the model has no use for.
    """

    table: dict[names.Path, Source]
    shapes: dict[names.Path, jax.ShapeDtypeStruct]
    tensors: dict[str, Tensor]
    plain: dict[str, str]
    skipped: list[str]

    @property
    def used(self) -> set[str]:
        """The plain names of the tensors that are taken."""
        return {name for source in self.table.values() for name in source.names}


def find(directory: Path, config: EncoderConfig) -> Found:
    """What of a checkpoint goes where, by names and shapes; no array is read.

    Raises:
      UsageError: as `load_weights`.
    """
    tensors = open_tensors(directory)
    try:
        plain = plain_names(tensors, config.kind)
        shapes = shapes_of(config)
        table = sources(config)
        absent = check(table, shapes, plain, tensors)
        table = {path: source for path, source in table.items() if path not in absent}
        used = [name for source in table.values() for name in source.names]
        return Found(table, shapes, tensors, plain, left_over(plain, used))
    except UsageError as error:
        raise UsageError(f"{directory}: {error}") from error


def part_of(path: names.Path) -> str:
    """What to call the part of the model that a parameter is of."""
    return "adapters" if "lora" in path else path[0]


def shapes_of(config: EncoderConfig) -> dict[names.Path, jax.ShapeDtypeStruct]:
    """The parameters of an encoder, by path."""
    shapes: Any = flatten_dict(jax.eval_shape(functools.partial(initial_params, config, 0)))
    return shapes


def initial_params(config: EncoderConfig, seed: int) -> Params:
    return nnx.to_pure_dict(nnx.state(Encoder(config, rngs=nnx.Rngs(seed)), nnx.Param))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw(config: EncoderConfig, paths: frozenset[names.Path], seed: int) -> dict[names.Path, Any]:
    """Some of the parameters of a new encoder; XLA draws no others."""
    params = flatten_dict(initial_params(config, seed))
    return {path: params[path] for path in paths}


def check(
    table: dict[names.Path, Source],
    shapes: dict[names.Path, jax.ShapeDtypeStruct],
    plain: dict[str, str],
    tensors: dict[str, Tensor],
) -> set[names.Path]:
    """The paths of parts that a checkpoint lacks, as it may, or has for another number of classes.

    Raises:
      UsageError: something else is missing, or of another shape or dtype, or a part is not whole.
    """
    wrong = {path: faults(table[path], shapes[path], plain, tensors) for path in table}
    known = {path[0] for path, source in table.items() if any(x in plain for x in source.names)}
    absent = set(names.OPTIONAL) - known
    if has_other_classes(table, shapes, plain, tensors):
        others = [found for path, found in wrong.items() if path[0] == "head" and path[1] != "out"]
        absent |= {"head"} if not any(others) else set()
    missing = [
        name
        for path, found in wrong.items()
        if path[0] not in absent
        for name, fault in found.items()
        if fault == "missing"
    ]
    if missing:
        raise UsageError(f"the checkpoint lacks {some(sorted(missing))}.")
    for path, found in wrong.items():
        for fault in found.values() if path[0] not in absent else ():
            raise UsageError(fault)
    return {path for path in table if path[0] in absent}


def has_other_classes(
    table: dict[names.Path, Source],
    shapes: dict[names.Path, jax.ShapeDtypeStruct],
    plain: dict[str, str],
    tensors: dict[str, Tensor],
) -> bool:
    """Whether the last layer of a checkpoint's head is right but for the number of classes."""
    if names.OUTPUT not in table:
        return False
    width, classes = shapes[names.OUTPUT].shape
    (weight,), (bias,) = (table[(*names.OUTPUT[:-1], name)].names for name in ("kernel", "bias"))
    if not {weight, bias} <= plain.keys():
        return False
    kernel, bias = (tensors[plain[name]].shape for name in (weight, bias))
    return len(bias) == 1 and bias != (classes,) and kernel == (*bias, width)


def faults(
    source: Source,
    wanted: jax.ShapeDtypeStruct,
    plain: dict[str, str],
    tensors: dict[str, Tensor],
) -> dict[str, str]:
    """What is wrong with the tensors that a parameter is made of, by name."""
    shape = wanted.shape[1:] if source.stacked else wanted.shape
    shape = shape[::-1] if source.transposed else shape
    found = {}
    for name in source.names:
        if name not in plain:
            found[name] = "missing"
            continue
        tensor = tensors[plain[name]]
        if tensor.shape != shape or tensor.dtype not in DTYPES.values():
            found[name] = (
                f"{plain[name]} is {tensor.dtype}{list(tensor.shape)}; expected floating-point "
                f"numbers of shape {list(shape)}."
            )
    return found


def stored(found: Found) -> dict[names.Path, jax.Array]:
    """The parameters that a checkpoint has."""
    table, shapes = found.table, found.shapes
    places = {
        found.plain[name]: (path, layer)
        for path, source in table.items()
        for layer, name in enumerate(source.names)
    }
    arrays = {path: np.empty(shapes[path].shape, shapes[path].dtype) for path in table}
    for name, array in read(found.tensors, places):
        path, layer = places[name]
        array = array.T if table[path].transposed else array
        if table[path].stacked:
            arrays[path][layer] = array
        else:
            arrays[path][...] = array
    return {path: jnp.asarray(array) for path, array in arrays.items()}


def parts(params: Params, paths: Iterable[names.Path]) -> tuple[Params, Params]:
    """Parameters at some paths, and all others."""
    chosen, flat = set(paths), flatten_dict(params)
    mine = {path: x for path, x in flat.items() if path in chosen}
    return unflatten_dict(mine), unflatten_dict({p: flat[p] for p in flat.keys() - chosen})


def joined(chosen: Params, others: Params) -> Params:
    """Undoes `parts`."""
    return unflatten_dict({**flatten_dict(chosen), **flatten_dict(others)})
