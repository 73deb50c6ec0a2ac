"""A server whose engine fails on request: `python -m tests.chaos.server`, with the flags of `gramophone-server`.

A fault is requested by a file in the working folder: a file "advance.exception" makes the next `advance` of a batch
raise an exception, and is deleted when that happens. A file "killer-49" stays: every iteration of a picture whose
longer side has 49 pixels kills the process. The server itself is the product's; only its engine is faulty.

Keepalive is 1 s instead of 60 s, so that a dead connection is detected within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gramophone_server import command_line, main
from gramophone_server.config import Limits
from gramophone_server.domain.job import Report
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.engine.fake import FakeBatch, FakeBeginning, FakeEngine
from gramophone_server.errors import OutOfDeviceMemory

KINDS: Mapping[str, Callable[[Shape], Exception]] = {
    "exception": lambda shape: RuntimeError("injected: the engine has a defect"),
    "memory": lambda shape: OutOfDeviceMemory(shape.width, shape.height),
    "allocator": lambda shape: torch.OutOfMemoryError("injected: CUDA out of memory"),
}
KEEPALIVE = [("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 2000)]


class FaultyEngine(FakeEngine):
    """A fake engine that fails as requested by files in the folder."""

    def __init__(self, iteration_s: float, folder: Path) -> None:
        super().__init__(iteration_s)
        self.folder = folder

    def batch(self, shape: Shape, slots: int) -> FakeBatch:
        self.fail_at("batch", shape)
        return FaultyBatch(self, shape, slots)

    def fail_at(self, place: str, shape: Shape) -> None:
        """Raises the exception that is requested at this place, once."""
        for kind, error in KINDS.items():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / f"{place}.{kind}")
                raise error(shape)

    def kill_at(self, shape: Shape) -> None:
        """Kills the process if this shape is requested to."""
        if (self.folder / f"killer-{max(shape.width, shape.height)}").exists():
            os.kill(os.getpid(), signal.SIGKILL)


class FaultyBatch(FakeBatch):
    """A batch of the `FaultyEngine`."""

    def __init__(self, engine: FaultyEngine, shape: Shape, slots: int) -> None:
        super().__init__(engine, shape, slots)
        self._faults = engine

    def join(self, state: JobState, beginning: FakeBeginning | None = None) -> int:
        self._faults.fail_at("join", self.shape)
        return super().join(state, beginning)

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        self._faults.fail_at("advance", self.shape)
        reports = super().advance(iterations)
        self._faults.kill_at(self.shape)
        return reports

    def copy(self, slot: int) -> JobState:
        self._faults.fail_at("copy", self.shape)
        return super().copy(slot)

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        self._faults.fail_at("snapshot", self.shape)
        pixels = super().snapshot(slot)

        def wait() -> Tensor:
            self._faults.fail_at("pixels", self.shape)
            return pixels()

        return wait


def short_keepalive_options(limits: Limits) -> list[tuple[str, int]]:
    """The server's channel options with a short keepalive."""
    changed = dict(KEEPALIVE)
    return [*((name, value) for name, value in options(limits) if name not in changed), *KEEPALIVE]


options = main.server_options

if __name__ == "__main__":
    settings, _ = command_line.load(sys.argv[1:], os.environ)
    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr)
    # It logs clients that disconnect; `main` filters that, too.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    main.server_options = short_keepalive_options
    if not asyncio.run(main.serve(settings, lambda: FaultyEngine(settings.iter_ms / 1000, Path.cwd()))):
        sys.stdout.flush()
        os._exit(0)  # as in `main`
