"""LoRA beside the kernels of layers, and products of two matrices in their place.

LoRA is that of Hu et al. (arXiv:2106.09685), with `flax.nnx.LoRALinear`: kernels stay as they are,
and what is added to them is trained, either alone or with all that is no such kernel, as in
pre-training. With ReLoRA it is added up in the kernels from time to time: see relora.py. The other,
W = B A, trains everything; it is the baseline "low-rank" of GaLore's paper.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from examples.flax_llama.usage import one_of

LORA, RELORA, LOW_RANK = "lora", "relora", "low_rank"
KINDS = (LORA, LOW_RANK)
# The optimizers that train matrices beside kernels.
WITH_LORA = (LORA, RELORA)
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
# The first are those that PEFT takes for a LLaMA.
TARGETS = {"qv": ("q", "v"), "attention": ATTENTION, "all": (*ATTENTION, *MLP)}
# What settings are by default. Of LoRA the first three as in PEFT, the learning rate as of those
# who fine-tune with it; of ReLoRA as in its paper, and the rank is the preset's.
DEFAULTS: dict[str, dict[str, Any]] = {
    LORA: {"rank": 8, "lora_alpha": 8.0, "lora_targets": "qv", "lr": 2e-4, "lora_only": True},
    RELORA: {"lora_alpha": 32.0, "lora_targets": "all", "lr": 1e-3, "lora_only": False},
}

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is beside kernels, or in their place.

    Attributes:
      kind: "lora" or "low_rank".
      rank: of the products.
      alpha: lora's, of which a rank-th part multiplies them.
      targets: lora's: the name of a set of kernels.
      only: lora's: whether nothing else is trained, or all but the kernels that it is beside. The
        model is the same.
    """

    kind: str
    rank: int
    alpha: float = 8.0
    targets: str = "qv"
    only: bool = dataclasses.field(default=True, compare=False)

    def __post_init__(self) -> None:
        one_of("adapter", self.kind, KINDS)
        one_of("lora_targets", self.targets, TARGETS)

    @property
    def factor(self) -> float:
        return self.alpha / self.rank

    def adds_to(self, name: str) -> bool:
        return self.kind == LORA and name in TARGETS[self.targets]

    def left_as_they_are(self, kernels: dict[str, tuple[int, int]]) -> int:
        """The entries of a layer's kernels that are not trained, where all else of the model is."""
        return sum(m * n for name, (m, n) in kernels.items() if self.adds_to(name))

    def kept(self, kernels: dict[str, tuple[int, int]]) -> int:
        """What a layer keeps of a token beside its input and what kernels return."""
        if self.kind == LOW_RANK:
            return self.rank * len(kernels)
        # The sum of two products is computed again, of both.
        sizes = {name: n for name, (_, n) in kernels.items() if self.adds_to(name)}
        return self.rank * len(sizes) + sum(n for name, n in sizes.items() if name != "down")

    def entries(self, kernels: dict[str, tuple[int, int]]) -> tuple[int, int]:
        """The entries of a layer's kernels, and of what is beside them."""
        if self.kind == LOW_RANK:
            return sum(self.rank * (m + n) for m, n in kernels.values()), 0
        of_lora = sum(self.rank * sum(size) for k, size in kernels.items() if self.adds_to(k))
        return sum(m * n for m, n in kernels.values()), of_lora


class LoraLinear(nnx.LoRALinear):
    """A linear layer, and a multiple of the product of two matrices beside its kernel.

    The first of them begins as PEFT draws it, uniformly within 1 / sqrt(d_in), the second with
    zeros; both are float32 unless `lora_param_dtype` says otherwise.
    """

    def __init__(self, *sizes: int, rank: int, factor: float, dtype: Any, **options: Any):
        self.factor = factor
        super().__init__(
            *sizes,
            lora_rank=rank,
            lora_dtype=dtype,
            dtype=dtype,
            a_initializer=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            **options,
        )

    def __call__(self, x: jax.Array, **_: Any) -> jax.Array:
        return nnx.Linear.__call__(self, x) + self.factor * self.lora(x)


class LowRankLinear(nnx.Module):
    """A linear layer whose kernel is a product, with entries as large at first as any other's."""

    def __init__(self, d_in: int, d_out: int, *, rank: int, use_bias: bool, **options: Any):
        # The product of two such has a standard deviation of 0.02.
        options["kernel_init"] = nnx.initializers.normal((0.02 / rank**0.5) ** 0.5)
        self.a = nnx.Linear(d_in, rank, use_bias=False, **options)
        self.b = nnx.Linear(rank, d_out, use_bias=use_bias, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


def lora_of(params: Params) -> Params:
    """The matrices of LoRA: the tree without all else."""
    found = {}
    for name, value in params.items():
        if name == "lora":
            found[name] = value
        elif isinstance(value, dict) and (below := lora_of(value)):
            found[name] = below
    return found


def without_lora(params: Params) -> Params:
    """The tree without the matrices of LoRA."""
    return {
        name: without_lora(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if name != "lora"
    }


def trained_of(params: Params, adapter: Adapter | None) -> Params:
    """What is trained: the tree without all that stays as it is."""
    if adapter is None or adapter.kind != LORA:
        return params
    return lora_of(params) if adapter.only else without_frozen(params)


def without_frozen(params: Params) -> Params:
    """The tree without the kernels that LoRA is beside."""
    return {
        name: without_frozen(value) if isinstance(value, dict) else value
        for name, value in params.items()
        if not (name == "kernel" and "lora" in params)
    }


def with_parts(params: Params, parts: Params) -> Params:
    """A tree with other arrays where `parts`, which has some of its branches, has any."""
    return params | {
        name: with_parts(params.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in parts.items()
    }


def of_trained(
    optimizer: optax.GradientTransformation, adapter: Adapter | None
) -> optax.GradientTransformation:
    """An optimizer of what is trained; it is given all parameters, and gradients of these."""
    if adapter is None or adapter.kind != LORA:
        return optimizer

    def init(params: Any) -> Any:
        return optimizer.init(trained_of(params, adapter))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return optimizer.update(updates, state, params and trained_of(params, adapter))

    return optax.GradientTransformation(init, update)


def merged(params: Params, adapter: Adapter | None) -> Params:
    """The parameters of the same model without adapters: kernels alone, in their own dtype.

    Kernels in 8 bits, which would lose what is added to them, are no longer so.
    """
    if adapter is None:
        return params
    found = {}
    for name, value in params.items():
        if not isinstance(value, dict):
            found[name] = value
        elif "lora" in value:
            a, b = value["lora"]["lora_a"], value["lora"]["lora_b"]
            rest = {k: v for k, v in value.items() if k != "lora"}
            new = _sums(value["kernel"], a, b, adapter.factor)
            found[name] = rest | {"kernel": new}
        elif adapter.kind == LOW_RANK and {"a", "b"} == value.keys():
            a, b = value["a"]["kernel"], value["b"]["kernel"]
            found[name] = value["b"] | {"kernel": _products(a, b)}
        else:
            found[name] = merged(value, adapter)
    return found


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In float32, also where a device would compute with less by default."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


@jax.jit
def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Those of all layers, one layer at a time in float32."""
    return jax.lax.map(lambda layer: _product(*layer).astype(b.dtype), (a, b))


@jax.jit
def _sums(kernels: Any, a: jax.Array, b: jax.Array, factor: float) -> jax.Array:
    """The kernels of all layers and what is beside them, one layer at a time in float32."""

    def one(layer: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = layer
        dense = galore_optax.dequantize_params(kernel)
        return (dense.astype(jnp.float32) + factor * _product(a, b)).astype(dense.dtype)

    return jax.lax.map(one, (kernels, a, b))
