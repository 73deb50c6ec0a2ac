"""One section of the GPU check: its inputs, and how its results survive a failure.

Every section runs in a process of its own, so that a kernel that breaks the GPU's context breaks one section. Results
go to a file line by line, so that a section that is killed loses only the measurement in progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from benchmarks.gpu import records
from benchmarks.gpu.clock import Clock
from benchmarks.measure import Row, interleaved

if TYPE_CHECKING:
    from gramophone_server.network.vgg import Vgg

__all__ = ["Section"]

T = TypeVar("T")

MARGIN = 3.0  # seconds that a section reserves for its end
# A dry run on a CPU covers the same code: with smaller pictures and a narrower network, by these factors, with two
# pictures of a batch, and with the first cases of many alike. Its rows have the sizes of the real run, so that goals
# and tables find them.
SHRUNK = 32
NARROWER = 16
SMALLEST = 16  # pixels, below which the network has nothing left to pool
DRY_BATCH = 2


class Section:
    """The results of a section, and the time that it may take."""

    def __init__(
        self, name: str, device: str, clock: Clock, due: float, so_far: list[Row], records: Path, folder: Path
    ) -> None:
        """``clock``: that of the whole run. ``due``: when the section is killed, by `time.monotonic`. ``so_far``: the
        rows of the sections before; its own follow. ``records``: the file for results. ``folder``: for logs."""
        self.name, self.device, self.so_far, self.folder = name, device, so_far, folder
        self._clock, self._ends, self._records = clock, due - MARGIN, records

    @property
    def dry(self) -> bool:
        """Whether this is a dry run on a CPU, whose figures mean nothing."""
        return self.device != "cuda"

    def px(self, side: int) -> int:
        """The side of a picture in pixels: ``side`` on a GPU, smaller in a dry run."""
        return max(SMALLEST, side // SHRUNK) if self.dry else side

    def network(self) -> Vgg:
        """The network that is measured."""
        # Imported here, so that the first section can report if the ops do not load.
        from benchmarks.gpu.network import network, random_vgg

        return random_vgg(narrower=NARROWER) if self.dry else network()[0]

    def few(self, cases: Sequence[T], most: int = 1) -> Sequence[T]:
        """All cases on a GPU, the first ``most`` of them in a dry run."""
        return cases[:most] if self.dry else cases

    def pictures(self, batch: int) -> int:
        """The pictures of a batch: ``batch`` on a GPU, fewer in a dry run."""
        return min(batch, DRY_BATCH) if self.dry else batch

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def row(self, **values: Any) -> None:
        """Writes one result."""
        self._write("row", values)
        self.so_far.append({"section": self.name, **values})

    def fact(self, key: str, value: Any) -> None:
        """Writes a property of the machine, or a text."""
        self._write("fact", {key: value})

    def left_out(self, what: str, why: str) -> None:
        """Writes that something was not measured, for a reason that is no failure."""
        self.say(f"{what}: left out, {why}")
        self._write("left_out", {"what": what, "why": why})

    def failed(self, what: str, why: str) -> None:
        """Writes a failure; `attempt` calls it."""
        self.say(f"{what}: FAILED, {why}")
        self._write("failed", {"what": what, "why": why})

    def say(self, text: str) -> None:
        """Prints a line for those who watch, with the time of the whole run."""
        print(f"  [{self._clock}] {text}", flush=True)

    def attempt(self, what: str, call: Callable[[], object], seconds: float = 0.0) -> bool:
        """Runs a part of the section, unless fewer than ``seconds`` are left, and records its failure. Returns whether
        it succeeded. On the CPU of a dry run ``seconds``, an estimate for a GPU, do not count."""
        if self.seconds_left < (0.0 if self.dry else seconds):
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
            self.say(f"{what}: {time.monotonic() - start:.1f} s")
        if not self.dry:
            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:  # the context is gone
                self.failed(what, f"the GPU cannot be used any more: {str(error).splitlines()[0]}")
        return done

    def timed(
        self, ways: Mapping[str, Callable[[], object]], repeats: int = 7, least_ms: float = 5.0
    ) -> dict[str, float]:
        """`interleaved` on the section's device; in a dry run, whose times mean nothing, with one repeat."""
        if self.dry:
            return interleaved(ways, 1)
        return interleaved(ways, repeats, "cuda", least_ms)

    def rate(self, name: str) -> float | None:
        """TFLOP/s or GB/s of a ceiling that this run has measured, else None."""
        found = (row["rate"] for row in self.so_far if row["section"].startswith("ceilings") and row["name"] == name)
        return next(found, None)

    def ratio_vs_floor(self, ms: float, floor_flops: float) -> float | None:
        """The ratio of ``ms`` to the time of ``floor_flops`` operations at the measured fp16 matrix rate, None without
        it."""
        rate = self.rate("matmul fp16")
        return ms / (floor_flops / rate / 1e9) if rate else None

    def _write(self, kind: str, value: Row) -> None:
        records.write(self._records, kind, self.name, value)
