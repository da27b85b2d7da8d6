"""Presets: the published methods, each of them galore with some of its arguments, and AdamW inside.

Each takes the arguments of ``optax.adamw`` and those of `galore_optax.galore`, so that what differs
between two methods is what differs between two lines here.
"""

import dataclasses
import inspect

import optax

from galore_optax._adamw import AdamW, LowBit, adamw_8bit_preset, adamw_preset
from galore_optax._arguments import checks_arguments
from galore_optax._ownership import Stacked
from galore_optax._residuals import NormScaled, ScaleGradient
from galore_optax._types import DType, Mask, Numeric

galore_adamw, galore_adamw_8bit = adamw_preset(
    "galore_adamw",
    """Returns AdamW in the gradient's subspace: ``galore(optax.adamw(...), rank=rank, ...)``.

    It is Optax's AdamW, not the reference's: decay acts on the weight before the step and epsilon
    is added after bias correction, both second-order differences.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(3e-4, weight_decay=0.1, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024
    """,
)

q_galore_adamw = adamw_8bit_preset(
    "q_galore_adamw",
    """Returns Q-GaLore: 8-bit moments, 4-bit projectors, and lazy refreshes.

    It is ``galore(adamw_8bit(...), projector_dtype="int4", refresh="lazy", ...)``. The weights are
    the caller's: with 8-bit ones from `galore_optax.quantize_params`, gradients come from
    `galore_optax.value_and_grad`, and `galore_optax.apply_updates` adds the updates with
    stochastic rounding.

    [arguments]

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> tx = galore_optax.q_galore_adamw(1e-3, rank=8)
      >>> params = galore_optax.quantize_params({"kernel": jnp.ones((64, 256))}, rank=8)
      >>> state = tx.init(params)
      >>> loss = lambda params: jnp.sum(params["kernel"].dequantize() ** 2)
      >>> value, grads = galore_optax.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = galore_optax.apply_updates(params, updates, jax.random.key(0))

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024
    """,
    {"projector_dtype": "int4", "refresh": "lazy"},
)

fira_adamw, fira_adamw_8bit = adamw_preset(
    "fira_adamw",
    """Returns Fira: GaLore, and what lies outside of the subspace scaled like what lies inside.

    It is ``galore_adamw(residual="norm_scaled", ...)``, the method of the paper's text. Its code
    differs, and is ``residual=NormScaled(beta=1 / scale, subtract="scaled")``: see
    `galore_optax.NormScaled`. No more state than GaLore's is needed but a number per matrix.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.fira_adamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024
    """,
    {"residual": "norm_scaled"},
)

apollo_adamw, apollo_adamw_8bit = adamw_preset(
    "apollo_adamw",
    """Returns APOLLO: the gradient itself, its channels scaled as Adam scales a random sketch.

    No basis is stored, and no factorization is computed: the sketch's random numbers are made
    again when they are needed, and drawn anew every ``update_proj_gap`` steps. The rank is a
    quarter of a matrix' short side, and the scale 1, as in the paper.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.apollo_adamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """,
    {
        "rank": 0.25,
        "scale": 1.0,
        "projector": "gaussian",
        "residual": ScaleGradient("channel"),
    },
)

apollo_mini_adamw, apollo_mini_adamw_8bit = adamw_preset(
    "apollo_mini_adamw",
    """Returns APOLLO-Mini: SGD whose step Adam sets for each matrix, from a sketch of rank 1.

    The state of a matrix is hardly more than that of SGD: two numbers for each column, or row.
    Embeddings and heads, which are not projected unless ``exclude`` says so, have Adam's.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.apollo_mini_adamw(3e-4)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """,
    {
        "rank": 1,
        "scale": 128**0.5,
        "projector": "gaussian",
        "residual": ScaleGradient("tensor"),
    },
)

ldadamw, ldadamw_8bit = adamw_preset(
    "ldadamw",
    """Returns LDAdam: a subspace that follows the gradient, and takes both moments along.

    Each step turns the basis by one power iteration, and rotates the moments. The paper's default
    also adds what was left out to the next gradient, which takes as much memory as a moment at full
    size, and more while a step is taken: that is ``residual="error_feedback"`` here, and off.
    `galore_optax.memory_report` says what it costs. The scale is 1, as in the paper.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.ldadamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """,
    {
        "update_proj_gap": 1,
        "scale": 1.0,
        "projector": "momentum_iteration",
        "transport": "rotate",
    },
)

tracked_adamw, tracked_adamw_8bit = adamw_preset(
    "tracked_adamw",
    """Returns LDAdam's subspace, tracked on every step, with Fira's residual of twice the size.

    It is ``ldadamw(scale=0.25, residual=NormScaled(beta=2), ...)``, in a state of as many bytes as
    GaLore's and a number per matrix. It is no published method; SubTrack++ is made of the same
    three parts, with another way to follow the subspace. Each step costs a power iteration, and
    the factor of the residual makes up for how small the gradient is outside of the subspace.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.tracked_adamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024; Chen et al., `Fira
      <https://arxiv.org/abs/2410.01623>`_, 2024; Rajabi et al., `SubTrack++
      <https://arxiv.org/abs/2502.01586>`_, 2025
    """,
    {
        "update_proj_gap": 1,
        "projector": "momentum_iteration",
        "transport": "rotate",
        "residual": NormScaled(beta=2.0),
    },
)

frugal_adamw, frugal_adamw_8bit = adamw_preset(
    "frugal_adamw",
    """Returns FRUGAL: AdamW on some rows of each matrix, and signs of the gradient on all others.

    The rows, a quarter of them, are drawn anew every ``update_proj_gap`` steps, and their moments
    begin anew. The scale is 1. Both are as in the paper, which draws whole blocks by default;
    drawing rows, or columns of PyTorch's weights, is one of its variants.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.frugal_adamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024
    """,
    {
        "rank": 0.25,
        "scale": 1.0,
        "projector": "random_rows",
        "transport": "reset",
        "residual": "sign",
    },
)

grass_adamw, grass_adamw_8bit = adamw_preset(
    "grass_adamw",
    """Returns Grass: AdamW on the rows of the gradient that are largest, and nothing is multiplied.

    Moments begin anew whenever rows are chosen. ``projector="sampled_rows"`` draws the rows at
    random instead, with weights that make the low-rank gradient right on average.

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.grass_adamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Muhamed et al., `Grass <https://arxiv.org/abs/2406.17660>`_, 2024
    """,
    {"projector": "rows", "transport": "reset"},
)

dct_adamw, dct_adamw_8bit = adamw_preset(
    "dct_adamw",
    """Returns DCT-AdamW: AdamW on the cosines that capture most of the gradient.

    They are chosen on every step, by a fast transform and a selection, and the state holds nothing
    but their numbers. Moments are rotated, which here means that a cosine that stays keeps its
    moments, and one that arrives begins with zero: late in training its first step is larger than
    Adam's, by up to (1 - b1) / sqrt(1 - b2).

    [arguments]

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.dct_adamw(3e-4, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Modoranu et al., `FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025
    """,
    {"update_proj_gap": 1, "scale": 1.0, "projector": "dct", "transport": "rotate"},
)


@checks_arguments
def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DType | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    tables: str = "adam",
    block_size: int = 256,
    min_size: int = 4096,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with moments in 8 bits: ``low_bit(optax.adamw(...))``, without galore.

    Args:
      learning_rate: the learning rate; see ``optax.adamw``, as for all arguments up to
        ``nesterov``.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      mu_dtype: the dtype of the first moment, before it is rounded to 8 bits.
      weight_decay: the weight decay, times the learning rate.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      tables: ``"factored"`` for embeddings and heads with a factored second moment and no first
        one, as `galore_optax.scale_by_factored_adam` has. They are told by their names.
      block_size: see `galore_optax.low_bit`.
      min_size: the number of elements below which moments are not rounded. All elements of a leaf
        count, or those of one layer where ``stacked`` says how many axes are stacks.
      stacked: see `galore_optax.low_bit`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.adamw_8bit(3e-4, weight_decay=0.1)

    References:
      Dettmers et al., `8-bit Optimizers <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    low = LowBit(block_size, min_size, stacked)
    adamw = AdamW(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov, low)
    return dataclasses.replace(adamw, tables=tables).whole()


__test__ = {
    name: value.__doc__
    for name, value in list(globals().items())
    if "adamw" in name and inspect.isfunction(value) and value.__module__ == "galore_optax"
}
"""The examples of the presets, which doctest does not find for itself."""
