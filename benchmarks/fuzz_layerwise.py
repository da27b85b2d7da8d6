"""Configurations that train layer by layer, beside the ordinary step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import galore_optax
from benchmarks import fuzz_transformations
from benchmarks.fuzz_clear import Configuration, as_in_optax, check_clear
from benchmarks.fuzz_compiled import check_finite, check_types
from benchmarks.fuzz_search import Wrong

STEPS, TOKENS = 3, 7
# Relative to how far the weights went. In few bits the gradients differ by what rounding leaves.
TOLERANCE = {"float64": 1e-5, "float32": 3e-2}
# What goes by a whole leaf goes by each layer of it here, and random numbers are others.
NOT_THE_SAME = (
    *(
        "lamb(",
        "lars(",
        "novograd",
        "adafactor",
        "adaptive_grad_clip",
        "block_rms",
        "noisy",
        "flora",
    ),
    *(
        "limit_norm_growth",
        "sm3",
        "prodigy",
        "dadapt",
        "muon",
        "bits=16",
        "moment_dtype",
        "ademamix",
    ),
    "inputs_dtype",  # gradients are those at rounded inputs
)


@dataclasses.dataclass(frozen=True)
class Layers(Configuration):
    """A configuration that trains a model of stacked layers.

    Attributes:
      arguments: the code of those of layerwise.
      micro_batches: the number of gradients of a step.
    """

    arguments: str = ""
    micro_batches: int = 1

    def __str__(self) -> str:
        return (
            f"{super().__str__()}\nlayerwise({self.arguments}), {self.micro_batches} micro-batches"
        )


@st.composite
def cases(draw: st.DrawFn) -> Layers:
    """Draws a small model, a transformation, and arguments of layerwise."""
    layers, d, f = (draw(st.sampled_from(sizes)) for sizes in ((1, 2, 3), (4, 6), (4, 8)))
    last = ""
    if dtype := draw(st.sampled_from(("", "", "bfloat16", "float64"))):
        last = f', dtype="{dtype}"'
    rest = [f"'embed': array({TOKENS}, {d}{last})", f"'norm': array({d}{last})"]
    if draw(st.booleans()):
        rest.append(f"'head': array({d}, {TOKENS}{last})")
    stack = {"scale": f"{layers}, {d}", "up": f"{layers}, {d}, {f}", "down": f"{layers}, {f}, {d}"}
    blocks = ", ".join(f"'{name}': array({shape}{last})" for name, shape in stack.items())
    drawn = draw(fuzz_transformations.transformations())
    if draw(st.integers(0, 3)) and "weight_dimension_numbers" not in drawn["tx"]:
        numbers = "lambda path, shape: DimensionNumbers(1, 2) if len(shape) == 3 else None"
        drawn["tx"] = f"{drawn['tx'][:-1]}, weight_dimension_numbers={numbers})"
    micro_batches = draw(st.sampled_from((1, 1, 2, 3)))
    arguments = {"micro_batches": str(micro_batches)}
    if draw(st.booleans()):
        arguments["slice_size"] = draw(st.sampled_from(("None", "8", "64")))
    if draw(st.integers(0, 2)) == 0:
        arguments["inputs_every"] = draw(st.sampled_from(("2", str(layers))))
    if draw(st.integers(0, 2)) == 0:
        arguments["inputs_memory"] = "'pinned_host'"
    if draw(st.integers(0, 3)) == 0:
        arguments["inputs_dtype"] = draw(st.sampled_from(("'int8'", "'bfloat16'")))
    return Layers(
        f"{{'blocks': {{{blocks}}}, {', '.join(rest)}}}",
        **drawn,
        arguments=", ".join(f"{name}={code}" for name, code in arguments.items()),
        micro_batches=micro_batches,
    )


@as_in_optax
def check(configuration: Layers) -> str:
    """Raises `Wrong` unless layerwise refuses, or comes to where the ordinary step does."""
    with configuration.in_its_dtypes():
        params = configuration.make_params()
        tokens = _tokens(configuration.micro_batches)
        try:
            tx = configuration.make_tx(params)
            arguments = eval(f"dict({configuration.arguments})")
            training = galore_optax.layerwise(
                tx, embed=_embed, block=_block, head_loss=_head_loss, **arguments
            )
            where, _ = galore_optax.layerwise_shardings(
                tx, params, offload=arguments.get("offload", ())
            )
            placed = jax.device_put(params, where)
            state = training.init(placed)
            step = jax.jit(training.step)
            # As jax.eval_shape, which forgets in which memory arguments lie.
            step.trace(placed, state, tokens[0], jax.random.key(0))
        except Exception as error:
            check_clear(error)
            return "refused"
        by_layers, of_layers, _ = _train(step, placed, state, tokens)
        check_places("parameters of layerwise", by_layers, placed)
        check_places("the state of layerwise", of_layers, state)
        check_types("parameters of layerwise", by_layers, params)
        check_types("the state of layerwise", of_layers, state)
        check_finite("parameters of layerwise", by_layers)
        step = jax.jit(_ordinary(tx, configuration.micro_batches))
        at_once, of_all, _ = _train(step, params, tx.init(params), tokens)
        check_types("the state of layerwise", of_layers, of_all)
        tolerance = TOLERANCE.get(params["norm"].dtype.name)
        accumulates = configuration.micro_batches > 1 and "accumulation_steps" in configuration.tx
        code = str(configuration)
        if accumulates or any(name in code for name in NOT_THE_SAME):
            return "trained"
        if tolerance is not None:
            _check_close(by_layers, at_once, params, tolerance)
    return "trained, and compared"


def check_places(whose: str, found: Any, before: Any) -> None:
    """Raises `Wrong` unless all arrays lie in the memories in which they lay before."""
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(before), strict=True
    ):
        here, there = one.sharding.memory_kind, other.sharding.memory_kind
        if here != there:
            raise Wrong(f"{whose}: {jax.tree_util.keystr(path)} came to {here!r} from {there!r}")


def _check_close(by_layers: Any, at_once: Any, params: Any, tolerance: float) -> None:
    by_layers, at_once, params = jax.device_get((by_layers, at_once, params))
    trees = (jax.tree.leaves(tree) for tree in (at_once, params))
    for (path, one), other, begin in zip(jax.tree.leaves_with_path(by_layers), *trees, strict=True):
        went = np.linalg.norm(other - begin)
        if not np.linalg.norm(one - other) <= tolerance * went + 1e-7 * np.linalg.norm(begin):
            raise Wrong(
                f"{jax.tree_util.keystr(path)} went by {one - begin} layer by layer, and by "
                f"{other - begin} at once"
            )


def _train(step: Any, params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
    metrics = None
    for i, batch in enumerate(tokens):
        params, state, metrics = step(params, state, batch, jax.random.key(i))
    return params, state, metrics


def _ordinary(tx: optax.GradientTransformation, micro_batches: int) -> Any:
    def mean(params: Any, tokens: jax.Array) -> jax.Array:
        batches = tokens if micro_batches > 1 else tokens[None]
        return jnp.mean(jnp.stack([_loss(params, batch) for batch in batches]))

    def step(params: Any, state: Any, tokens: jax.Array, key: jax.Array) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(mean)(params, tokens)
        updates, state = tx.update(gradients, state, params)
        return galore_optax.apply_updates(params, updates, key), state, value

    return step


def _tokens(micro_batches: int) -> jax.Array:
    count = (micro_batches,) if micro_batches > 1 else ()
    return jnp.asarray(np.random.default_rng(0).integers(0, TOKENS, (STEPS, *count, 2, 5)))


def _embed(params: Any, tokens: jax.Array) -> jax.Array:
    return params["embed"][tokens]


def _block(layer: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh((x * layer["scale"]) @ layer["up"]) @ layer["down"]


def _head_loss(params: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    head = params["head"] if "head" in params else params["embed"].T
    logits = jax.nn.log_softmax((x * params["norm"]) @ head)
    return -jnp.mean(jnp.take_along_axis(logits, (3 * tokens[..., None] + 1) % TOKENS, axis=-1))


def _loss(params: Any, tokens: jax.Array) -> jax.Array:
    rest = {name: x for name, x in params.items() if name != "blocks"}
    x, _ = jax.lax.scan(
        lambda x, layer: (_block(layer, x), None), _embed(rest, tokens), params["blocks"]
    )
    return _head_loss(rest, x, tokens)
