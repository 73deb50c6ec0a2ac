"""The records of a GPU check: lines of JSON that survive the end of their writer, and their sum.

A line is {"kind": ..., "section": ..., "value": ...}. The kinds:

    run       the first line: device, sections, time limit and start of the whole run
    start     a section starts
    row       a measurement
    fact      a property of the machine, or a text; {key: value}
    failed    a part that failed: {"what": ..., "why": ...}
    left_out  a part that was not measured, for a reason that is no failure; the same keys
    end       a section has ended: {"seconds": ...}. Without it the section was cut off

Nothing here imports torch, so that these lines can be read on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.measure import Row

__all__ = ["GPU", "MACHINE", "Results", "absent", "read", "total", "write"]

Results = dict[str, Any]

MACHINE = "here"  # the section whose facts describe the machine
GPU = "the GPU"  # its part that fails if there is none
LISTS = {"row": "rows", "failed": "failed", "left_out": "left_out"}


def write(path: Path, kind: str, section: str, value: Row) -> None:
    """Appends a line to the file, which another process may have left within a line."""
    line = json.dumps({"kind": kind, "section": section, "value": value}) + "\n"
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, 2) >= 0 and file.read(1) != b"\n":
            line = "\n" + line
        file.write(line.encode())


def read(path: Path) -> Results:
    """The results in one file of records; see `total`."""
    return total([path.read_text(errors="replace")])


def total(texts: Sequence[str]) -> Results:
    """The results of several files of records, oldest first.

    A section that ran again replaces all of its older results, unless it was cut off before it had any. Keys:

        runs              values of `run`
        machine           facts of the section `here`
        sections          by name: when it started, and its seconds, None if it was cut off
        rows              rows of all sections, each with its section
        facts             by section: its facts
        failed, left_out  each with its section
    """
    runs: list[Row] = []
    sections: dict[str, Results] = {}
    for text in texts:
        found: dict[str, Results] = {}
        for record in _records(text):
            kind, name, value = record["kind"], record["section"], record["value"]
            if kind == "run":
                runs.append(value)
                continue
            section = found.setdefault(name, _empty())
            if kind == "start":
                section["started"] = value["at"]
            elif kind == "end":
                section["seconds"] = value["seconds"]
            elif kind == "fact":
                section["facts"] |= value
            else:
                section[LISTS[kind]].append({"section": name, **value})
        for name, section in found.items():
            if name not in sections or section["rows"] or section["facts"] or section["seconds"] is not None:
                sections[name] = section
    return {
        "runs": runs,
        "machine": dict(sections.get(MACHINE, _empty())["facts"]),
        "sections": {name: {key: s[key] for key in ("started", "seconds")} for name, s in sections.items()},
        "rows": _all(sections.values(), "rows"),
        "facts": {name: s["facts"] for name, s in sections.items() if s["facts"] and name != MACHINE},
        "failed": _all(sections.values(), "failed"),
        "left_out": _all(sections.values(), "left_out"),
    }


def absent(results: Results, expected: Sequence[str]) -> list[str]:
    """The sections that did not start, or did not end."""
    return [name for name in expected if results["sections"].get(name, {"seconds": None})["seconds"] is None]


def _empty() -> Results:
    return {"started": None, "seconds": None, "rows": [], "facts": {}, "failed": [], "left_out": []}


def _all(sections: Iterable[Results], key: str) -> list[Row]:
    return [value for section in sections for value in section[key]]


def _records(text: str) -> Iterator[Row]:
    """The complete lines. A line whose writer was killed within it is no JSON, or has no value."""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.keys() == {"kind", "section", "value"}:
            yield record
