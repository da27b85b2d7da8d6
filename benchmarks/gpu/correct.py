"""Whether what is computed on the GPU is right: each item compares it with something else."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import galore_optax
from benchmarks.gpu.record import ROOT
from benchmarks.gpu.stage import SHARED_DEVICE, Item, Size, Unavailable
from examples.flax_llama.config import LlamaConfig, UsageError
from examples.flax_llama.loss import loss_sum
from examples.flax_llama.model import Llama

TRAJECTORIES = ROOT / "tests" / "data" / "galore_adamw.npz"
# Of the weights after each step, by weight decay: the reference decays the updated weight.
BOUNDS = {0.0: 2e-6, 0.1: 2e-4}
# Shapes and rank: of cuSOLVER's algorithms that for small matrices, and that beyond 1024 rows or
# columns, of wide and of square ones.
SVD: tuple[list[tuple[int, int]], int] = ([(512, 1024), (1024, 2752), (1280, 1280)], 256)
TINY_SVD: tuple[list[tuple[int, int]], int] = ([(24, 40), (32, 32)], 8)
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}


def items(size: Size) -> list[Item]:
    """What is compared, the quickest first."""
    return [
        Item("reference trajectories", lambda _: trajectories(), 90),
        Item("codes as on the CPU", lambda _: codes(size.of(2**20, 2**13)), 60),
        Item("one compilation", lambda _: one_compilation(size), 60),
        Item("svd against float64", lambda _: svd(*size.of(SVD, TINY_SVD)), 120),
        Item("cuDNN attention against XLA's", lambda _: attention(size), 120),
        Item(
            "killed and resumed",
            lambda _: killed_and_resumed(size),
            240,
            environment=SHARED_DEVICE | ({} if size.rehearsal else DETERMINISTIC),
        ),
    ]


def describe(name: str, result: dict[str, Any]) -> str:
    return f"{'passed' if result['passed'] else 'NOT PASSED'}: {result['says']}"


def trajectories() -> dict[str, Any]:
    """Errors of the weights along the trajectories of the PyTorch reference (tests/data).

    At the highest precision of products they have to be within the bounds of the tests; at the
    device's own, which on a GPU rounds operands to TF32, they are reported.
    """
    reference = np.load(TRAJECTORIES)
    errors: dict[str, dict[str, float]] = {}
    worst: dict[tuple[str, float], float] = {}
    for precision in ("highest", "default"):
        with jax.default_matmul_precision(precision):
            for decay in BOUNDS:
                found = _errors(reference, decay)
                errors[f"{precision}, weight decay {decay}"] = found
                worst[precision, decay] = max(found.values())
    return {
        "errors": errors,
        "bounds": {str(decay): bound for decay, bound in BOUNDS.items()},
        "passed": all(worst["highest", decay] <= bound for decay, bound in BOUNDS.items()),
        "says": "largest error {:.1e}, with weight decay {:.1e}; at the default precision {:.1e} "
        "and {:.1e}".format(*worst.values()),
    }


def _errors(reference: Any, decay: float) -> dict[str, float]:
    """The largest error of each case, all of which are trained as leaves of one tree."""
    cases = ("tall", "wide", "square")
    ranks = {case: int(reference[f"{case}_meta"][0]) for case in cases}
    (gap,) = {int(reference[f"{case}_meta"][1]) for case in cases}
    tx = galore_optax.galore_adamw(
        0.02,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=decay,
        rank=lambda path, shape: ranks[path],
        update_proj_gap=gap,
    )

    def step(carry, gradient):
        weights, state = carry
        updates, state = tx.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, state), weights

    @jax.jit
    def run(weights, gradients):
        return jax.lax.scan(step, (weights, tx.init(weights)), gradients)[1]

    weights, gradients = (
        {case: jnp.asarray(reference[f"{case}_{which}"]) for case in cases} for which in ("W0", "G")
    )
    return {
        case: float(np.abs(trajectory - reference[f"{case}_wd{decay}_traj"]).max())
        for case, trajectory in run(weights, gradients).items()
    }


def codes(count: int) -> dict[str, Any]:
    """Codes made from the same float32 numbers on the device and on the CPU.

    They have to be the same, or neighbours where a number lies between two codes: a device may
    round a division in another way.
    """
    rng = np.random.default_rng(0)
    # Over eight decades, as moments are.
    spread = (rng.standard_normal(count) * 10 ** rng.uniform(-8, 0, count)).astype(np.float32)
    numbers = spread.reshape(-1, 256)
    rows = {}
    for scheme in ("signed", "unsigned", "int8", "int4"):
        make = jax.jit(functools.partial(galore_optax.quantize, scheme=scheme))
        here, there = (
            jax.device_get(make(jax.device_put(numbers, device)))
            for device in (jax.devices()[0], jax.devices("cpu")[0])
        )
        apart = np.abs(_each_code(here).astype(int) - _each_code(there).astype(int))
        rows[scheme] = {
            "numbers": int(apart.size),
            "differ": int(np.sum(apart > 0)),
            "codes_apart_at_most": int(apart.max()),
            "scales_differ": int(np.sum(here.scales != there.scales)),
        }
    differ = {scheme: row["differ"] for scheme, row in rows.items()}
    return {
        "schemes": rows,
        # One in a thousand at most, for what may be called a rounding.
        "passed": all(
            row["codes_apart_at_most"] <= 1 and row["differ"] <= row["numbers"] / 1000
            for row in rows.values()
        ),
        "says": f"of {count:,} codes differ, each by one neighbour at most: {differ}",
    }


def _each_code(quantized: galore_optax.QuantizedArray) -> np.ndarray:
    codes = np.asarray(quantized.codes)
    return np.stack([codes & 15, codes >> 4]) if quantized.scheme == "int4" else codes


def one_compilation(size: Size) -> dict[str, Any]:
    """Fifty steps with refreshes between them, whose program must be compiled once."""
    layers, m, n = size.of((4, 512, 1376), (2, 16, 24))
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    params = {"stack": jnp.ones((layers, m, n)), "bias": jnp.ones(n)}
    tx = galore_optax.galore_adamw_8bit(
        1e-3,
        rank=m // 4,
        update_proj_gap=10,
        weight_dimension_numbers={"stack": galore_optax.DimensionNumbers(1, 2), "bias": None},
    )
    traced = 0

    @jax.jit
    def step(params, state, key):
        nonlocal traced
        traced += 1
        gradient = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.block_until_ready(list(jax.random.split(jax.random.key(0), 50)))
    state = tx.init(params)
    params, state = jax.block_until_ready(step(params, state, keys[0]))
    compiled.clear()
    for key in keys[1:]:
        params, state = step(params, state, key)
    jax.block_until_ready(params)
    later, refreshes = len(compiled), int(galore_optax.metrics(state)["refreshes"])
    return {
        "traced": traced,
        "compiled_after_the_first_step": later,
        "refreshes": refreshes,
        "passed": traced == 1 and later == 0 and refreshes == 5 * layers,
        "says": f"traced {traced} time, {refreshes} refreshes of {layers} matrices in 50 steps",
    }


def svd(shapes: list[tuple[int, int]], rank: int) -> dict[str, Any]:
    """The library's exact projector and each algorithm of JAX against NumPy in float64.

    An algorithm may be right for one spectrum and wrong for another, or for square matrices alone:
    on an H100 (jax 0.11.2) the polar decomposition is for 4096 x 11008, but not for 4096 x 4096,
    and not where singular values fall geometrically. So there are several of both.
    """
    algorithms = jax.lax.linalg.SvdAlgorithm

    def of_jax(algorithm):
        return lambda x: jax.lax.linalg.svd(x, full_matrices=False, algorithm=algorithm)[0]

    ways = {
        "galore_optax": jax.jit(lambda x: galore_optax.projectors.svd(x, rank)),
        "polar": jax.jit(of_jax(algorithms.POLAR)),
        "QR": jax.jit(of_jax(algorithms.QR)),
    }
    matrices: dict[str, Any] = {}
    for m, n in shapes:
        for spectrum, values in spectra(m, rank).items():
            matrices[f"{m}x{n}, {spectrum}"] = _each_algorithm(ways, m, n, values, rank)
    worst = {
        name: min(
            (row[name].get("energy_over_the_most", np.nan) for row in matrices.values()),
            key=lambda energy: -abs(energy - 1),
        )
        for name in ways
    }
    ours = [row["galore_optax"] for row in matrices.values()]
    return {
        "rank": rank,
        "matrices": matrices,
        "passed": all(
            abs(row["energy_over_the_most"] - 1) < 1e-5 and row["orthogonality_error"] < 1e-4
            for row in ours
        ),
        "says": ", ".join(f"{name} {energy:.7f}" for name, energy in worst.items())
        + f" of the most energy, the worst of {len(matrices)} matrices",
    }


def spectra(m: int, rank: int) -> dict[str, np.ndarray]:
    """Singular values by which algorithms are told apart, falling."""
    number = np.arange(m)
    return {
        "geometric": 0.99**number,
        # About that of real gradients (refresh.example).
        "power": 1 / (1 + number),
        # Some of the directions asked for exist, the others are of nothing but rounding errors.
        "low rank": (number < rank // 2).astype(float),
    }


def _each_algorithm(ways: Any, m: int, n: int, values: np.ndarray, rank: int) -> dict[str, Any]:
    """What each algorithm makes of an (m, n) matrix, m <= n, with these singular values."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((k, m)))[0] for k in (m, n))
    matrix = ((left * values) @ right.T).astype(np.float32)
    wanted = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)[0][:, :rank]
    most = np.sum((wanted.T @ matrix) ** 2)
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            basis = np.asarray(way(jnp.asarray(matrix)), np.float64)[:, :rank]
        except (NotImplementedError, jax.errors.JaxRuntimeError, ValueError) as error:
            rows[name] = {"unavailable": str(error).splitlines()[0][:200]}
            continue
        outside = basis - wanted @ (wanted.T @ basis)
        rows[name] = {
            "energy_over_the_most": float(np.sum((basis.T @ matrix) ** 2) / most),
            # Of a low rank it says nothing, since the last directions are any.
            "part_outside_the_subspace": float(np.linalg.norm(outside) / np.sqrt(rank)),
            "orthogonality_error": float(np.abs(basis.T @ basis - np.eye(rank)).max()),
        }
    return rows


def attention(size: Size) -> dict[str, Any]:
    """Loss and gradients of a bfloat16 model with cuDNN's attention, with XLA's, and in float32.

    cuDNN's may be no further from float32 than twice what XLA's is.
    """
    width, heads, seq, rows = size.of((512, 8, 256, 8), (32, 2, 16, 2))
    shared: dict[str, Any] = {"hidden": width, "intermediate": 2 * width, "layers": 2}
    shared |= {"heads": heads, "vocab_size": 1000, "max_seq": seq}
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1000, size=(rows, seq + 1)))

    def gradient(dtype: str, implementation: str) -> Any:
        config = LlamaConfig(**shared, dtype=dtype, attention=implementation)
        graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(0)), nnx.Param)

        def loss(params):
            mask = jnp.ones((rows, seq), bool)
            return loss_sum(nnx.merge(graphdef, params), tokens, mask) / mask.size

        return jax.jit(jax.grad(loss))(params)

    try:
        fused = gradient("bfloat16", "cudnn")
    except UsageError as error:
        raise Unavailable(str(error)) from None
    exact, plain = gradient("float32", "xla"), gradient("bfloat16", "xla")

    def distance(found: Any) -> float:
        apart = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, found, exact)
        return float(optax.tree.norm(apart) / optax.tree.norm(exact))

    errors = {"cudnn": distance(fused), "xla": distance(plain)}
    return {
        "relative_error_of_the_gradient": errors,
        "passed": errors["cudnn"] <= 2 * errors["xla"],
        "says": f"gradient off by {errors['cudnn']:.2e} with cuDNN's, {errors['xla']:.2e} with "
        "XLA's, both in bfloat16",
    }


def killed_and_resumed(size: Size) -> dict[str, Any]:
    """The application, killed several times, beside a run that is left alone: the same bits."""
    from benchmarks import kill_resume

    kills, steps = size.of((3, 600), (1, 60))
    with tempfile.TemporaryDirectory() as directory:
        result = kill_resume.measure(0, Path(directory), kills=kills, steps=steps)
    passed = result["same_metrics"] and result["same_parameters"]
    return result | {
        "passed": passed,
        "says": f"{kills} kills; metrics and parameters are {'' if passed else 'NOT '}those of a "
        "run that was left alone, to the bit",
    }
