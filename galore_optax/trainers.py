"""Which axes of a kernel make its matrix, in the models of trainers, and on which mesh they run.

A kernel of attention has an axis for heads, stacked layers have one more, and no shape tells which
is which. Here are tables for the names that trainers have; docs/trainers.md says of each how it is
used with galore.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from galore_optax._axis_names import mesh_of_names
from galore_optax._names import stacked_vectors
from galore_optax._trees import bare, leaves_with_paths, logical, path_name
from galore_optax._types import Params
from galore_optax._view import DimensionNumbers


@dataclasses.dataclass(frozen=True)
class ByPath:
    """Dimension numbers by path, for ``weight_dimension_numbers``.

    Leaves of which no rule is found have those of a Flax kernel, (input, output), if they have two
    axes and are no vectors stacked like the matrices beside them; else they are not projected.

    Attributes:
      rules: dimension numbers, or None for what is not projected, by regular expressions that are
        searched in a path, whose components are joined by "/"; the first that is found counts.
        Negative axes count from the end, so that further axes in front are those of a stack.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> from galore_optax import trainers
      >>> params = {"attn": {"q_einsum": {"w": jnp.ones((2, 4, 64, 16))}}}  # layers, heads, D, H
      >>> tx = galore_optax.galore_adamw(1e-3, rank=8, weight_dimension_numbers=trainers.GEMMA)
      >>> optax.tree.get(tx.init(params), "mu")["attn"]["q_einsum"]["w"].shape  # of two 64 x 64
      (2, 8, 64)
      >>> mine = trainers.ByPath({"conv": None, **trainers.GEMMA.rules})
    """

    rules: Mapping[str, DimensionNumbers | None]

    def __post_init__(self):
        for pattern in self.rules:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"rules must have regular expressions as keys; got {pattern!r}: {error}"
                ) from error

    def __call__(self, params: Params) -> PyTree:
        """Returns a tree with the structure of the parameters."""
        params = bare(logical(params))
        leaves = leaves_with_paths(params)
        paths = [path for path, _ in leaves]
        shapes = [np.shape(leaf) for _, leaf in leaves]
        vectors = stacked_vectors(paths, shapes)
        numbers = [
            self._of_leaf(path, len(shape), i in vectors)
            for i, (path, shape) in enumerate(zip(paths, shapes, strict=True))
        ]
        return jax.tree.structure(params).unflatten(numbers)

    def _of_leaf(self, path: str, axes: int, is_vectors: bool) -> DimensionNumbers | None:
        found = next((pattern for pattern in self.rules if re.search(pattern, path)), None)
        if found is None:
            return DimensionNumbers() if axes == 2 and not is_vectors else None
        return self.rules[found] if axes >= 2 else None


_MATRIX = DimensionNumbers(-2, -1)
_INTO_HEADS = DimensionNumbers(-3, (-2, -1))  # (D, heads, H)
_OUT_OF_HEADS = DimensionNumbers((-3, -2), -1)  # (heads, H, D)

_EINSUMS = {
    r"(^|/)(q|kv|qkv)_einsum(_\d+)?(/|$)": DimensionNumbers(-2, (-3, -1)),  # (heads, D, H)
    r"(^|/)attn_vec_einsum(_\d+)?(/|$)": _OUT_OF_HEADS,
    r"(^|/)(gating_einsum|linear)(/|$)": _MATRIX,
}
_ATTENTION = {
    r"(^|/)(query|key|value)/kernel$": _INTO_HEADS,
    r"(^|/)out/kernel$": _OUT_OF_HEADS,
    r"(^|/)Dense_\d+/kernel$": _MATRIX,
}

GEMMA = ByPath({**_EINSUMS, **_ATTENTION})
"""Gemma's own names, those of openpi and Kauldron too, and the attention of Flax in their ViT."""

TUNIX = ByPath(
    {
        **_EINSUMS,
        r"(^|/)[qkv]_proj/w$": _INTO_HEADS,
        r"(^|/)o_proj/w$": _OUT_OF_HEADS,
        r"(^|/)(gate|up|down)_proj(/kernel)?$": _MATRIX,
    }
)
"""The models of Tunix: kernels of LLaMA and Qwen, whose experts are stacked, and those of Gemma."""

EASYDEL = ByPath({r"(^|/)experts/(.*/)?kernel$": _MATRIX})
"""The models of EasyDeL, whose kernels have two axes, but for those of experts."""

LEVANTER = ByPath(
    {
        r"(^|/)q_proj/weight$": DimensionNumbers(-1, (-4, -3, -2)),  # kv heads, group, H, D
        r"(^|/)[kv]_proj/weight$": DimensionNumbers(-1, (-3, -2)),
        r"(^|/)o_proj/weight$": DimensionNumbers((-2, -1), -3),
        r"(^|/)(gate|up|down)_proj/weight$": DimensionNumbers(-1, -2),
        r"(^|/)c_attn/weight$": DimensionNumbers(-4, (-2, -1)),  # D, q k v, heads, H
        r"(^|/)attn/c_proj/weight$": _OUT_OF_HEADS,
        r"(^|/)mlp/c_(fc|proj)/weight$": _MATRIX,
    }
)
"""LLaMA of levanter, whose weights are (output, input), and its GPT-2, stacked over layers."""


def maxtext(param_scan_axis: int = 1) -> ByPath:
    """Returns dimension numbers of the models of MaxText.

    Args:
      param_scan_axis: MaxText's setting: the axis over which layers are stacked, if they are.
    """
    first = -2 if param_scan_axis == 0 else 0
    into_heads = -3 if param_scan_axis == 0 else 0
    return ByPath(
        {
            r"(^|/)MoeBlock_\d+/(.*/)?(wi_\d+|wo)(/kernel)?$": _MATRIX,
            r"(^|/)o_a_proj(/|$)": _MATRIX,
            r"(^|/)(query|key|value|wq_b|wkv_b|wkv)/kernel$": DimensionNumbers(
                into_heads, (-2, -1)
            ),
            r"(^|/)out/kernel$": DimensionNumbers((into_heads, -2), -1),
            r"(^|/)kernel$": DimensionNumbers(first, -1),
        }
    )


MAXTEXT = maxtext()
"""The models of MaxText with its default settings, and those whose layers are not stacked."""


def on_mesh(
    tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> optax.GradientTransformationExtraArgs:
    """Tells a transformation on which mesh its state will lie.

    It is for trainers that shard state by the names of axes and call ``init`` where they do not say
    on which mesh, as MaxText does: which axes of the mesh divide what is not known from names.

    Args:
      tx: any transformation.
      mesh: the mesh.

    Raises:
      TypeError: this is no mesh.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh; got {mesh!r}")

    def init(params: Params) -> PyTree:
        with mesh_of_names(mesh):
            return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def partition_rules(specs: PyTree) -> tuple[tuple[str, PartitionSpec], ...]:
    """Returns the specs of a state as rules: regular expressions on paths, each with a spec.

    It is for trainers that shard state by such rules, as EasyDeL does: those of a matrix would be
    taken for its moments and its projector too.

    Args:
      specs: what :func:`galore_optax.state_partition_specs` returns.

    Raises:
      TypeError: something in it is no ``PartitionSpec``.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
      >>> tx = galore_optax.galore_adamw(1e-3, rank=8)
      >>> specs = galore_optax.state_partition_specs(tx, params, {"kernel": P("fsdp", "tp")})
      >>> dict(galore_optax.trainers.partition_rules(specs))["^inner/0/mu/kernel(/.*)?$"]
      P(None, ('tp', 'fsdp'))
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    for keys, spec in leaves:
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                "specs must be what state_partition_specs returns, with a PartitionSpec for each "
                f"array; {path_name(keys)!r} has {spec!r}"
            )
    return tuple((f"^{re.escape(path_name(keys))}(/.*)?$", spec) for keys, spec in leaves)
