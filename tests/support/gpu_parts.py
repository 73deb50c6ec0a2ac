"""Runs of the GPU check: their rows, their files of records, and sections that behave badly."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import records
from benchmarks.gpu.section import Section

MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "driver": "580.1", "date": "2026-12-01", "network": "VGG"}


def part(
    path: Path,
    sections: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    started: str = "2026-12-01T10:00:00.000+00:00",
    device: str = "cuda",
    machine: Mapping[str, Any] = MACHINE,
) -> Path:
    """Writes the records of a run that measured these rows, by section; all sections have ended."""
    path.touch()
    records.write(path, "run", path.stem, {"device": device, "sections": [*sections], "started": started})
    records.write(path, "start", "here", {"at": started})
    records.write(path, "fact", "here", dict(machine))
    records.write(path, "end", "here", {"seconds": 1.0})
    for name, rows in sections.items():
        records.write(path, "start", name, {"at": started})
        for row in rows:
            records.write(path, "row", name, dict(row))
        records.write(path, "end", name, {"seconds": 1.0})
    return path


def good(section: Section) -> None:
    """A section that works."""
    section.row(name="good", seconds=section.seconds_left)


def hanging(section: Section) -> None:
    """A section that finds something, starts a process and never ends."""
    process = subprocess.Popen(["sleep", "1000"], process_group=0)
    section.row(name="before", pid=process.pid)
    time.sleep(1000)


def dying(section: Section) -> None:
    """A section whose process dies."""
    section.row(name="before")
    raise SystemExit(3)
