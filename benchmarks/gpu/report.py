"""The results of all stages as a document to read."""

from typing import Any

from benchmarks.gpu.record import Entry, is_done
from benchmarks.gpu.stage import Size, module_of


def report(stages: dict[str, dict[str, Entry]], size: Size) -> tuple[str, list[str]]:
    """Markdown with a table for each stage, and the items that failed or did not pass."""
    lines = ["# On a GPU" + " (rehearsed on a CPU, at tiny shapes)" * size.rehearsal, ""]
    lines += tables(stages, size, "##")
    failed = [
        f"{stage}: {item.name}"
        for stage, entries in stages.items()
        for item in module_of(stage).items(size)
        if item.name in entries and not _is_right(entries[item.name])
    ]
    if failed:
        lines += ["", "Failed: " + "; ".join(failed) + "."]
    return "\n".join(lines) + "\n", failed


def tables(stages: dict[str, dict[str, Entry]], size: Size, heading: str) -> list[str]:
    """Lines of Markdown: what was measured with, then a table for each stage.

    Where there are several machines or versions of the library, they are numbered, and a column
    says which one an item is of.
    """
    # In the order of their items.
    machines = list(dict.fromkeys(_machine(e) for found in stages.values() for e in found.values()))
    several = len(machines) > 1
    lines = [f"{i}. {m}" if several else f"- {m}" for i, m in enumerate(machines, 1)]
    for stage, entries in stages.items():
        module = module_of(stage)
        lines += ["", f"{heading} {stage}", ""]
        lines += [
            "| | | seconds |" + " with |" * several,
            "| --- | --- | --- |" + " --- |" * several,
        ]
        for item in module.items(size):
            entry = entries.get(item.name)
            seconds = "" if entry is None else f"{entry.get('seconds', 0):.0f}"
            # Without the blanks that align figures elsewhere.
            said = " ".join(outcome(module, item.name, entry).split())
            line = f"| {item.name} | {said} | {seconds} |"
            if several:
                line += f" {'' if entry is None else machines.index(_machine(entry)) + 1} |"
            lines.append(line)
    return lines


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
    return "skipped" in entry or is_done(entry)


def _machine(entry: Entry) -> str:
    machine = entry["machine"]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    commit, library = entry["commit"], f"library {entry['library_sha256']}"
    # A commit does not say which files are measured where they differ from its own.
    if commit is None:
        commit = library
    elif commit.endswith("-dirty"):
        commit += f", {library}"
    return (
        f"{machine['device']}{driver}, jax {machine['jax']}, Python {machine['python']}, {commit}"
    )
