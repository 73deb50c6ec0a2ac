"""The GPU check with all its sections in one process: importing torch for each takes most of the time of a dry run.

    python -m tests.support.gpu_check --call a --device cpu --out FOLDER

`make gpu-rehearsal` runs it as it is, and tests of the runner and of interrupted calls hold its processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch

from benchmarks.gpu import check, records, section_process
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.runner import Step


def run(
    steps: Mapping[str, Step], device: str, clock: Clock, record_file: Path, folder: Path, keep: Callable[[], object]
) -> Generator[str]:
    """As `benchmarks.gpu.runner.run`, without processes and shares of the time."""
    for name, step in steps.items():
        print(f"== {name}: {clock}", flush=True)
        records.write(record_file, "start", name, {"at": "now"})
        with (folder / f"{name}.log").open("w") as log, contextlib.redirect_stderr(log):
            due = clock.began + clock.seconds
            section_process.run(section_process.load(step.function), name, device, clock, due, record_file, folder)
        keep()
        records.write(record_file, "end", name, {"seconds": 1.0})
        yield name


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the runner's processes on a CPU
    check.runner.run = run
    sys.exit(check.main())
