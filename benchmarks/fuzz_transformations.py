"""Draws transformations, as code: galore or a preset, what is inside of it and what is around."""

from hypothesis import strategies as st

from benchmarks.fuzz_arguments import PRESETS, calls, names_of

INNERS = (
    *(
        "optax.adamw(1e-3)",
        "optax.scale_by_adam()",
        "optax.sgd(0.1)",
        "optax.sgd(0.1, momentum=0.9)",
    ),
    *(
        "optax.adam(1e-3, nesterov=True)",
        "optax.lion(1e-4)",
        "optax.rmsprop(1e-3)",
        "optax.yogi(1e-3)",
    ),
    *("optax.adagrad(0.1)", "optax.adabelief(1e-3)", "optax.amsgrad(1e-3)", "optax.adamax(1e-3)"),
    *(
        "optax.lamb(1e-3)",
        "optax.novograd(1e-3)",
        "optax.lars(0.1)",
        "optax.sm3(0.1)",
        "optax.adan(1e-3)",
    ),
    *("optax.radam(1e-3)", "optax.rprop(1e-3)", "optax.identity()", "optax.trace(0.9)"),
    "optax.adafactor(1e-3, min_dim_size_to_factor=2)",
    "optax.contrib.muon(1e-3)",
    "optax.contrib.ademamix(1e-3)",
    "optax.contrib.prodigy(1e-3)",
    "optax.contrib.schedule_free_adamw(1e-3)",
    "optax.contrib.dadapt_adamw(1e-3)",
    "optax.noisy_sgd(0.1)",
    "optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-1e-3))",
    "optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam())",
    "optax.chain(optax.clip_by_block_rms(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, 9)))",
    "optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1e-2, 0.0, 9))",
    "optax.apply_if_finite(optax.adamw(1e-3), 3)",
    "optax.masked(optax.adamw(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))",
    "optax.partition({'a': optax.adamw(1e-3), 'b': optax.sgd(0.1)}, "
    "lambda p: jax.tree.map(lambda x: 'a' if x.ndim > 1 else 'b', p))",
    "optax.adaptive_grad_clip(0.1)",
    "optax.ema(0.9)",
    "galore_optax.low_bit(optax.adamw(1e-3), min_size=0)",
    "galore_optax.low_bit(optax.scale_by_adam(), bits=16, min_size=0)",
    "galore_optax.low_bit(optax.lion(1e-3), block_size=16, min_size=0)",
    "galore_optax.chain(galore_optax.limit_norm_growth(), optax.scale_by_adam())",
    "galore_optax.adamw_8bit(1e-3, min_size=0)",
    "optax.MultiSteps(optax.adamw(1e-3), 2)",
    "optax.apply_every(2)",
)

_NDIM = "lambda p: jax.tree.map(lambda x: x.ndim > 1, p)"
_LABELS = "lambda p: by_path(lambda path: 'a' if 'k' in path else 'b', p)"

# TX stands for what is wrapped.
WRAPPERS = (
    "optax.chain(optax.clip_by_global_norm(1.0), TX)",
    "galore_optax.chain(optax.clip_by_global_norm(1.0), TX)",
    "galore_optax.chain(TX, optax.add_decayed_weights(0.1), optax.scale(0.5))",
    "galore_optax.chain(TX, optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 5)))",
    f"optax.masked(TX, {_NDIM})",
    f"optax.partition({{'a': TX, 'b': optax.sgd(0.1)}}, {_LABELS})",
    f"optax.partition({{'a': optax.set_to_zero(), 'b': TX}}, {_LABELS})",
    f"optax.partition({{'a': galore_optax.galore_lion(1e-4, rank=2), 'b': TX}}, {_LABELS})",
    "optax.MultiSteps(TX, 2)",
    "optax.MultiSteps(TX, 3).gradient_transformation()",
    "optax.apply_if_finite(TX, 3)",
    "optax.with_extra_args_support(TX)",
    "galore_optax.low_bit(TX, min_size=0)",
    "galore_optax.galore(TX, rank=2)",
    "optax.flatten(TX)",
    "optax.contrib.schedule_free(TX, 1e-3)",
    "optax.conditionally_transform(TX, lambda step: step >= 0)",
    "optax.inject_hyperparams(lambda learning_rate: optax.chain(TX, optax.scale(learning_rate)))"
    "(learning_rate=optax.linear_schedule(1.0, 0.0, 5))",
)

# What Optax has in the place of presets that may do without parameters.
NEED_NO_PARAMS = {
    "galore_sgd": "optax.sgd(1e-3)",
    "galore_adafactor": "optax.adafactor(1e-3, multiply_by_parameter_scale=False)",
}


@st.composite
def transformations(draw: st.DrawFn) -> dict[str, str]:
    """Draws a transformation: galore or a preset, with right arguments, in up to two wrappers.

    Returns:
      The fields of a `Configuration` but the parameters.
    """
    plain, kind = "optax.adamw(1e-3)", draw(st.integers(0, 19))
    if kind == 0:
        plain = draw(st.sampled_from(INNERS))
        tx = f"galore_optax.chain({draw(calls('galore'))}, {plain})"
    elif kind < 8:
        plain = draw(st.sampled_from(INNERS))
        tx = draw(calls("galore", inner=plain))
    else:
        preset = draw(st.sampled_from(PRESETS))
        plain = NEED_NO_PARAMS.get(preset, plain)
        tx = draw(calls(preset))
        if kind == 8:
            static = {*names_of(preset)} - {"learning_rate", "weight_decay", "scale"}
            called = f"optax.inject_hyperparams(galore_optax.{preset}, {sorted(static)})"
            tx = tx.replace(f"galore_optax.{preset}", called)
            plain = "optax.inject_hyperparams(optax.adamw)(1e-3)"
    around = "TX"
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 1, 2)))):
        around = draw(st.sampled_from(WRAPPERS)).replace("TX", around)
    return {"tx": tx, "plain": plain, "around": around}
