"""Writes the tables of measurements in docs/ from the committed figures.

python -m benchmarks.site_tables

Each stands between two comments that name it. What is measured is in benchmarks/results.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.quality.report import plus_minus
from benchmarks.quality.statistics import estimate

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
# Table 2 of arXiv 2403.03507: perplexity, and weights with optimizer state in bfloat16, by the name
# that each method has in examples/flax_llama.
TABLE_2 = {
    "adamw": ("full rank", "34.06 (0.36 GB)", "25.08 (0.76)", "18.80 (2.06)", "15.56 (7.80)"),
    "galore_adamw": ("GaLore", "34.88 (0.24 GB)", "25.36 (0.52)", "18.95 (1.22)", "15.64 (4.38)"),
    "low_rank": ("low rank", "78.18 (0.26 GB)", "45.51 (0.54)", "37.41 (1.08)", "142.53 (3.57)"),
    "lora": ("LoRA", "34.99 (0.36 GB)", "33.92 (0.80)", "25.58 (1.76)", "19.21 (6.17)"),
    "relora": ("ReLoRA", "37.04 (0.36 GB)", "29.37 (0.80)", "29.08 (1.76)", "18.33 (6.17)"),
}
# Names of what is no preset of the library.
ONLY_THERE = {"adamw": "AdamW", "AdamW": "AdamW", "lora": "LoRA", "LoRA": "LoRA"}


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
    times = read("finetune_time")["minilm"]
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


def smollm2() -> str:
    """SmolLM2 fine-tuned on sums by several methods, each at its best learning rate."""
    result, times = read("finetune_smollm2"), read("finetune_time")["smollm2"]
    [before] = [x["result"] for x in result["runs"] if x["run"]["method"] not in times]
    rows = [["as it was", "", "", f"{100 * before['accuracy']:.1f}", "", "", ""]]
    for name, time in times.items():
        runs = [x for x in result["runs"] if x["run"]["method"] == name]
        swept = [x for x in runs if x["run"]["seed"] == 0]
        lr = min(swept, key=lambda x: x["result"]["valid_loss"])["run"]["lr"]
        best = [x["result"] for x in runs if x["run"]["lr"] == lr]
        rows.append(
            [
                ONLY_THERE.get(name, {"GaLore": "`galore_adamw`"}.get(name, f"`{name}_adamw`")),
                f"{lr:g}",
                plus_minus(estimate([x["valid_loss"] for x in best]), 3),
                plus_minus(estimate([100 * x["accuracy"] for x in best]), 1),
                f"{best[0]['state_bytes'] / 1e6:,.1f}",
                f"{best[0]['update_bytes'] / 1e9:,.2f}",
                f"{time['others']:.1f}",
            ]
        )
    head = ["", "learning rate", "loss", "right answers, %"]
    return markdown([*head, "state, MB", "update, GB", "seconds"], rows)


def table_2() -> str:
    """Table 2 of GaLore's paper, with the demo's model as one more column."""
    result = read("table2/results")
    runs = {run["name"]: run for run in result["runs"]}
    rows = []
    for name, (title, *published) in TABLE_2.items():
        best = result["best"][name]
        losses = estimate([runs[run]["scores"]["valid_loss"] for run in best["runs"]])
        mean = math.exp(losses["mean"])
        scores = runs[best["runs"][0]]["scores"]
        held = sum(scores[f"{part}_bytes"] for part in ("parameter", "projector", "moment"))
        here = f"{mean:.1f} ± {mean * losses['error']:.1f} ({held / 1e6:.1f} MB)"
        rows.append([title, here, *published])
    return markdown(["", "9m, here", "60m", "130m", "350m", "1b"], rows)


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
    "table_2": table_2,
    "smollm2": smollm2,
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
