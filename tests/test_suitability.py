"""Which inner transformations go with which transport and residual, and what others are told."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from galore_optax import NormScaled, Reset, Rotate

BETAS = (0.9, 0.999)
ADAMS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "a schedule that begins at zero": optax.adam(optax.linear_schedule(0.0, 1.0, 10)),
    "moments in bfloat16": optax.scale_by_adam(mu_dtype=jnp.bfloat16),
    "clipped": optax.chain(optax.clip(0.1), optax.scale_by_adam()),
    "in 8 bits": galore_optax.low_bit(optax.adam(1e-3), min_size=0),
    "not for biases": optax.masked(
        optax.scale_by_adam(), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    "by name": optax.partition(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-3)},
        lambda tree: {name: "adam" if name == "w" else "sgd" for name in tree},
    ),
}
LOOK_LIKE_IT = {
    "adamax": optax.adamax(1e-3),
    "yogi": optax.yogi(1e-3),
    "radam": optax.radam(1e-3),
    "adabelief": optax.adabelief(1e-3),
    "adabelief, other rates": optax.adabelief(1e-3, b1=0.99, b2=0.9),
    "rmsprop": optax.rmsprop(1e-3),
    "lion": optax.lion(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "sgd": optax.sgd(1e-3),
}


def params():
    return {"w": jnp.ones((4, 6)), "bias": jnp.ones(4)}


def init(inner, **options):
    return galore_optax.galore(inner, rank=2, **options).init(params())


@pytest.mark.parametrize("name", ADAMS)
def test_adam_goes_with_every_transport(name):
    for transport in (Rotate(*BETAS), "project"):
        init(ADAMS[name], transport=transport)


@pytest.mark.parametrize("name", LOOK_LIKE_IT)
def test_rotate_is_for_the_moments_of_adam_alone(name):
    with pytest.raises(ValueError, match='"rotate" is for the moments of optax'):
        init(LOOK_LIKE_IT[name], transport=Rotate(*BETAS))


def test_arrays_that_nobody_moves_are_named():
    for transport in (Rotate(*BETAS), Reset(*BETAS), "project"):
        with pytest.raises(ValueError, match="does not know what 0/nu_max/kernel in the state"):
            init(optax.amsgrad(1e-3), transport=transport)
    # Adafactor's factors have another shape, but belong to the old subspace all the same.
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match='"reset" does not know what v_row/kernel, v_col/kernel'):
        init(factored, transport="reset")


def test_a_leaf_without_moments_is_found_at_init():
    tx = galore_optax.galore(
        optax.partition(
            {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-3)},
            lambda tree: {name: "sgd" if name == "other" else "adam" for name in tree},
        ),
        rank=2,
        transport="project",
    )
    tx.init(params())
    with pytest.raises(ValueError, match='"project" needs moments'):
        tx.init(params() | {"other": jnp.ones((4, 6))})


@pytest.mark.parametrize("transport", ["project", "reset"])
def test_no_moments_at_all(transport):
    with pytest.raises(ValueError, match=f'transport="{transport}" needs moments.*Use transport='):
        galore_optax.galore(optax.sgd(0.1), transport=transport)


def test_reset_begins_anew_or_says_what_is_missing():
    for inner in (optax.sgd(0.1, momentum=0.9), optax.lion(1e-3), optax.rmsprop(1e-3)):
        init(inner, transport="reset")
    init(optax.adam(1e-3), transport=Reset(*BETAS))
    for inner, transport, remedy in (
        (
            optax.adam(1e-3, 0.8, 0.99),
            "reset",
            "Give transport=galore_optax.Reset(b1=0.8, b2=0.99)",
        ),
        (
            optax.adam(1e-3, 0.8),
            Reset(*BETAS),
            "Give transport=galore_optax.Reset(b1=0.8, b2=0.999)",
        ),
        (optax.adamax(1e-3), "reset", "bias correction is known: adam and adamw without"),
        (optax.nadam(1e-3), Reset(*BETAS), "bias correction is known: adam and adamw without"),
        (optax.sgd(0.1, momentum=0.9), Reset(*BETAS), "correct none, such as momentum"),
    ):
        with pytest.raises(ValueError, match=re.escape(remedy)):
            galore_optax.galore(inner, transport=transport)


def test_rates_that_are_not_those_of_the_moments():
    with pytest.raises(
        ValueError, match=r"b2 of Rotate is 0.999, and .* decay by 0.99. Give Rotat"
    ):
        galore_optax.galore(optax.adam(1e-3, b2=0.99), transport=Rotate(*BETAS))
    for b1, b2, says in (
        (1.0, 0.9, "b1 of Rotate must be in"),
        (0.9, -0.1, "b2 of Rotate must be"),
    ):
        with pytest.raises(ValueError, match=says):
            Rotate(b1, b2)
    with pytest.raises(ValueError, match="Reset needs both b1 and b2, or neither"):
        Reset(b1=0.9)


@pytest.mark.parametrize("residual", ["norm_scaled", "scale_gradient", "sign"])
@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (optax.adam(1e-3), "makes -0.001 of a gradient of 1"),
        (optax.adamw(1e-3), "uses the parameters, as weight decay does"),
        (optax.scale_by_learning_rate(1e-3), "makes -0.001 of a gradient of 1"),
        (optax.adam(optax.linear_schedule(0.0, 1.0, 10)), "makes -0 of a gradient of 1"),
        (
            optax.chain(galore_optax.limit_norm_growth(), optax.adam(1e-3)),
            "makes -0.001 of a gradient of 1",
        ),
    ],
)
def test_residuals_want_an_inner_transformation_that_only_scales(residual, inner, reason):
    with pytest.raises(ValueError, match=f"{reason}.*take a preset such as galore_adamw"):
        galore_optax.galore(inner, residual=residual)


def test_residuals_go_with_what_only_scales():
    for inner in (optax.scale_by_adam(), optax.trace(0.9), optax.scale_by_lion(), optax.identity()):
        init(inner, residual="norm_scaled")


def test_combinations_that_cannot_work_are_errors_at_construction():
    adam = optax.scale_by_adam()
    for options, says in (
        ({"residual": "norm_scaled", "accumulation_steps": 2}, "accumulation_steps must be 1 with"),
        ({"residual": "error_feedback"}, "Give residual=galore_optax.ErrorFeedback(b1=0.9)"),
        ({"residual": "norm_scaled", "side": "both"}, 'side="both" cannot go with residual='),
        ({"residual": "scale_gradient", "side": "both"}, 'ScaleGradient(per="tensor")'),
        ({"projector": "momentum_iteration"}, "needs projector_options={'b1': ...}"),
        ({"projector": "random_rows", "refresh": "lazy"}, "those of the projector random_rows are"),
        ({"transport": "rotate"}, "Give transport=galore_optax.Rotate(b1=0.9, b2=0.999)"),
        (
            {"transport": Rotate(*BETAS), "projector": "gaussian"},
            "those of the projector gaussian are not",
        ),
        (
            {
                "projector": "momentum_iteration",
                "projector_options": {"b1": 0.9},
                "side": "both",
            },
            'side="both" cannot go with the projector momentum_iteration, which is for one side',
        ),
        (
            {"transport": Rotate(*BETAS), "projector": "sampled_rows"},
            "those of the projector sampled_rows are not",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            galore_optax.galore(adam, **options)
    init(adam, residual=galore_optax.ScaleGradient("tensor"), side="both")
    init(adam, residual="sign", side="both")


def test_what_cannot_be_tried_is_an_error():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda x: x * value, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = galore_optax.galore(inner, rank=2, residual="norm_scaled")
    with pytest.raises(ValueError, match="found out by trying it, and that failed"):
        tx.init(params())


def test_a_limiter_wants_an_inner_transformation_that_only_scales():
    limiter = galore_optax.limit_norm_growth()
    with pytest.raises(ValueError, match="limit_norm_growth needs an inner transformation that"):
        galore_optax.galore(optax.chain(optax.adam(1e-2), limiter))
    init(optax.chain(optax.scale_by_adam(), limiter))


def test_steps_that_are_skipped_inside_of_galore():
    skipping = optax.apply_if_finite(optax.adam(1e-3), 5)
    init(skipping)
    with pytest.raises(ValueError, match="around galore, not inside"):
        init(skipping, transport=Rotate(*BETAS))


@pytest.mark.parametrize("preset", [galore_optax.frugal_adamw, galore_optax.grass_adamw])
def test_nesterov_cannot_be_reset(preset):
    with pytest.raises(ValueError, match="nesterov must be False with moments that are reset"):
        preset(1e-3, nesterov=True)


SCALED = [
    *("galore_adamw", "fira_adamw", "apollo_adamw", "apollo_mini_adamw", "ldadamw"),
    *("frugal_adamw", "grass_adamw", "dct_adamw", "flora", "galore_muon"),
]


@pytest.mark.parametrize("name", SCALED)
def test_scale_multiplies_the_whole_update_of_a_matrix_and_nothing_else(name):
    def first_update(scale):
        rank = {} if name == "apollo_mini_adamw" else {"rank": 2}
        tx = getattr(galore_optax, name)(0.1, weight_decay=0.0, scale=scale, **rank)
        gradient = {"w": jnp.arange(1.0, 25.0).reshape(4, 6), "bias": jnp.ones(4)}
        return tx.update(gradient, tx.init(params()), params())[0]

    once, twice = first_update(0.5), first_update(1.0)
    chex.assert_trees_all_close(twice["w"], 2 * once["w"], rtol=1e-5)
    chex.assert_trees_all_close(twice["bias"], once["bias"])


@pytest.mark.parametrize("name", SCALED)
def test_gradients_are_averaged_by_presets_that_need_none_of_them_at_full_size(name):
    preset = getattr(galore_optax, name)
    preset(1e-3, accumulation_steps=1)
    reason = {
        **dict.fromkeys(
            ("flora", "galore_muon"), f"of {name} must be 1, since what follows galore"
        ),
        "fira_adamw": "must be 1 with residual=NormScaled(",
        "apollo_adamw": "must be 1 with residual=ScaleGradient(",
        "apollo_mini_adamw": "must be 1 with residual=ScaleGradient(",
        "frugal_adamw": "must be 1 with residual=Sign(",
    }.get(name)
    if reason is None:
        preset(1e-3, accumulation_steps=2)
        reason, changes = "must be 1 with residual=ErrorFeedback(", {"residual": "error_feedback"}
    else:
        changes = {}
    says = rf"accumulation_steps {re.escape(reason)}.*got 2\. Put optax.MultiSteps around"
    with pytest.raises(ValueError, match=says):
        preset(1e-3, accumulation_steps=2, **changes)


def test_arguments_of_residuals():
    for make, error, says in (
        (lambda: NormScaled(beta=-1), ValueError, "beta of NormScaled must be a finite number"),
        (lambda: NormScaled(beta="1"), TypeError, "beta of NormScaled must be a number; got '1'"),
        (lambda: NormScaled(gamma=0.5), ValueError, "gamma of NormScaled must be a finite number"),
        (lambda: NormScaled(subtract="half"), ValueError, 'must be "whole" or "scaled"; got'),
        (
            lambda: NormScaled(betas=(0.9, 1.0)),
            ValueError,
            "b2 of NormScaled's betas must be in [0, 1)",
        ),
        (lambda: galore_optax.ScaleGradient("row"), ValueError, 'must be "channel" or "tensor"'),
        (lambda: galore_optax.Sign(beta=float("inf")), ValueError, "beta of Sign must be a finite"),
        (lambda: galore_optax.ErrorFeedback(1.5), ValueError, "b1 of ErrorFeedback must be in"),
    ):
        with pytest.raises(error, match=re.escape(says)):
            make()


def test_decay_rates_for_the_limiter_of_firas_code_are_found_out():
    """Those of the inner transformation, to six digits, where nobody gave them."""
    found, given = (
        galore_optax.galore(
            optax.scale_by_adam(0.8, 0.95),
            rank=2,
            residual=NormScaled(beta=4, subtract="scaled", betas=betas),
        )
        for betas in (None, (0.8, 0.95))
    )
    states = [tx.init(params()) for tx in (found, given)]
    for scale in (1.0, 3.0, 0.5):
        gradients = {"w": scale * jnp.arange(24.0).reshape(4, 6), "bias": jnp.ones(4)}
        updates = [tx.update(gradients, s) for tx, s in zip((found, given), states, strict=True)]
        states = [state for _, state in updates]
        chex.assert_trees_all_close(updates[0][0], updates[1][0], rtol=1e-5)
    momentum = optax.sgd(-1.0, momentum=0.9)
    tx = galore_optax.galore(momentum, rank=2, residual=NormScaled(subtract="scaled"))
    with pytest.raises(ValueError, match=r"could not be found out. Give betas=\(b1, b2\)"):
        tx.init(params())


def test_a_projector_needs_the_moments_that_it_reads():
    with pytest.raises(ValueError, match=r"momentum_iteration needs .* to have a first moment"):
        galore_optax.galore(
            optax.sgd(0.1), projector="momentum_iteration", projector_options={"b1": 0.9}
        )


def test_error_feedback_needs_a_first_moment_of_its_decay_rate():
    init(optax.adam(1e-3, b1=0.8), residual=galore_optax.ErrorFeedback(0.8))
    with pytest.raises(ValueError, match=r"b1 of ErrorFeedback is 0.9, and .* decay by 0.8\. Give"):
        galore_optax.galore(optax.adam(1e-3, b1=0.8), residual=galore_optax.ErrorFeedback(0.9))
    with pytest.raises(ValueError, match="needs one first moment, such as Adam's, and the inner"):
        galore_optax.galore(optax.sgd(0.1), residual=galore_optax.ErrorFeedback(0.9))
