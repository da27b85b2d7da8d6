"""Writes the tables of measurements in docs/ from the committed figures.

python -m benchmarks.site_tables

Each stands between two comments that name it. What is measured is in benchmarks/results.
"""

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.report import plus_minus

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
# A table on a page: its name in the comments, and what is between them.
TABLE = re.compile(
    r"(<!-- (\w+): made by python -m benchmarks\.site_tables -->\n\n)(.*?)(<!-- end: \2 -->\n)",
    re.DOTALL,
)
# How contenders of benchmarks/quality are called in the library.
PRESETS = {
    "adamw": "AdamW",
    "galore": "`galore_adamw`",
    "tracked": "`tracked_adamw`",
    "ldadam, no feedback": "`ldadamw`, scale 0.25",
    "fira": "`fira_adamw`",
    "apollo": "`apollo_adamw`",
    "apollo-mini": "`apollo_mini_adamw`, rank 1",
    "frugal": "`frugal_adamw`",
}
CONTRIB = "optax.contrib.galore"
BASELINES = (CONTRIB, "optax.adamw")
# How benchmarks/gpu calls them, where that is another name.
ON_GPU = {
    "AdamW": "adamw, float32 moments",
    "`galore_adamw`": "galore power_iteration",
    "`galore_adamw_8bit`": "galore power_iteration, 8-bit",
}
# Names of what is no preset of the library.
ONLY_THERE = {"adamw": "AdamW", "lora": "LoRA"}


def read(name: str) -> dict[str, Any]:
    """The figures of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def projectors() -> str:
    """Validation loss by projector and gap, from the lowest."""
    rows = sorted(
        read("refresh_quality")["summary"].items(), key=lambda x: x[1]["percent_over_svd"]
    )
    cells = [
        [called(name), f"{row['setting']['lr']:g}", f"{row['loss']:.3f}", over_svd(row)]
        for name, row in rows
    ]
    return markdown(["", "learning rate", "validation loss", "over `svd`, T = 50, %"], cells)


def called(name: str) -> str:
    """What the page calls a setting of benchmarks/refresh_quality."""
    first, *rest = name.split(", ")
    first = "AdamW, with its own rates" if first == "adamw" else f"`{first}`"
    return ", ".join([first, *(word.replace("T=", "T = ") for word in rest)])


def over_svd(row: dict[str, Any]) -> str:
    return f"{row['percent_over_svd']:+.2f} ± {row['percent_over_svd_error']:.2f}"


def optimizers() -> str:
    """Validation loss over AdamW's by optimizer, and a column for each width and rank."""
    cells = [*read("quality")["summary"]["cells"], *read("quality_60m")["summary"]["cells"]]
    found = [{row["contender"]: row for row in cell["rows"]} for cell in cells]
    head = [f"width {cell['hidden']}, rank {cell['rank']}" for cell in cells]
    rows = []
    for name, preset in PRESETS.items():
        values = [
            plus_minus(rows_of[name]["over_adamw"], 2, signed=True) if name in rows_of else ""
            for rows_of in found
        ]
        rows.append([preset, *values])
    return markdown(["", *head], rows)


def steps(model: str) -> Callable[[], str]:
    """Time of a step at a model's shapes, a row for each optimizer."""

    def table() -> str:
        result = read(f"step_time_{model}_cpu")
        rows = [
            [
                {"torch": "GaLore in eager PyTorch"}.get(name, name),
                f"{row['ordinary_ms']:,.0f}",
                "1.00" if name == CONTRIB else f"{row['ratio_to_contrib']:.2f}",
                "-" if row["refresh_ms"] is None else f"{row['refresh_ms']:,.0f}",
                f"{row['mean_ms']:,.0f}",
                "1.00" if name == CONTRIB else f"{row['mean_ratio_to_contrib']:.2f}",
                f"{row['spike']:.1f}",
                f"{row['state_bytes'] / 1e6:,.0f}",
            ]
            for name, row in result["optimizers"].items()
        ]
        head = ["", "ordinary", "/ contrib", "refresh of all", "mean, T = 200", "/ contrib"]
        return markdown([*head, "max / median", "state, MB"], rows)

    return table


def presets() -> str:
    """Mean time of a step by preset, over that of optax.adamw, from the fastest."""
    found = read("step_time_60m_presets_cpu")["optimizers"]
    rows = sorted(
        (row["mean_ratio_to_adamw"], row["state_bytes"], name)
        for name, row in found.items()
        if name != "optax.adamw"
    )
    return markdown(
        ["", "mean step / AdamW's", "state, MB"],
        [[f"`{name}`", f"{ratio:.2f}", f"{size / 1e6:,.0f}"] for ratio, size, name in rows],
    )


def measured() -> str:
    """What was measured of each preset: a loss, and times and bytes at two sizes."""
    [cell] = [
        cell
        for cell in read("quality")["summary"]["cells"]
        if (cell["hidden"], cell["rank"]) == (128, 32)
    ]
    losses = {PRESETS[row["contender"]]: row for row in cell["rows"] if row["contender"] in PRESETS}
    on_cpu = read("step_time_60m_presets_cpu")["optimizers"]
    on_gpu = read("gpu/step")["items"]
    rows = []
    for name in ("AdamW", *(f"`{name}`" for name in on_cpu if name not in BASELINES)):
        loss = (
            losses.get(name) or losses.get(f"{name}, rank 1") or losses.get(f"{name}, scale 0.25")
        )
        cpu = on_cpu["optax.adamw" if name == "AdamW" else name.strip("`")]
        gpu = on_gpu.get(ON_GPU.get(name, name.strip("`")), {}).get("result")
        rows.append(
            [
                name,
                "" if loss is None else plus_minus(loss["over_adamw"], 2, signed=True),
                f"{cpu['mean_ms']:.0f}",
                f"{cpu['state_bytes'] / 1e6:,.0f}",
                "" if gpu is None else f"{1e3 * gpu['mean_s']:.1f}",
                "" if gpu is None else f"{gpu['state_bytes'] / 1e9:.2f}",
            ]
        )
    head = ["", "loss over AdamW's, %", "step, 60m, ms", "state, MB"]
    return markdown([*head, "step, 1b, ms", "state, GB"], rows)


def bytes_of_steps() -> str:
    """Bytes per parameter that a step moves, and those before it was written to move few."""
    before = read("bytes_before")["rows"]
    rows = []
    for name, row in read("bytes")["rows"].items():
        first, *rest = name.split(", ")
        sizes = [f"{row[key]:.2f}" for key in ("bytes_per_parameter", "read", "written", "least")]
        old = before.get(name)
        rows.append(
            [
                ", ".join([f"`{first}`", *rest]),
                *sizes,
                f"{row['kernels']}",
                "" if old is None else f"{old['bytes_per_parameter']:.2f} in {old['kernels']}",
            ]
        )
    head = ["optimizer", "moved", "read", "written", "least", "kernels", "before"]
    return markdown(head, rows)


def small(name: str) -> Callable[[], str]:
    """AdamW and GaLore on a model of examples/small, each at its best learning rate."""

    def table() -> str:
        best = read(name)["best"]
        keys = [key for key, value in next(iter(best.values())).items() if isinstance(value, dict)]
        rows = [
            [
                optimizer,
                f"{row['lr']:g}",
                *(f"{row[key]['mean']:.3f} ± {row[key]['error']:.3f}" for key in sorted(keys)),
                f"{row['state_bytes'] / 1e3:,.0f}",
            ]
            for optimizer, row in best.items()
        ]
        columns = [key.replace("_", " ") for key in sorted(keys)]
        return markdown(["", "learning rate", *columns, "state, kB"], rows)

    return table


def encoders() -> str:
    """MiniLM fine-tuned on SST-2 by several methods, each at its best learning rate."""
    times = read("finetune_time")["minilm"]["methods"]
    rows = []
    for row in read("finetune_sst2/results")["methods"]:
        name, _, rank = row["method"].partition(":")
        difference = row["difference"]
        shown = difference and f"{difference['mean']:+.2f} ± {difference['interval']:.2f}"
        time = times.get(row["method"])
        rows.append(
            [
                ONLY_THERE.get(name, f"`{name}`"),
                rank,
                f"{row['lr']:g}",
                plus_minus(row["dev"], 2),
                plus_minus(row["test"], 2),
                shown or "",
                f"{row['state_bytes'] / 1e6:,.1f}",
                f"{row['update_bytes'] / 1e6:,.0f}",
                "" if time is None else f"{time['others']:.2f}",
            ]
        )
    head = ["", "rank", "learning rate", "dev, %", "test, %", "- AdamW's, points"]
    return markdown([*head, "state, MB", "update, MB", "seconds"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "projectors": projectors,
    "optimizers": optimizers,
    "steps_350m": steps("350m"),
    "steps_130m": steps("130m"),
    "steps_60m": steps("60m"),
    "presets": presets,
    "measured": measured,
    "digits": small("digits"),
    "experts": small("experts"),
    "bytes": bytes_of_steps,
    "encoders": encoders,
}


def current(text: str) -> str:
    """A page with the tables of what is committed now.

    Raises:
      KeyError: a comment names a table that there is not.
    """
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


def main() -> None:
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        if current(text) != text:
            page.write_text(current(text))


if __name__ == "__main__":
    main()
