"""One section of the GPU check: its inputs, and how its results survive a failure.

Every section runs in a process of its own, so that a kernel that breaks the GPU's context breaks one section. Results
go to a file line by line, so that a section that is killed loses only the measurement in progress.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, interleaved

__all__ = ["Section"]

MARGIN = 2.0  # seconds that a section reserves for its end
SHRUNK = 16  # pictures of a dry run on a CPU are smaller by this factor


class Section:
    """The results of a section, and the time that it may take."""

    def __init__(self, name: str, device: str, seconds: float, so_far: list[Row], log: Path, folder: Path) -> None:
        """``seconds``: the time limit. ``so_far``: the rows of the sections before. ``log``: the file for results.
        ``folder``: for logs."""
        self.name, self.device, self.so_far, self.folder = name, device, so_far, folder
        self._ends = time.monotonic() + seconds - MARGIN
        self._log = log

    def px(self, side: int) -> int:
        """The side of a picture in pixels: ``side`` on a GPU, smaller in a dry run."""
        return side if self.device == "cuda" else max(16, side // SHRUNK)

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def row(self, **values: Any) -> None:
        """Writes one result."""
        self._write("row", {"section": self.name, **values})

    def fact(self, key: str, value: Any) -> None:
        """Writes a property of the machine, or a text."""
        self._write("fact", {key: value})

    def left_out(self, what: str, why: str) -> None:
        """Writes that something was not measured, for a reason that is no failure."""
        print(f"  {what}: left out, {why}", flush=True)
        self._write("left_out", {"section": self.name, "what": what, "why": why})

    def failed(self, what: str, why: str) -> None:
        """Writes a failure; `attempt` calls it."""
        print(f"  {what}: FAILED, {why}", flush=True)
        self._write("failed", {"section": self.name, "what": what, "why": why})

    def attempt(self, what: str, call: Callable[[], object], seconds: float = 0.0) -> bool:
        """Runs a part of the section, unless fewer than ``seconds`` are left, and records its failure. Returns whether
        it succeeded."""
        if self.seconds_left < seconds:
            self.left_out(what, f"{max(self.seconds_left, 0):.0f} s were left and it takes about {seconds:.0f}")
            return False
        start, done = time.monotonic(), False
        try:
            call()
            done = True
        except Exception as error:  # noqa: BLE001 - after any failure the other parts still run
            lines = str(error).strip().splitlines() or ["no message"]
            self.failed(what, f"{type(error).__name__}: {lines[0][:300]}")
        if done:
            print(f"  {what}: {time.monotonic() - start:.1f} s", flush=True)
        if self.device == "cuda":
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:  # the context is gone
                self.failed(what, f"the GPU cannot be used any more: {str(error).splitlines()[0]}")
        return done

    def timed(
        self, ways: Mapping[str, Callable[[], object]], repeats: int = 7, least_ms: float = 5.0
    ) -> dict[str, float]:
        """`interleaved` on the section's device; in a dry run, whose times mean nothing, with one repeat."""
        if self.device == "cuda":
            return interleaved(ways, repeats, "cuda", least_ms)
        return interleaved(ways, 1)

    def rate(self, name: str) -> float | None:
        """TFLOP/s or GB/s of a ceiling, None if it was not measured."""
        found = (row["rate"] for row in self.so_far if row["section"] == "ceilings" and row["name"] == name)
        return next(found, None)

    def ratio_vs_floor(self, ms: float, floor_flops: float) -> float | None:
        """The ratio of ``ms`` to the time of ``floor_flops`` operations at the measured fp16 matrix rate, None without
        it."""
        rate = self.rate("matmul fp16")
        return ms / (floor_flops / rate / 1e9) if rate else None

    def _write(self, kind: str, value: Row) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps({kind: value}) + "\n")
