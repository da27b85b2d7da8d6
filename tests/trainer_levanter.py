"""levanter, which shards state by the names of axes, as Flax does, but keeps them otherwise."""

import contextlib
import dataclasses
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import optax

from galore_optax import trainers
from galore_optax._trees import bare
from tests.trainer_models import (
    STEPS,
    D,
    F,
    H,
    L,
    N,
    P,
    V,
    auto_mesh,
    loss_of,
    named,
    optimizer,
    seen,
    unstacked,
    weights,
)

# levanter: arrays whose axes have names, in the parameters and in what is made like them.


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class NamedArray:
    array: jax.Array
    axes: tuple[Axis, ...]

    def __post_init__(self):
        if hasattr(self.array, "shape"):
            assert self.array.shape == tuple(axis.size for axis in self.axes)

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        new = object.__new__(cls)
        object.__setattr__(new, "array", children[0])
        object.__setattr__(new, "axes", axes)
        return new


@jax.tree_util.register_pytree_node_class
class LaterNamedArray:
    """As later versions of haliax have it: the array says the sizes of what has these names."""

    def __init__(self, array, axes):
        self.array = array
        self.axis_names = tuple(axis if isinstance(axis, str) else axis.name for axis in axes)

    @property
    def axes(self):
        return tuple(map(Axis, self.axis_names, jnp.shape(self.array)))

    def tree_flatten(self):
        return (self.array,), self.axis_names

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(*children, names)


SIZES = {
    **{"vocab": V, "embed": D, "layers": L, "mlp": F},
    **{"kv_head": N // 2, "q_heads_per_group": 2, "heads": N, "head_size": H},
}


def levanter_leaves():
    layer = {
        "self_attn": {
            "q_proj": {"weight": ("kv_head", "q_heads_per_group", "head_size", "embed")},
            "k_proj": {"weight": ("kv_head", "head_size", "embed")},
            "v_proj": {"weight": ("kv_head", "head_size", "embed")},
            "o_proj": {"weight": ("embed", "heads", "head_size")},
        },
        "mlp": {
            "gate_proj": {"weight": ("mlp", "embed")},
            "up_proj": {"weight": ("mlp", "embed")},
            "down_proj": {"weight": ("embed", "mlp")},
        },
        "input_layernorm": {"weight": ("embed",)},
        "post_attention_layernorm": {"weight": ("embed",)},
    }
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    stacked = jax.tree.map(lambda names: ("layers", *names), layer, is_leaf=is_names)
    names = {
        "embeddings": {"token_embeddings": {"weight": ("vocab", "embed")}},
        "transformer": {"layers": {"stacked": stacked}, "norm": {"weight": ("embed",)}},
        "lm_head": {"weight": ("vocab", "embed")},
    }
    shapes = jax.tree.map(lambda x: tuple(SIZES[n] for n in x), names, is_leaf=is_names)
    axes = jax.tree.map(lambda x: tuple(Axis(n, SIZES[n]) for n in x), names, is_leaf=is_names)
    return jax.tree.map(lambda x, of_x: NamedArray(jnp.asarray(x), of_x), weights(shapes), axes)


def levanter_loss(model):
    model = bare(model)
    stacked = model["transformer"]["layers"]["stacked"]

    def of_layer(layer):
        attn, mlp = layer["self_attn"], layer["mlp"]
        k, v = (jnp.repeat(attn[f"{x}_proj"]["weight"], 2, 0) for x in "kv")
        return {
            "q": attn["q_proj"]["weight"].reshape(N, H, D).transpose(2, 0, 1),
            **{"k": k.transpose(2, 0, 1), "v": v.transpose(2, 0, 1)},
            "o": attn["o_proj"]["weight"].transpose(1, 2, 0),
            **{k: mlp[f"{k}_proj"]["weight"].T for k in ("gate", "up", "down")},
            "norms": [layer[f"{k}_layernorm"]["weight"] for k in ("input", "post_attention")],
        }

    return loss_of(
        {
            "embed": model["embeddings"]["token_embeddings"]["weight"],
            "layers": [of_layer(layer) for layer in unstacked(stacked)],
            "norm": model["transformer"]["norm"]["weight"],
            "head": model["lm_head"]["weight"].T,
        }
    )


@contextlib.contextmanager
def axis_mapping(mapping, mesh):
    """What a trainer of levanter enters: haliax's mapping of names, and the mesh."""
    partitioning = types.ModuleType("haliax.partitioning")
    partitioning.current_thread_local_mapping = lambda: mapping
    sys.modules["haliax.partitioning"] = partitioning
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`with mesh:`", DeprecationWarning)
        with mesh:
            yield
    del sys.modules["haliax.partitioning"]


def levanter(sizes=(8, 1), mapping=None):
    mesh = auto_mesh(sizes, ("data", "model"))
    mapping = mapping or {"embed": "data"}  # its default, fsdp_axis: embed
    is_named = lambda x: isinstance(x, NamedArray)  # noqa: E731

    def shardings(tree):
        def of_node(x):
            return P(*(mapping.get(axis.name) for axis in x.axes)) if is_named(x) else P()

        return named(jax.tree.map(of_node, tree, is_leaf=is_named), mesh)

    def named_jit(function, *arguments):
        out = shardings(jax.eval_shape(function, *arguments))
        return jax.jit(function, out_shardings=out)

    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer(trainers.LEVANTER))

    def initial():
        model = levanter_leaves()
        return model, tx.init(model)

    def step(model, state):
        value, grads = jax.value_and_grad(levanter_loss)(model)
        updates, state = tx.update(grads, state, params=model, obj_fn=None, loss=value)
        return jax.tree.map(lambda p, u: p + u, model, updates), state, value

    with axis_mapping(mapping, mesh):
        model, state = named_jit(initial)()
        step = named_jit(step, model, state)
        losses = []
        for _ in range(STEPS):
            model, state, value = step(model, state)
            losses.append(value)
    specs = jax.tree.map(lambda x: x.sharding.spec, bare(model))
    return seen(tx, model, specs, mesh, state, losses)


def levanter_tensor():
    """Tensor parallel too, with a name for what is divided over both axes of the mesh."""
    mapping = {"embed": "data", "mlp": "model", "heads": "model", "kv_head": "model"}
    return levanter((4, 2), {**mapping, "state": ("model", "data")})
