"""The results of all stages as a document to read."""

from typing import Any

from benchmarks.gpu.record import Entry
from benchmarks.gpu.stage import Size, module_of


def report(stages: dict[str, dict[str, Entry]], size: Size) -> tuple[str, list[str]]:
    """Markdown with a table for each stage, and the items that failed or did not pass."""
    lines = ["# On a GPU" + " (rehearsed on a CPU, at tiny shapes)" * size.rehearsal, ""]
    machines = {_machine(e) for entries in stages.values() for e in entries.values()}
    lines += [f"- {machine}" for machine in sorted(machines)]
    failed = []
    for stage, entries in stages.items():
        module, expected = module_of(stage), module_of(stage).items(size)
        lines += ["", f"## {stage}", "", "| | | seconds |", "| --- | --- | --- |"]
        for item in expected:
            entry = entries.get(item.name)
            seconds = "" if entry is None else f"{entry.get('seconds', 0):.0f}"
            lines.append(f"| {item.name} | {outcome(module, item.name, entry)} | {seconds} |")
            if entry is not None and not _is_right(entry):
                failed.append(f"{stage}: {item.name}")
    if failed:
        lines += ["", "Failed: " + "; ".join(failed) + "."]
    return "\n".join(lines) + "\n", failed


def outcome(module: Any, name: str, entry: Entry | None) -> str:
    """An entry in a line."""
    if entry is None:
        return "not reached"
    if "result" in entry:
        return module.describe(name, entry["result"]).strip()
    if "timed_out" in entry:
        return f"stopped after {entry['timed_out']:.0f} s"
    if "skipped" in entry:
        return f"skipped: {entry['skipped']}"
    return f"failed: {entry['error'].strip().splitlines()[-1][:160]}"


def _is_right(entry: Entry) -> bool:
    return "skipped" in entry or ("result" in entry and entry["result"].get("passed", True))


def _machine(entry: Entry) -> str:
    machine = entry["machine"]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    commit = entry["commit"] or f"library {entry['library_sha256']}"
    return (
        f"{machine['device']}{driver}, jax {machine['jax']}, Python {machine['python']}, {commit}"
    )
