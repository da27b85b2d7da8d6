"""Plans which units there are, and when in the backward pass the gradient of each is complete."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from galore_optax._jaxpr import dependence
from galore_optax._layerwise.checks import is_inputs
from galore_optax._layerwise.division import Division, Unit
from galore_optax._layerwise.settings import Activations, Batch, Block, Settings
from galore_optax._sharding import shaped
from galore_optax._types import Params


class Plan:
    """What a step does, for parameters and a batch of some shapes.

    Attributes:
      settings: the arguments of `galore_optax.layerwise`.
      division: how the parameters and the state divide.
      before: the leaves outside of the blocks that the embedding does not use; their gradient is
        complete before that of any layer.
      after: the leaves that the embedding uses.
      of_head: for each leaf whether the head gives it a gradient.

    Args:
      settings: the arguments of `galore_optax.layerwise`.
      params: the parameters, or their shapes.
      batch: a batch, or ``settings.micro_batches`` of them on a leading axis.

    Raises:
      TypeError: the parameters are not a mapping with the blocks.
      ValueError: they cannot be divided, or the functions of the model do not fit together.
    """

    def __init__(self, settings: Settings, params: Params, batch: Batch):
        self.settings = settings
        self.division = division = divided(settings, params)
        if settings.micro_batches > 1:
            _check_batch(batch, settings.micro_batches)
            batch = jax.tree.map(functools.partial(shaped, item=True), batch)
        rest, stacked = division.divide(division.placed)
        x = jax.eval_shape(settings.embed, rest, batch)
        _check_block(settings.block, stacked, x)
        loss = jax.eval_shape(settings.head_loss, rest, x, batch)
        if getattr(loss, "shape", None) != ():
            raise ValueError(f"head_loss must return a scalar; got {loss}")
        by_embed = self._used(settings.embed, rest, batch)
        by_head = self._used(settings.head_loss, rest, x, batch)
        pairs = zip(division.in_blocks, by_embed, strict=True)
        before = [not in_blocks and not embeds for in_blocks, embeds in pairs]
        self.before: list[Unit] = division.units(before, settings.slice_size)
        self.after: list[Unit] = division.units(by_embed, settings.slice_size)
        # The head gives a leaf that is used nowhere a gradient of zeros, by which it is updated.
        self.of_head = [a or b for a, b in zip(before, by_head, strict=True)]

    def _used(
        self, function: Callable[..., PyTree], rest: dict[str, Params], *args: PyTree
    ) -> list[bool]:
        """Says which leaves of the parameters a function of those without the blocks uses."""
        sets = jax.tree.leaves(dependence(function, rest, *args), is_leaf=is_inputs)
        used = frozenset().union(*sets)
        shapes, arrays = self.division.shapes, iter(range(len(jax.tree.leaves(rest))))
        result = [False] * len(shapes)
        # The arrays come in the order that the leaves have without the blocks.
        for i in jax.tree.leaves(self.division.divide(list(range(len(shapes))))[0]):
            result[i] = any([next(arrays) in used for _ in jax.tree.leaves(shapes[i])])
        return result


def divided(settings: Settings, params: Params) -> Division:
    """Returns how these parameters divide.

    Raises:
      TypeError: the parameters are not a mapping with the blocks.
      ValueError: they cannot be divided, or not in groups of layers.
    """
    division = Division(settings.tx, params, settings.blocks, settings.micro_batches)
    if division.layers % settings.inputs_every:
        raise ValueError(
            f"inputs_every must divide the number of layers, {division.layers}; got "
            f"{settings.inputs_every}"
        )
    return division


def union(units: Sequence[Unit], count: int) -> list[bool]:
    """Says for each of ``count`` leaves whether it is in any of the units."""
    return [any(unit.chosen[i] for unit in units) for i in range(count)]


def _check_batch(batch: Batch, count: int) -> None:
    """Raises an error where a batch has no axis of micro-batches."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"with micro_batches={count} each leaf of batch has a leading axis of {count}; "
                f"{jax.tree_util.keystr(path) or 'it'} has the shape {np.shape(leaf)}"
            )


def _check_block(block: Block, stacked: Params, x: Activations) -> None:
    """Raises an error where a layer does not return what the next one takes."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(x)]
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        found = ", ".join(map(str, dtypes)) or "nothing"
        raise ValueError(
            f"embed must return a floating-point array, alone or in a tree; got {found}"
        )
    one = jax.tree.map(functools.partial(shaped, item=True), stacked)
    y = jax.eval_shape(block, one, x)

    def described(tree: Activations) -> PyTree[str]:
        return jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}{_place(a)}", tree)

    if jax.tree.structure(y) != jax.tree.structure(x) or described(y) != described(x):
        raise ValueError(
            f"block must return an x of the shape and dtype it gets: {described(x)}; got "
            f"{described(y)}"
        )


def _place(array: jax.ShapeDtypeStruct) -> str:
    """Returns how an Explicit mesh divides an array, as errors say it."""
    sharding = shaped(array).sharding
    return "" if sharding is None else f" in {sharding.spec}"
