"""The files of a GPU check, which are complete at every moment, and what it prints at its end."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import records, report
from benchmarks.gpu.goals import goals
from benchmarks.gpu.records import Results

__all__ = ["Output", "print_end", "write_json", "write_results", "write_whole"]

MAX_LOG_BYTES = 2**20  # of each log, its end
SHOWN = 12  # failures in the last lines, of which a terminal may keep few


class Output:
    """The four files of a run: records, results as JSON and as Markdown, and the logs in one archive."""

    def __init__(self, out: Path, name: str, logs: Path, expected: Sequence[str]) -> None:
        """``out``: the folder for them. ``name``: the start of their names; a run of the same name gets a number.
        ``logs``: the folder of the logs. ``expected``: the sections of the run."""
        out.mkdir(parents=True, exist_ok=True)
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        self.out, self.name = out, next(one for one in names if not (out / f"{one}.jsonl").exists())
        self.records = out / f"{self.name}.jsonl"
        self.records.touch()
        self._logs, self._expected = logs, expected

    def keep(self) -> Results:
        """Writes all files anew, from the records so far. A full disk must not end the run: the records come first."""
        results = records.read(self.records)
        try:
            write_results(results, self.out / self.name, self._expected)
            write_whole(self.out / f"{self.name}-logs.tar.gz", _archive(self._logs))
        except OSError as error:
            print(f"the results could not be written, the records are in {self.records}: {error}", flush=True)
        return results


def write_results(results: Results, stem: Path, expected: Sequence[str]) -> None:
    """Writes ``stem``.json and ``stem``.md."""
    write_json(results, stem.with_name(f"{stem.name}.json"))
    try:
        text = report.section(results, expected)
    except Exception as error:  # noqa: BLE001 - a table must not cost the measurements that follow
        text = f"The report failed, but the JSON is complete: {type(error).__name__}: {error}\n"
    write_whole(stem.with_name(f"{stem.name}.md"), text.encode())


def write_json(results: Results, path: Path) -> None:
    """Writes the results as JSON."""
    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file so that a reader finds either the old or the new version, never a part of one."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)


def _archive(logs: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for log in sorted(logs.glob("*.log")):
            text = log.read_bytes()[-MAX_LOG_BYTES:]
            info = tarfile.TarInfo(log.name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def print_end(results: Results, expected: Sequence[str]) -> int:
    """Prints what failed, and last the goals. Returns the exit code: 1 if anything failed or is missing."""
    failed, left_out = results["failed"], results["left_out"]
    absent = records.absent(results, expected)
    for one in failed[:SHOWN]:
        print(f"FAILED {one['section']}, {one['what']}: {one['why'][:200]}")
    if len(failed) > SHOWN:
        print(f"and {len(failed) - SHOWN} more failed")
    for name in absent:
        print(f"{'CUT OFF' if name in results['sections'] else 'MISSING'} {name}")
    print(f"{len(results['rows'])} rows, {len(failed)} failed, {len(left_out)} left out")
    if all(run["device"] != "cuda" for run in results["runs"]):
        print("a dry run: its pictures are tiny, and its figures and goals mean nothing")
    everything = goals(results["rows"])
    of_these = [goal for goal in everything if goal.section in expected]
    for goal in sorted(of_these, key=lambda goal: (goal.measured is None, goal.met)):
        print(goal)
    counts = [sum(goal.verdict.startswith(word) for goal in of_these) for word in ("met", "missed", "not")]
    others = len(everything) - len(of_these)
    print("goals: {} met, {} missed, {} not measured".format(*counts) + f"; {others} of other sections" * bool(others))
    return 1 if failed or absent else 0
