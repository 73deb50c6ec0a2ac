"""Puts the parts of several runs of the GPU check together, into the results folder and RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import records, report
from benchmarks.gpu.output import print_end, write_json, write_results, write_whole
from benchmarks.gpu.records import Results

__all__ = ["merge"]

# Parts that differ in one of these do not belong together.
IDENTITY = ("gpu", "compute_capability", "python", "torch", "cuda", "cudnn")
# These may differ, and the result says so: a fix between two runs changes the sources, and another machine with the
# same GPU has its own driver.
NOTED = ("driver", "sources", "network", "cpu")


def merge(paths: Sequence[Path], expected: Sequence[str], results: Path, page: Path, out: Path | None) -> int:
    """Merges files of records, or all those in folders, and prints the goals. Returns an exit code: 2 if the parts do
    not belong together, 1 if anything failed or is missing, else 0.

    ``expected``: all sections of the check. ``results`` and ``page``: the results folder and RESULTS.md, which get only
    what a GPU has measured. ``out``: a folder for the merged results, also of a dry run.
    """
    parts = _read(paths)
    if not parts:
        print("nothing to merge: no file of records says which machine it is from")
        return 2
    if wrong := _differences(parts, IDENTITY):
        print("these parts do not belong together, so nothing was written:")
        print("\n".join(wrong))
        return 2
    texts = [path.read_text(errors="replace") for path in parts]
    merged = records.total(texts)
    merged["differences"] = _differences(parts, NOTED)
    for line in merged["differences"]:
        print(f"the parts differ, which may matter: {line}")
    name = str(merged["machine"].get("gpu", "dry-run")).replace(" ", "-")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_results(merged, out / name, expected)
    if "gpu" in merged["machine"]:
        results.mkdir(parents=True, exist_ok=True)
        write_json(merged, results / f"{name}.json")
        from benchmarks.gpu import lessons  # imported here, because it imports torch

        # The page has one table of lessons, in a place of its own.
        elsewhere = {section: facts for section, facts in merged["facts"].items() if section != lessons.SECTION}
        part = report.section(merged | {"facts": elsewhere}, expected)
        text = report.placed(page.read_text(), name, part)
        text = lessons.placed(text, lessons.table(merged["rows"]))
        write_whole(page, text.encode())
    return print_end(merged, expected)


def _read(paths: Sequence[Path]) -> dict[Path, Results]:
    """The results of every file, oldest first."""
    found: dict[Path, Results] = {}
    for path in paths:
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            results = records.read(file)
            if not results["runs"] or not results["machine"]:
                print(f"{file} is left out: it does not say which machine it is from")
                continue
            found[file] = results
            sections = ", ".join(
                f"{name}{' (cut off)' if section['seconds'] is None else ''}"
                for name, section in results["sections"].items()
            )
            print(f"{file}: {sections}")
    return dict(sorted(found.items(), key=lambda item: str(item[1]["runs"][0]["started"])))


def _differences(parts: Mapping[Path, Results], keys: Sequence[str]) -> list[str]:
    """A line for each of the properties that differ between the parts."""
    lines = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for path, results in parts.items():
            values.setdefault(str(results["machine"].get(key, "none")), []).append(path.name)
        if len(values) > 1:
            lines.append(f"{key}: " + "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items()))
    return lines
