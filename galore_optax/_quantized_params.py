"""Codes and decodes weights, takes their gradients, and adds updates so that none is lost."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from galore_optax._codecs import CODECS
from galore_optax._quantized import (
    QuantizedArray,
    either,
    is_quantized,
    quantize,
    requantize,
    schemes,
)
from galore_optax._ranks import RankSpec
from galore_optax._select import (
    DEFAULT_EXCLUDE,
    DimensionNumbersSpec,
    ExcludeSpec,
    Selection,
)
from galore_optax._sharding import zeros_like
from galore_optax._storage import Storage
from galore_optax._types import Params, Updates
from galore_optax._view import MatrixView


def quantize_params(
    params: Params,
    *,
    rank: RankSpec = 128,
    scheme: str = "int8",
    block_size: int = 256,
    side: str = "short",
    exclude: ExcludeSpec = DEFAULT_EXCLUDE,
    weight_dimension_numbers: DimensionNumbersSpec = None,
    key: jax.Array | None = None,
) -> Params:
    """Quantizes the leaves that ``galore`` would project, and leaves the others as they are.

    Args:
      params: the parameters, or their ``jax.ShapeDtypeStruct``.
      rank: the rank that `galore_optax.galore` gets. With the same rank, ``side``, ``exclude`` and
        ``weight_dimension_numbers`` the same leaves are chosen.
      scheme: the name of the codes, ``"int8"`` or ``"int4"``.
      block_size: the number of elements that share a scale, even. Blocks do not straddle layers,
        nor any other batch axis.
      side: see `galore_optax.galore`.
      exclude: see `galore_optax.galore`.
      weight_dimension_numbers: see `galore_optax.galore`.
      key: a key of JAX for stochastic rounding; None rounds to the nearest, as is best where it is
        done only once.

    Returns:
      The same tree with a `QuantizedArray` for each chosen leaf, of its shape and dtype.

    Raises:
      TypeError: where `galore_optax.galore` raises one for these arguments and parameters.
      ValueError: likewise; or another argument is out of range.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
      >>> params = galore_optax.quantize_params(params, rank=128)
      >>> params["kernel"].nbytes / params["kernel"].size
      1.01953125
    """
    possible = schemes(at_random=True)
    if scheme not in possible:
        raise ValueError(f"scheme must be one of {', '.join(possible)}; got {scheme!r}")
    views = Selection(rank, side, exclude, weight_dimension_numbers).views(params)
    leaves, treedef = jax.tree.flatten(params)
    new = []
    for i, (leaf, view) in enumerate(zip(leaves, views, strict=True)):
        if isinstance(view, MatrixView):
            batch_axes = max(view.batch_axes, default=-1) + 1
            if batch_axes == len(view.shape):
                raise ValueError(
                    f"{view.path!r} of shape {view.shape} has a batch axis last, so that no two "
                    "elements in a row could share a block. Move that axis, or exclude the leaf."
                )
            leaf_key = None if key is None else jax.random.fold_in(key, i)
            make = functools.partial(
                quantize,
                scheme=scheme,
                block_size=block_size,
                batch_axes=batch_axes,
                key=leaf_key,
            )
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            leaf = jax.eval_shape(make, leaf) if is_shape else make(leaf)
        new.append(leaf)
    if views and not any(map(is_quantized, new)):
        warnings.warn(
            "quantize_params quantizes nothing: galore with the same arguments would project "
            f"nothing. It sees {', '.join(f'{v.path} {v.shape}' for v in views[:3])}, ...; for "
            "stacks of matrices pass weight_dimension_numbers.",
            UserWarning,
            stacklevel=2,
        )
    return treedef.unflatten(new)


def dequantize_params(params: Params) -> Params:
    """Returns a tree with all quantized leaves as ordinary arrays; others stay as they are.

    Args:
      params: a tree, also the one that :func:`value_and_grad` hands to its function, or one of
        ``jax.ShapeDtypeStruct``.

    Returns:
      The tree, its leaves in their logical shapes and dtypes.
    """

    def dense(leaf: PyTree) -> PyTree:
        if isinstance(leaf, QuantizedArray) and isinstance(leaf.codes, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf.dequantize() if _is_any_quantized(leaf) else leaf

    return jax.tree.map(dense, params, is_leaf=_is_any_quantized)


def value_and_grad(
    fun: Callable[..., PyTree], has_aux: bool = False
) -> Callable[..., tuple[PyTree, Updates]]:
    """Acts as ``jax.value_and_grad`` with respect to the values that quantized leaves stand for.

    ``fun`` gets the parameters with quantized leaves still in codes, and dequantizes them where
    it uses them: with ``.dequantize()``, with :func:`dequantize_params` on any part of the tree,
    or by handing them to a function of ``jax.numpy``. In a scan over layers whose body is under
    ``jax.checkpoint`` only one layer at a time is dequantized.

    ``jax.grad`` itself refuses integers, ``codes`` among them, without saying which leaf.

    Args:
      fun: a function of the parameters and whatever else, which returns a scalar.
      has_aux: whether it returns a pair of that and auxiliary data.

    Returns:
      A function like ``fun`` that returns its result and the gradient with respect to its first
      argument: a tree of arrays, for quantized leaves of their logical shape and dtype.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> params = galore_optax.quantize_params({"kernel": jnp.ones((256, 512))})
      >>> loss = lambda params, x: jnp.sum(x @ params["kernel"].dequantize())
      >>> value, gradient = galore_optax.value_and_grad(loss)(params, jnp.ones(256))
      >>> gradient["kernel"].shape
      (256, 512)
    """

    @functools.wraps(fun)
    def wrapped(params: Params, *args: object, **kwargs: object) -> tuple[PyTree, Updates]:
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)

        def of_carriers(carriers: list[PyTree]) -> PyTree:
            attached = map(attach, leaves, carriers)
            return fun(treedef.unflatten(attached), *args, **kwargs)

        carriers = list(map(carrier, leaves))
        value, gradients = jax.value_and_grad(of_carriers, has_aux=has_aux)(carriers)
        return value, treedef.unflatten(gradients)

    return wrapped


def carrier(leaf: PyTree) -> PyTree:
    """Returns what to differentiate with respect to: the leaf, or unread zeros if quantized."""
    if not is_quantized(leaf):
        return leaf
    return zeros_like(jax.eval_shape(lambda quantized: quantized.dequantize(), leaf))


def attach(leaf: PyTree, carrier: PyTree) -> PyTree:
    """Returns what a function is given for a leaf, so that its gradient goes to the carrier."""
    return _Attached(leaf, carrier) if is_quantized(leaf) else carrier


def check_gradients(gradients: Updates) -> None:
    """Raises an error for a gradient that is in codes, as those that ``jax.grad`` takes are."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients, is_leaf=is_quantized):
        if is_quantized(leaf):
            raise TypeError(
                f"the gradient of {jax.tree_util.keystr(path, simple=True, separator='/')!r} must "
                f"be an array of its shape {leaf.shape}; got a QuantizedArray. Take gradients with "
                "galore_optax.value_and_grad."
            )


def apply_updates(
    params: Params, updates: Updates, key: PRNGKeyArray | None, *, round_bfloat16: bool = False
) -> Params:
    """Does what ``optax.apply_updates`` does, and rounds quantized leaves at random.

    The mean of what is added is the update however small it is, where rounding to the nearest
    would lose whatever is less than half a step. Sums are in float32.

    Args:
      params: the parameters; quantized leaves must be in integer codes.
      updates: the updates, of the same structure, in logical shapes; a None leaves its parameter
        as it is.
      key: a key of JAX, another one for every step; None rounds to the nearest.
      round_bfloat16: whether to round bfloat16 leaves at random too.

    Returns:
      The new parameters, in the dtypes and shapes of the old ones.

    Raises:
      ValueError: the structures or shapes of parameters and updates differ, a quantized leaf is
        not in integer codes, or random rounding of bfloat16 got no key.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> params = galore_optax.quantize_params({"kernel": jnp.ones((256, 512))})
      >>> updates = {"kernel": jnp.full((256, 512), -1e-4)}
      >>> params = galore_optax.apply_updates(params, updates, jax.random.key(0))
      >>> bool(abs(jnp.mean(params["kernel"].dequantize()) - (1 - 1e-4)) < 1e-5)
      True

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.3.
    """
    if round_bfloat16 and key is None:
        raise ValueError("round_bfloat16=True needs a key of JAX, another one for every step")

    def is_leaf(x: object) -> bool:
        return x is None or is_quantized(x)

    found, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    try:
        matching = treedef.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(f"updates must have the structure of params: {error}") from error

    new = []
    for i, ((path, param), update) in enumerate(zip(found, matching, strict=True)):
        if param is None or update is None:
            new.append(param)
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        _check_update(name, param, update)
        leaf_key = None if key is None else jax.random.fold_in(key, i)
        if is_quantized(param):
            new.append(requantize(param, update, leaf_key))
            continue
        dtype = jnp.result_type(param)
        if round_bfloat16 and leaf_key is not None and dtype == jnp.bfloat16:
            total = jnp.asarray(param).astype(jnp.float32) + update.astype(jnp.float32)
            new.append(Storage("bfloat16").keep(total, key=leaf_key))
        else:
            new.append(jnp.asarray(param + update).astype(dtype))
    return treedef.unflatten(new)


def _check_update(name: str, param: PyTree, update: PyTree) -> None:
    is_array = jax.tree_util.all_leaves([update])
    if not is_array or np.shape(update) != np.shape(param):
        found = np.shape(update) if is_array else type(update).__name__
        raise ValueError(
            f"the update of {name or 'the parameter'} must be an array of its shape "
            f"{np.shape(param)}; got {found}. For quantized parameters take gradients with "
            "galore_optax.value_and_grad, and an optimizer that knows them: galore, low_bit or "
            "one of the presets."
        )
    if is_quantized(param) and not CODECS[param.scheme].rounds_at_random:
        raise ValueError(
            f"{name or 'the parameter'} is in {param.scheme} codes, which cannot be rounded "
            f"without bias. Quantize parameters with scheme {either(schemes(at_random=True))}."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Attached:
    """A quantized leaf, and the array that receives the gradient of what it stands for."""

    quantized: QuantizedArray
    carrier: PyTree

    def dequantize(self) -> jax.Array:
        return _with_gradient_of(self.quantized.dequantize(), self.carrier)

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __getattr__(self, name: str) -> object:
        # The quantized leaf answers whatever else a model asks of its weight: shape, dtype, ndim,
        # size, nbytes.
        if name.startswith("_") or name in ("quantized", "carrier"):
            raise AttributeError(name)
        return getattr(self.quantized, name)


def _is_any_quantized(x: object) -> bool:
    return isinstance(x, QuantizedArray | _Attached)


@jax.custom_vjp
def _with_gradient_of(value: jax.Array, carrier: jax.Array) -> jax.Array:
    """Returns the value, whose gradient goes to the carrier, which is not read."""
    del carrier
    return value


_with_gradient_of.defvjp(
    lambda value, carrier: (value, None),
    lambda _, gradient: (jnp.zeros_like(gradient), gradient),
)
