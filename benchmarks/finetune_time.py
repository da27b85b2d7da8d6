"""Seconds of an update of fine-tuning, by method, on a machine that does nothing else.

    python -m benchmarks.finetune_time --minilm MiniLM-L6 --sst2 SST-2
    python -m benchmarks.finetune_time --smollm2 SmolLM2

Each method trains on the same texts in the same order: MiniLM-L6 on the first of SST-2, and
SmolLM2-135M on the problems of benchmarks/finetune_smollm2. All methods take turns, twice, so that
a drift of the machine's speed hits all alike. The first update, in which GaLore chooses its
subspaces, is told apart; compilation is in none.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import finetune_smollm2
from benchmarks.machine import machine
from examples.flax_glue.compare import parse_methods
from examples.flax_glue.config import Config
from examples.flax_glue.finetune import finetune as finetune_encoder
from examples.flax_llama.finetune import finetune, from_command_line
from examples.flax_llama.writing import write_whole

OUT = Path("benchmarks/results/finetune_time.json")
METHODS = ("adamw", "galore_adamw:8", "lora:8", "tracked_adamw:8", "q_galore_adamw:8")
TEXTS, UPDATES, ROUNDS = 480, 4, 2
# The seconds of each update.
Seconds = list[float]


def minilm(model: Path, data: Path) -> dict[str, Callable[[], Seconds]]:
    """What trains MiniLM-L6 for some updates, by method."""

    def trained(method) -> Seconds:
        shared = Config(model=model, data=data, task="sst2", epochs=1, limit=TEXTS)
        result = finetune_encoder(method.settings(shared, 1e-4, seed=0))
        return [record["seconds"] for record in result.train]

    return {method.name: lambda m=method: trained(m) for method in parse_methods(METHODS)}


def smollm2(model: Path, data: Path) -> dict[str, Callable[[], Seconds]]:
    """What trains SmolLM2-135M for some updates, by method."""
    train, valid = data / "train.jsonl", data / "valid.jsonl"
    words = ["--init-from", str(model), "--data", str(train), "--valid-data", str(valid)]
    words += [*finetune_smollm2.TRAINING, "--steps", str(UPDATES), "--eval-every", str(UPDATES)]
    words += ["--lr", "1e-5", "--quiet", "--no-tensorboard"]

    def trained(flags: Sequence[str]) -> Seconds:
        result = finetune(from_command_line([*words, *flags])).result
        return [record["seconds"] for record in result.train]

    methods = finetune_smollm2.METHODS
    return {name: lambda flags=flags: trained(flags) for name, (flags, _) in methods.items()}


def in_turns(methods: dict[str, Callable[[], Seconds]]) -> dict[str, dict[str, Any]]:
    """Seconds of the first update, and of the others on average, the lesser of two rounds."""
    rounds: dict[str, list[Seconds]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, train in methods.items():
            rounds[name].append(train())
            print(f"{name}: {statistics.mean(rounds[name][-1][1:]):.3f} s", flush=True)
    return {
        name: {
            "first": min(seconds[0] for seconds in found),
            "others": min(statistics.mean(seconds[1:]) for seconds in found),
            "rounds": [statistics.mean(seconds[1:]) for seconds in found],
        }
        for name, found in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="directory of Hugging Face")
    parser.add_argument("--sst2", type=Path, help="directory with train.txt, dev.txt and test.txt")
    parser.add_argument("--smollm2", type=Path, help="directory of Hugging Face")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file, whose other part stays")
    args = parser.parse_args()
    if (args.minilm is None) is not (args.sst2 is None):
        parser.error("--minilm and --sst2 go together")
    result: dict[str, Any] = {"benchmark": "finetune_time"}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    with tempfile.TemporaryDirectory() as directory:
        if args.minilm is not None:
            times = in_turns(minilm(args.minilm, args.sst2))
            result["minilm"] = {"machine": machine(), "methods": times}
        if args.smollm2 is not None:
            data = finetune_smollm2.write_data(Path(directory))
            times = in_turns(smollm2(args.smollm2, data))
            result["smollm2"] = {"machine": machine(), "methods": times}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
