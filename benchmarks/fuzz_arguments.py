"""Lists values of arguments, right ones and wrong ones, as code, and draws calls with them."""

import inspect

from hypothesis import strategies as st

import galore_optax

Values = dict[str, tuple[str, ...]]

_NUMBERS = "galore_optax.DimensionNumbers"
_SCHEDULES = (
    "optax.linear_schedule(1e-2, 1e-3, 8)",
    "optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)",
    "lambda step: 1e-3 / (step + 1)",
)
_MASKS = (
    "None",
    "lambda params: jax.tree.map(lambda x: x.ndim > 1, params)",
    "lambda params: jax.tree.map(lambda x: True, params)",
)

RIGHT: Values = {
    "rank": (
        *("1", "2", "3", "4", "128", "0.25", "0.5", "0.99", "np.int64(2)", "np.float32(0.5)"),
        "lambda path, shape: 2",
        "lambda path, shape: 0.5 if 'kernel' in path else 3",
        "galore_optax.RankByRole(2)",
        "galore_optax.RankByRole(0.5, {'kernel': 2.0, 'q_': 0.5})",
    ),
    "update_proj_gap": (
        *("1", "2", "3", "7", "200", "2**40", "np.int32(4)", "np.asarray(3)", "jnp.asarray(2)"),
        "lambda step: 2 + step // 4",
        "optax.linear_schedule(1, 8, 10)",
    ),
    "scale": ("0.25", "1.0", "1", "2", "-1.0", "np.float32(0.5)", "jnp.asarray(0.5)"),
    "projector": (
        *(f'"{name}"' for name in galore_optax.projectors.PROJECTORS),
        "galore_optax.projectors.eigh",
        "lambda matrix, rank: jnp.eye(matrix.shape[0], rank, dtype=matrix.dtype)",
        "lambda matrix, rank, key: jax.random.normal(key, (matrix.shape[0], rank), matrix.dtype)",
    ),
    "projector_options": ("None", "{}"),
    "projector_dtype": (
        "None",
        *(f'"{name}"' for name in ("float32", "bfloat16", "int8", "int4", "signed")),
        *('"float8_e4m3"', '"float8_e5m2"'),
    ),
    "refresh": (
        *('"periodic"', '"lazy"', "galore_optax.Lazy(threshold=0.9, queue=2)"),
        "galore_optax.Lazy(queue=1)",
    ),
    "stagger": ("True", "False", "np.bool(True)"),
    "transport": (
        *('"keep"', '"project"', '"rotate"', '"reset"', "galore_optax.Rotate(0.9, 0.999)"),
        "galore_optax.Reset(0.9, 0.999)",
        "galore_optax.Reset()",
    ),
    "residual": (
        *('"discard"', '"norm_scaled"', '"scale_gradient"', '"sign"', '"error_feedback"'),
        'galore_optax.NormScaled(beta=4.0, subtract="scaled")',
        "galore_optax.NormScaled(gamma=None)",
        'galore_optax.ScaleGradient("tensor")',
        "galore_optax.Sign(0.1)",
        "galore_optax.ErrorFeedback(b1=0.9)",
    ),
    "side": ('"short"', '"long"', '"left"', '"right"', '"both"'),
    "exclude": (
        *(
            "None",
            '"bias|norm"',
            '""',
            're.compile("KERNEL", re.I)',
            "galore_optax.DEFAULT_EXCLUDE",
        ),
        "lambda path, shape: len(shape) < 2",
        "lambda path, shape: 'kernel' in path",
        "by_path(lambda path: 'norm' in path, params)",
        "False",
        "True",
    ),
    "weight_dimension_numbers": (
        "None",
        *(f"{_NUMBERS}()", f"{_NUMBERS}(-2, -1)", f"{_NUMBERS}(1, 2)", f"{_NUMBERS}(1, 0)"),
        f"lambda path, shape: {_NUMBERS}(-1, -2) if len(shape) > 1 else None",
        f"lambda path, shape: {_NUMBERS}(0, tuple(range(1, len(shape)))) if shape[1:] else None",
        f"lambda p: jax.tree.map(lambda x: {_NUMBERS}(-2, -1) if x.ndim > 1 else None, p)",
        f"jax.tree.map(lambda x: {_NUMBERS}([0], [-1]) if x.ndim > 1 else None, params)",
        f"lambda params: {_NUMBERS}(-2, -1)",
    ),
    "accumulation_steps": ("None", "1", "2", "3"),
    "seed": ("0", "7", "np.int32(3)", "jnp.asarray(5)", "2**31", "-1"),
    "diagnostics": ("True", "False"),
    # Those of presets.
    "learning_rate": ("1e-3", "1e-2", "1", "np.float32(1e-3)", "jnp.asarray(1e-3)", *_SCHEDULES),
    "b1": ("0.9", "0.0", "0.5", "np.float32(0.9)"),
    "b2": ("0.999", "0.9", "0.5"),
    "eps": ("1e-8", "1e-6", "1e-3"),
    "eps_root": ("0.0", "1e-8"),
    "mu_dtype": ("None", '"bfloat16"', "jnp.float32", "jnp.float16"),
    "weight_decay": ("0.0", "0.1", "1e-4", *_SCHEDULES[:1]),
    "mask": _MASKS,
    "nesterov": ("True", "False"),
    "inject_learning_rate": ("True", "False"),
    "moment_dtype": ("None", '"bfloat16"', "jnp.bfloat16"),
    "tables": ('"adam"', '"factored"'),
    "block_size": ("256", "2", "16", "64"),
    "min_size": ("0", "1", "16", "4096"),
    "stacked": ("None", "lambda path, shape: 0", "lambda path, shape: int(len(shape) > 2)"),
    "momentum": ("None", "0.9", "0.0"),
    "accumulator_dtype": ("None", '"bfloat16"', "jnp.float32"),
    "min_dim_size_to_factor": ("128", "2", "4"),
    "decay_rate": ("0.8", "0.5"),
    "decay_offset": ("0", "-2"),
    "multiply_by_parameter_scale": ("True", "False"),
    "clipping_threshold": ("1.0", "None", "0.1"),
    "dtype_momentum": ("jnp.float32", "jnp.bfloat16"),
    "weight_decay_rate": ("None", "1e-3"),
    "factored": ("True", "False"),
    "weight_decay_mask": _MASKS,
    "beta": ("0.95", "0.5"),
    "ns_steps": ("5", "1"),
    "adam_b1": ("0.9", "0.5"),
    "adam_b2": ("0.999", "0.9"),
}

_NO_NUMBER = ('"0.1"', "None", "[0.1]", "object()")
_NO_RATE = ("-0.1", "1.0", "1.5", "float('nan')", *_NO_NUMBER)
_NO_BOOL = ('"yes"', "2", "None")
_NO_MASK = ('"kernel"', "3", "{'other': True}", "lambda: True")
_NO_DTYPE = ('"float31"', "3.5", "object()")
_NO_LEARNING_RATE = (*_NO_NUMBER, "lambda: 1e-3")

WRONG: Values = {
    "rank": (
        *("0", "-1", "True", "1.0", "1.5", "0.0", "float('nan')", '"8"', "None", "[2]", "2j"),
        *("jnp.asarray(2)", "np.asarray([2])", "lambda: 2", "lambda path: 2", "object()"),
        *("lambda path, shape: 0", "lambda path, shape: None", "lambda path, shape: 'a'"),
        *("lambda path, shape: 2.0", "{'kernel': 2}", "galore_optax.RankByRole"),
    ),
    "update_proj_gap": (
        *("0", "-3", "2.5", "True", '"x"', "None", "[2]", "np.asarray([1, 2])", "jnp.asarray(0)"),
        *("lambda: 2", "lambda step: 'x'", "lambda step: None", "float('nan')", "np.asarray('a')"),
        *("jnp.asarray([2])", "lambda step: jnp.ones(3)"),
    ),
    "scale": (
        *("float('nan')", "float('inf')", '"x"', "True", "None", "1j", "np.asarray([1.0, 2.0])"),
        *("np.asarray('a')", "lambda step: 1.0", "jnp.asarray([1.0])", "[1.0]"),
    ),
    "projector": ('"SVD"', '""', "None", "3", "np.ones(2)", "lambda matrix: matrix", "lambda: 1"),
    "projector_options": (
        *("{'nothing': 1}", "{'key': 1}", "3", '"iterations"', "[1]", "{1: 2}", "{'matrix': 1}"),
    ),
    "projector_dtype": ('"int3"', '"unsigned"', "3", "jnp.int8", "object()", "[]", "True"),
    "refresh": ('"always"', "True", "None", "3", "galore_optax.Lazy", "[]"),
    "stagger": ("1", '"yes"', "None", "jnp.asarray(True)", "[]"),
    "transport": ('"hold"', "True", "None", "3", "galore_optax.Rotate", "[]", "{}"),
    "residual": ('"drop"', "True", "None", "3", "galore_optax.Sign", "[]", "{}"),
    "side": ('"top"', "None", "0", "[]", "np.asarray(['left'])"),
    "exclude": (
        *('"("', "3", "{'other': True}", "lambda: True", "lambda path: True", "['kernel']", "1.0"),
        *("jax.tree.map(lambda x: 1, params)", "object()", "b'kernel'", "re.compile(b'kernel')"),
    ),
    "weight_dimension_numbers": (
        *("3", '"kernel"', "(0, 1)", "{'other': None}", "lambda: None", "lambda a, b, c: None"),
        *(f"{_NUMBERS}", "lambda path, shape: (0, 1)", "lambda params: 3", "object()"),
        *(
            f"lambda path, shape: {_NUMBERS}{axes} if len(shape) > 1 else None"
            for axes in (
                *("(0, 0)", "(0, -len(shape))", "(0, 9)", "(-9, 1)", "('a', 1)", "(0.0, 1)"),
                *("(None, 1)", "((), 1)", "(0, [])", "([0, 0], 1)", "(True, False)", "(0, 'b')"),
            )
        ),
    ),
    "accumulation_steps": ("0", "-1", "1.0", "True", '"2"', "[]", "jnp.asarray(2)"),
    "seed": ("0.5", "True", "None", '"x"', "[1]", "jnp.asarray([1, 2])", "object()"),
    "diagnostics": (*_NO_BOOL, "jnp.asarray(True)", "[]"),
    "learning_rate": _NO_LEARNING_RATE,
    "b1": _NO_RATE,
    "b2": _NO_RATE,
    "eps": _NO_NUMBER,
    "eps_root": _NO_NUMBER,
    "mu_dtype": _NO_DTYPE,
    "weight_decay": (*_NO_NUMBER, "lambda: 0.1"),
    "mask": _NO_MASK,
    "nesterov": _NO_BOOL,
    "inject_learning_rate": (*_NO_BOOL, "jnp.asarray(True)"),
    "tables": ('"rows"', "None", "True", "3", "jnp.asarray(1)", "[]"),
    "moment_dtype": ('"float16"', '"int8"', "3", "True", "jnp.int8", "object()", "[]"),
    "block_size": ("0", "3", "-2", "2.0", "None", '"64"', "jnp.asarray(64)"),
    "min_size": ("-1", "1.5", "None", '"0"', "jnp.asarray(1)"),
    "stacked": ("3", "lambda path: 0", "lambda path, shape: 9", "lambda path, shape: None", "[]"),
    "momentum": ("-0.1", "float('nan')", '"0.9"', "[0.9]"),
    "accumulator_dtype": _NO_DTYPE,
    "min_dim_size_to_factor": ("jnp.asarray(2)", '"2"', "None", "2.5", "[]"),
    "decay_rate": _NO_NUMBER,
    "decay_offset": _NO_NUMBER,
    "multiply_by_parameter_scale": _NO_BOOL,
    "clipping_threshold": ('"1"', "[1]", "0.0", "-1.0"),
    "dtype_momentum": _NO_DTYPE,
    "weight_decay_rate": ('"0.1"', "[0.1]", "object()"),
    "factored": _NO_BOOL,
    "weight_decay_mask": tuple(mask for mask in _NO_MASK if "other" not in mask),
    "beta": _NO_RATE,
    "ns_steps": ("0", "-1", "1.5", "None", '"5"'),
    "adam_b1": _NO_RATE,
    "adam_b2": _NO_RATE,
    # An argument that there is not.
    "ranks": ("2",),
}

# What arguments may be made of: its code, the argument that is wrong, and values of that.
PARTS = (
    ("galore_optax.low_bit(optax.adam(1e-3), bits={})", "bits", ("4", "None", '"8"', "8.5", "[8]")),
    ("galore_optax.low_bit(optax.adam(1e-3), block_size={})", "block_size", WRONG["block_size"]),
    ("galore_optax.low_bit(optax.adam(1e-3), min_size={})", "min_size", WRONG["min_size"]),
    ("galore_optax.low_bit(optax.adam(1e-3), stacked={})", "stacked", WRONG["stacked"]),
    ("galore_optax.low_bit(optax.adam(1e-3), seed={})", "seed", WRONG["seed"]),
    (
        "galore_optax.low_bit(optax.adam(1e-3), names={})",
        "names",
        ("3", "{'mu': 'sign'}", "['mu']", "{'mu': True}", "{3: 'signed'}", '"mu"'),
    ),
    ("galore_optax.low_bit({})", "inner", ("None", "3", "optax.adam", "optax.adam(1e-3).update")),
    ("galore_optax.galore({})", "inner", ("8", '"adam"', "optax.adam", "[optax.adam(1e-3)]")),
    ("galore_optax.limit_norm_growth({})", "gamma", ("0.5", "None", '"1"', "float('inf')", "[2]")),
    ("galore_optax.limit_norm_growth(stacked={})", "stacked", WRONG["stacked"]),
    *(
        (
            f"galore_optax.galore(optax.scale_by_adam(), {argument}=galore_optax.{part})",
            name,
            values,
        )
        for argument, part, name, values in (
            ("residual", "Sign(beta={})", "beta", (*_NO_NUMBER, "float('nan')", "True")),
            ("residual", "NormScaled(beta={})", "beta", (*_NO_NUMBER, "float('inf')")),
            ("residual", "NormScaled(gamma={})", "gamma", ("0.5", '"1"', "True", "[1.01]")),
            ("residual", "NormScaled(subtract={})", "subtract", ('"half"', "None", "[]")),
            (
                *("residual", 'NormScaled(subtract="scaled", betas={})', "betas|b2"),
                ("0.9", "(0.9,)", "(0.9, 1.5)", "('a', 'b')", "(0.9, 0.99, 0.999)", "[0.9, None]"),
            ),
            ("residual", "ScaleGradient({})", "per", ('"row"', "None", "1", "[]")),
            ("residual", "ScaleGradient(gamma={})", "gamma", ("0.0", '"1"', "float('nan')")),
            ("residual", "ErrorFeedback({})", "b1", ("-0.1", "1.0", '"0.9"', "[0.9]", "True")),
            ("transport", "Rotate({}, 0.999)", "b1", ("-0.1", "1.0", '"0.9"', "[0.9]", "True")),
            ("transport", "Rotate(0.9, {})", "b2", ("-0.1", "1.0", '"0.9"', "[0.9]", "None")),
            ("transport", "Reset({}, 0.999)", "b1", ("-0.1", "1.0", '"0.9"', "[0.9]", "True")),
            ("transport", "Reset(0.9, {})", "b2", ("2.0", "float('nan')", '"0.9"', "None")),
            ("refresh", "Lazy(threshold={})", "threshold", ("0.0", '"a"', "2.0", "None", "[0.4]")),
            ("refresh", "Lazy(queue={})", "queue", ("0", "1.5", "None", '"5"', "[5]")),
            ("rank", "RankByRole({})", "rank", WRONG["rank"][:-2]),
            (
                *("rank", "RankByRole(2, {})", "factors"),
                ("None", "3", "{'(': 1.0}", "{'k': 0}", "{'k': 'a'}", "{3: 1.0}", "['k']"),
            ),
        )
    ),
)

PRESETS = tuple(
    name
    for name in galore_optax.__all__
    if inspect.isfunction(made := getattr(galore_optax, name))
    and "learning_rate" in inspect.signature(made).parameters
    and name != "learning_rate_from_adamw"
)


def names_of(function: str) -> tuple[str, ...]:
    """Returns the names of the arguments of galore, or of a preset, that have values here."""
    names = inspect.signature(getattr(galore_optax, function)).parameters
    return tuple(name for name in names if name in RIGHT)


@st.composite
def calls(
    draw: st.DrawFn, function: str, most: int = 5, wrong: str | None = None, inner: str = ""
) -> str:
    """Draws a call of galore or of a preset.

    Args:
      draw: what draws.
      function: the name.
      most: how many arguments are drawn, at most, beside the learning rate.
      wrong: the argument whose value is a wrong one.
      inner: the code of the inner transformation of galore.

    Returns:
      Its code.
    """
    names = [name for name in names_of(function) if name not in ("learning_rate", wrong)]
    # Small ones, lest all leaves be too small for the default.
    chosen = {"rank"} if "rank" in names and draw(st.integers(0, 9)) else set()
    chosen |= set(draw(st.lists(st.sampled_from(names), max_size=most, unique=True)))
    given = {name: draw(st.sampled_from(RIGHT[name])) for name in sorted(chosen)}
    if wrong is not None:
        given[wrong] = draw(st.sampled_from(WRONG[wrong]))
    first = [inner] if inner else []
    if function != "galore":
        first = [given.pop("learning_rate", None) or draw(st.sampled_from(RIGHT["learning_rate"]))]
    arguments = ", ".join((*first, *(f"{name}={code}" for name, code in given.items())))
    return f"galore_optax.{function}({arguments})"
