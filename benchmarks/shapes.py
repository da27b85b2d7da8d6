"""The published LLaMA shapes, to time optimizers and projectors on."""

from typing import Any

import jax
import jax.numpy as jnp

from examples.flax_llama.config import PRESETS, LlamaConfig

# The projectors that choose from a gradient alone, or from nothing; presets have the others.
PROJECTORS = (
    *("svd", "eigh", "randomized_svd", "power_iteration"),
    *("gaussian", "orthonormal", "rows", "dct"),
)
RANKS = {
    "9m": 32,
    "20m": 64,
    "35m": 96,
    "60m": 128,
    "130m": 256,
    "250m": 256,
    "350m": 256,
    "1b": 512,
    "3b": 512,
    "7b": 1024,
}


def unstacked_llama(model: str | LlamaConfig) -> dict[str, Any]:
    """The shapes of a LLaMA, of a name or of its own, not stacked, kernels (in, out)."""
    config = PRESETS[model] if isinstance(model, str) else model
    d, f = config.hidden, config.intermediate
    layer = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d)}
    layer |= {"gate": (d, f), "up": (d, f), "down": (f, d), "norm_1": (d,), "norm_2": (d,)}
    return _float32(
        {
            "embed": (config.vocab_size, d),
            "layers": [layer] * config.layers,
            "norm": (d,),
            "head": (d, config.vocab_size),
        }
    )


def stacked_llama(model: str | LlamaConfig, layers: int) -> dict[str, Any]:
    """The shapes of a LLaMA with so many layers stacked on a leading axis."""
    tree = unstacked_llama(model)
    layer = {key: (layers, *leaf.shape) for key, leaf in tree["layers"][0].items()}
    return {**tree, "layers": _float32(layer)}


def matrices(name: str) -> dict[tuple[int, int], int]:
    """How many projected matrices there are of each shape, short side first."""
    config = PRESETS[name]
    d, f = config.hidden, config.intermediate
    return {(d, d): 4 * config.layers, (d, f): 3 * config.layers}


def is_projected(path: Any, leaf: Any) -> bool:
    """Whether GaLore projects a leaf of these trees: the layers' matrices alone."""
    return "layers" in jax.tree_util.keystr(path) and leaf.ndim == 2


def normal_like(shapes: Any, key: jax.Array) -> Any:
    """Independent normal entries with standard deviation 0.02 in every leaf."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    normal = zip(keys, leaves, strict=True)
    return treedef.unflatten([0.02 * jax.random.normal(k, leaf.shape) for k, leaf in normal])


def _float32(tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )
