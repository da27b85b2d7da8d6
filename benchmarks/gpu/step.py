"""Time of an optimizer step at the shapes of LLaMA-1B in bfloat16, beside Optax' own.

Ordinary steps and refreshes are timed apart. "mean" is ordinary + refresh / 200, what a step costs
on average at T = 200. The exact SVD and `optax.contrib.galore` have two layers instead of 24, since
a refresh of all matrices would take minutes, as have those that choose a basis on every step;
others are measured at two layers, too, beside them. The presets of the family have their own
projectors, or power iteration in place of the SVD.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.gpu.stage import GIB, Item, Size
from benchmarks.gpu.timing import nbytes, one_by_one, per_step
from benchmarks.shapes import (
    RANKS,
    is_projected,
    normal_like,
    stacked_llama,
    unstacked_llama,
)
from examples.flax_llama.config import PRESETS, LlamaConfig

GAP, RATE, DECAY = 200, 1e-3, 0.1
CONTRIB = "optax.contrib.galore"
# The presets beside GaLore's own: those that choose directions now and then, and those that do so
# on every step, all of whose steps are alike.
NOW_AND_THEN = ("fira_adamw", "apollo_adamw", "apollo_mini_adamw", "frugal_adamw", "grass_adamw")
EACH_STEP = ("ldadamw", "tracked_adamw")
TINY = LlamaConfig(hidden=32, intermediate=88, layers=2, heads=2, vocab_size=64)
Make = Callable[[Any], optax.GradientTransformation]


def items(size: Size) -> list[Item]:
    """The copy that speeds are compared with, then the optimizers."""
    config, rank = size.of((PRESETS["1b"], RANKS["1b"]), (TINY, 8))
    whole, few = config, dataclasses.replace(config, layers=2 if not size.rehearsal else 1)
    found = [Item("copy", lambda _: copy(size), 30)]

    def add(name: str, model: LlamaConfig, make: Make, seconds: float = 60, **kind: Any) -> None:
        name += "" if model is whole else ", 2 layers"
        measure = functools.partial(time_optimizer, size, model, rank, make, **kind)
        memory = size.of(40 * GIB, 0) if model is whole else 0
        found.append(Item(name, lambda _: measure(), seconds, memory))

    def adamw(params: Any) -> optax.GradientTransformation:
        return optax.adamw(RATE, weight_decay=DECAY)

    def adamw_8bit(params: Any) -> optax.GradientTransformation:
        return galore_optax.adamw_8bit(RATE, weight_decay=DECAY)

    def ours(preset: Any, projector: str | None, stagger: bool = False) -> Make:
        options: dict[str, Any] = {"stagger": stagger}
        # Presets have their own projectors, and APOLLO-Mini its rank.
        options |= {} if projector is None else {"projector": projector}
        options |= {} if preset is galore_optax.apollo_mini_adamw else {"rank": rank}
        return lambda params: preset(
            RATE,
            weight_decay=DECAY,
            weight_dimension_numbers=numbers_of(params),
            **options,
        )

    presets = {"": galore_optax.galore_adamw, ", 8-bit": galore_optax.galore_adamw_8bit}
    add("adamw, float32 moments", whole, adamw, wide_moments=True)
    add("adamw", whole, adamw)
    add("adamw_8bit", whole, adamw_8bit)
    for bits, preset in presets.items():
        for projector in ("power_iteration", "rows"):
            make = ours(preset, projector)
            add(f"galore {projector}{bits}", whole, make, refreshes="apart")
        make = ours(preset, "power_iteration", stagger=True)
        add(f"galore power_iteration, staggered{bits}", whole, make, refreshes="spread")
    q_galore = ours(galore_optax.q_galore_adamw, "power_iteration")
    add("q_galore, int8 weights", whole, q_galore, refreshes="apart", int8_weights=True)
    for name in NOW_AND_THEN:
        projector = "power_iteration" if name == "fira_adamw" else None
        add(name, whole, ours(getattr(galore_optax, name), projector), refreshes="apart")
    add("dct_adamw", whole, ours(galore_optax.dct_adamw, None))
    add("adamw", few, adamw)
    add("galore power_iteration", few, ours(presets[""], "power_iteration"), refreshes="apart")
    for bits, preset in presets.items():
        add(f"galore svd{bits}", few, ours(preset, "svd"), 120, refreshes="apart")
    for name in EACH_STEP:
        add(name, few, ours(getattr(galore_optax, name), None), 120)
    add(CONTRIB, few, functools.partial(contrib, rank), 150, refreshes="first", stacked=False)
    return found


def bfloat16_params(model: LlamaConfig, stacked: bool) -> Any:
    """Normal numbers in bfloat16, the layers stacked or each by itself."""
    shapes = stacked_llama(model, model.layers) if stacked else unstacked_llama(model)

    @jax.jit
    def make(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal_like(shapes, key))

    return make(jax.random.key(0))


def describe(name: str, result: dict[str, Any]) -> str:
    if name == "copy":
        return f"{result['gigabytes_per_second']:,.0f} GB/s read and written"
    text = f"{1e3 * result['ordinary']['median']:9.2f} ms"
    if result["refresh_s"] is not None:
        text += f", refresh {1e3 * result['refresh_s']:9.1f} ms"
    text += f", mean {1e3 * result['mean_s']:9.2f} ms"
    return f"{text}, {result['gigabytes_per_second']:,.0f} GB/s"


def copy(size: Size) -> dict[str, Any]:
    """Bytes per second, read and written, of a copy of a large array."""
    array = jnp.ones(size.of(2 * GIB, 2**20), jnp.int8)
    step = jax.jit(lambda x: x + 1)
    _, seconds = per_step(step, array, steps=10, runs=5)
    return {
        "seconds": seconds,
        "gigabytes_per_second": 2 * array.nbytes / seconds["median"] / 1e9,
    }


def contrib(rank: int, params: Any) -> optax.GradientTransformation:
    """`optax.contrib.galore`, which refreshes on its first step and no other one here."""
    numbers = optax.contrib.GaLoreDimensionNumbers()
    projected = jax.tree_util.tree_map_with_path(is_projected, params)
    return optax.contrib.galore(
        RATE,
        rank=rank,
        update_proj_gap=2**30,
        weight_decay=DECAY,
        weight_dimension_numbers=jax.tree.map(lambda p: numbers if p else None, projected),
    )


def numbers_of(params: Any) -> Any:
    """Which axes of stacked layers form matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            galore_optax.DimensionNumbers(1, 2)
            if x.ndim == 3 and "layers" in jax.tree_util.keystr(path)
            else None
        ),
        params,
    )


def time_optimizer(
    size: Size,
    model: LlamaConfig,
    rank: int,
    make: Make,
    *,
    refreshes: Literal["none", "apart", "spread", "first"] = "none",
    stacked: bool = True,
    wide_moments: bool = False,
    int8_weights: bool = False,
) -> dict[str, Any]:
    """Times one optimizer.

    Args:
      size: whether to rehearse.
      model: shapes, and how many layers.
      rank: of GaLore.
      make: the optimizer, of given parameters.
      refreshes: how they are timed: there are none; apart from steps; within runs of GAP steps,
        over which they are spread; or as the first step.
      stacked: whether layers are stacked.
      wide_moments: whether the state is that of float32 parameters, so that moments are float32.
      int8_weights: whether the layers' matrices are kept in 8 bits.
    """
    params = bfloat16_params(model, stacked)
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    tx = make(params)
    if int8_weights:
        params = galore_optax.quantize_params(
            params, rank=rank, weight_dimension_numbers=numbers_of(params)
        )
    like = params
    if wide_moments:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    # Of AdamW all zeros; made from shapes, since float32 copies of the parameters would be large.
    empty = lambda: optax.tree.zeros_like(jax.eval_shape(tx.init, like))  # noqa: E731
    state = empty() if wide_moments else jax.jit(tx.init)(params)

    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return galore_optax.apply_updates(params, updates, jax.random.key(0)), state

    weights_bytes, state_bytes = nbytes(params), nbytes(state)
    moved = 2 * (weights_bytes + state_bytes) + nbytes(gradients)
    refresh: list[float] = []
    if refreshes == "apart":
        state, refresh = refresh_times(tx, gradients, state, params)
    start = time.perf_counter()
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, gradients)
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start

    def step(carry: Any) -> Any:
        return compiled(*carry, gradients)

    carry, first = one_by_one(step, (params, state), 1)
    del params, state
    steps = size.of(GAP if refreshes == "spread" else 50, 2)
    carry, ordinary = per_step(step, carry, steps, runs=size.of(5, 1))
    mean, refresh_s, longest = ordinary["median"], None, None
    if refreshes == "apart":
        refresh_s = statistics.median(refresh[1:])
        mean += refresh_s / GAP
    elif refreshes == "first":
        refresh_s = first[0]
        mean += (refresh_s - mean) / GAP
    elif refreshes == "spread":
        _, each = one_by_one(step, carry, steps)
        longest = max(each) / statistics.median(each)
    return {
        "layers": model.layers,
        "rank": rank,
        "weights_bytes": weights_bytes,
        "state_bytes": state_bytes,
        "compile_s": compile_s,
        "ordinary": ordinary,
        "refreshes_s": refresh,
        "refresh_s": refresh_s,
        "longest_step_over_median": longest,
        "mean_s": mean,
        "bytes_moved_at_least": moved,
        "gigabytes_per_second": moved / ordinary["median"] / 1e9,
    }


def refresh_times(tx: Any, gradients: Any, state: Any, params: Any) -> tuple[Any, list[float]]:
    """The state with new bases, and seconds of three refreshes of all matrices.

    The first has no old bases to start from.
    """

    def refresh(state: Any, gradients: Any, params: Any) -> Any:
        return galore_optax.refresh(tx, gradients, state, params)

    compiled = jax.jit(refresh, donate_argnums=0).lower(state, gradients, params).compile()
    return one_by_one(lambda state: compiled(state, gradients, params), state, 3)
