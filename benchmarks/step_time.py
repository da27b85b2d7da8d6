"""Time of an optimizer step beside optax.adamw and optax.contrib.galore, in one run.

    python -m benchmarks.step_time --model 60m --steps 30
    python -m benchmarks.step_time --model 350m --steps 12 --baselines optax.contrib.galore \
        --peers "same sides" power_iteration "power_iteration, staggered" rows "rows, staggered"

Each peer takes turns with the baselines, step by step, so that a drift of the machine's speed
hits all alike, and ratios are medians over neighbouring steps; one peer at a time, so that memory
holds the states of the baselines and of one peer (name fewer baselines where that is too much).
Weight decay is on everywhere, and all project the same leaves at the same rank. What is written:

- `ordinary`: a step on which no projector is refreshed, median; the ratios beside are of these.
- `refresh`: a step on which all are. The median of those after the first, or the first, where one
  takes seconds and where there is no other.
- `mean`: ordinary + (refresh - ordinary) / 200, what a step costs on average at T = 200. Staggered,
  from the steps measured: ordinary + extra time per refreshed matrix * matrices / 200.
- `spike`: the longest step over the median step. Staggered, of the steps measured, which are
  some in a row out of the period of 200, with their share of refreshes; else refresh / ordinary.
- `noise`: the longest ordinary step over their median, which is the machine's doing.

"same sides" projects the sides that `optax.contrib.galore` projects, the long ones and the rows of
a square matrix: `side="long"` with `side="left"` for square leaves, by `optax.partition`. It is
the comparison of equal arithmetic on ordinary steps; its projector is power_iteration, to have its
bases soon. The other peers project the published side, `"short"`. "torch" is GaLore's AdamW in
eager PyTorch, where that is installed. Presets of the library, such as `fira_adamw`, are peers too,
at the same rank, with their own projectors and gaps (Flora's is 1000):

    python -m benchmarks.step_time --model 60m --peers galore_adamw fira_adamw apollo_adamw ldadamw

Gradients are independent normal numbers, the same on every step: benchmarks/projectors.py has the
time of a basis of matrices with the spectrum of real gradients.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import optax

import galore_optax
from benchmarks.machine import machine
from benchmarks.runs import OptaxRun, Run, paired_ratio, refresh_times, take_turns
from benchmarks.shapes import (
    PROJECTORS,
    RANKS,
    is_projected,
    matrices,
    normal_like,
    unstacked_llama,
)

GAP = 200
RATE, DECAY = 1e-3, 0.1
CONTRIB, ADAMW = "optax.contrib.galore", "optax.adamw"
BASELINES = (ADAMW, CONTRIB)
STAGGERED = ("power_iteration, staggered", "rows, staggered")
COLUMNS = (
    ("ordinary", "ordinary_ms", ".1f"),
    ("/contrib", "ratio_to_contrib", ".3f"),
    ("/adamw", "ratio_to_adamw", ".3f"),
    ("refresh", "refresh_ms", ".0f"),
    ("mean", "mean_ms", ".1f"),
    ("/contrib", "mean_ratio_to_contrib", ".3f"),
    ("/adamw", "mean_ratio_to_adamw", ".3f"),
    ("spike", "spike", ".2f"),
    ("noise", "noise", ".2f"),
    ("compile", "compile_ms", ".0f"),
    ("bytes", "state_bytes", ".3g"),
)
# Presets of the library; those that choose subspaces on every step have no other ones.
FAMILY = (
    *("galore_adamw", "galore_adamw_8bit", "fira_adamw", "apollo_adamw", "apollo_mini_adamw"),
    *("ldadamw", "tracked_adamw", "frugal_adamw", "grass_adamw", "dct_adamw", "flora"),
    "galore_muon",
)
PEERS = ("same sides", *PROJECTORS, *STAGGERED, "torch", *FAMILY)


def make_run(name: str, params: Any, gradients: Any, rank: int) -> Run:
    """The optimizer of that name, compiled, at its first step."""
    projected = jax.tree_util.tree_map_with_path(is_projected, params)
    if name == "torch":
        from benchmarks import torch_galore

        return torch_galore.TorchRun(params, projected, torch_galore.Settings(rank, RATE, DECAY))
    return OptaxRun(make_optimizer(name, params, projected, rank), params, gradients)


def make_optimizer(
    name: str, params: Any, projected: Any, rank: int
) -> optax.GradientTransformation:
    """The optimizer of that name, which projects these leaves."""
    adamw = optax.adamw(RATE, weight_decay=DECAY)
    ours = functools.partial(galore_optax.galore, adamw, rank=rank, update_proj_gap=GAP)
    if name == ADAMW:
        return adamw
    if name == CONTRIB:
        numbers = optax.contrib.GaLoreDimensionNumbers()
        return optax.contrib.galore(
            RATE,
            rank=rank,
            # Its first step refreshes, and no other: it takes more than GAP steps here.
            update_proj_gap=2**30,
            scale=0.25,
            weight_decay=DECAY,
            weight_dimension_numbers=jax.tree.map(lambda p: numbers if p else None, projected),
        )
    if name == "same sides":
        squares = jax.tree.map(lambda leaf: leaf.shape[0] == leaf.shape[-1], params)
        ours = functools.partial(ours, projector="power_iteration")
        return optax.partition({True: ours(side="left"), False: ours(side="long")}, squares)
    if name in FAMILY:
        own = {} if name == "apollo_mini_adamw" else {"rank": rank}
        return getattr(galore_optax, name)(RATE, weight_decay=DECAY, **own)
    projector, _, staggered = name.partition(", ")
    return ours(projector=projector, stagger=bool(staggered))


def measure(
    model: str,
    steps: int,
    peers: list[str],
    baselines: list[str],
    seed: int = 0,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Runs the comparison and returns what is written as JSON; times in milliseconds.

    What there is after each peer is given to `save`.
    """
    if not 0 < steps < GAP // 2:
        raise SystemExit(f"steps must be 1 to {GAP // 2 - 1}, less than a period; got {steps}")
    keys = jax.random.split(jax.random.key(seed))
    params, gradients = (normal_like(unstacked_llama(model), key) for key in keys)
    rank, count = RANKS[model], sum(matrices(model).values())
    if "torch" in peers and not torch_is_available():
        print("torch is left out: PyTorch is not installed for this device", flush=True)
        peers = [name for name in peers if name != "torch"]
    fixed: dict[str, Run] = {}
    rows: dict[str, Any] = {}

    def start(name: str) -> Run:
        nonlocal params
        run = make_run(name, params, gradients, rank)
        params, refreshes = refresh_times(
            run, params, gradients, most=0 if name in STAGGERED else 3
        )
        rows[name] = {"first_step_ms": refreshes[0], "compile_ms": run.compile_ms}
        rows[name]["state_bytes"] = run.state_bytes
        rows[name]["refresh_ms"] = statistics.median(refreshes[1:] or refreshes)
        print(f"{name}: first step {refreshes[0]:.0f} ms", flush=True)
        return run

    def turns(name: str | None) -> None:
        nonlocal params
        runs = fixed if name is None else {**fixed, name: start(name)}
        params, times, refreshed = take_turns(runs, params, gradients, steps)
        for each in [name] if name else fixed:
            summarize(rows, each, times, refreshed[each], count)

    result = {
        "benchmark": "step_time",
        "machine": machine(),
        "model": model,
        "rank": rank,
        "matrices": count,
        "update_proj_gap": GAP,
        "steps": steps,
        "optimizers": rows,
    }
    for name in baselines:
        fixed[name] = start(name)
    for name in (None, *peers):
        turns(name)
        save(result)
    return result


def torch_is_available() -> bool:
    """Whether PyTorch is installed, for the device that JAX computes on."""
    if importlib.util.find_spec("torch") is None:
        return False
    from benchmarks import torch_galore

    return torch_galore.computes_where_jax_does()


def summarize(
    rows: dict[str, Any], name: str, times: dict[str, list[float]], refreshed: list[int], count: int
) -> None:
    """Adds to a row what steps in turns with the baselines say, `count` matrices refreshed or not.

    `times` has the baselines first, whose own rows are complete where this is the row of a peer.
    """
    row, mine = rows[name], times[name]
    # All steps, where there are more matrices than steps in a period.
    plain = [i for i, number in enumerate(refreshed) if number == 0] or range(len(mine))
    ordinary = statistics.median(mine[i] for i in plain)
    noise = max(mine[i] for i in plain) / ordinary
    if name == ADAMW:
        row["refresh_ms"], mean, spike = None, ordinary, noise
    elif any(refreshed):
        extra = sum(mine[i] - ordinary for i, number in enumerate(refreshed) if number)
        mean = ordinary + extra / sum(refreshed) * count / GAP
        spike = max(mine) / statistics.median(mine)
        row |= {"times_ms": mine, "refreshed": refreshed}
        busy = [t for t, number in zip(mine, refreshed, strict=True) if number]
        row["refreshing_step_ms"] = statistics.median(busy)
    else:
        mean = ordinary + (row["refresh_ms"] - ordinary) / GAP
        spike = row["refresh_ms"] / ordinary
    row |= {"ordinary_ms": ordinary, "mean_ms": mean, "spike": spike, "noise": noise}
    for baseline, short in {CONTRIB: "contrib", ADAMW: "adamw"}.items():
        if baseline not in times:
            continue
        theirs = times[baseline]
        ratio = paired_ratio([mine[i] for i in plain], [theirs[i] for i in plain])
        their_ordinary = statistics.median(theirs)
        their_refresh = rows[baseline]["refresh_ms"] if baseline == CONTRIB else their_ordinary
        their_mean = their_ordinary + (their_refresh - their_ordinary) / GAP
        row |= {f"ratio_to_{short}": ratio, f"mean_ratio_to_{short}": mean / their_mean}


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [
        f"LLaMA-{result['model']}, rank {result['rank']}, T = {GAP}; times in ms",
        f"{'':28}" + "".join(f"{head:>10}" for head, _, _ in COLUMNS),
    ]
    for name, row in result["optimizers"].items():
        cells = ("" if row.get(key) is None else f"{row[key]:{form}}" for _, key, form in COLUMNS)
        lines.append(f"{name:28}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RANKS, default="60m")
    parser.add_argument("--steps", type=int, default=30, help="of each optimizer beside each peer")
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=(*PEERS, *BASELINES),
        default=[name for name in PEERS if name not in FAMILY],
    )
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=[*BASELINES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    peers = [name for name in args.peers if name not in args.baselines]

    def save(result: dict[str, Any]) -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")

    result = measure(args.model, args.steps, peers, args.baselines, args.seed, save)
    print(f"\n{table(result)}")


if __name__ == "__main__":
    main()
