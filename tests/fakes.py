"""An engine that makes no pictures: one grey per iteration, at the pace that a test sets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gramophone_server.errors import Diverged
from gramophone_server.job import Losses, Report, StyleJob


class FakeEngine:
    """Runs while `go` is set. Iteration `fails_at` raises `error`, of any job."""

    device_name = "fake"
    precision = "fp32"
    backbone = "vgg19"
    weights_source = "none, sha256 0"
    layers = ("conv1_1", "relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1")

    def __init__(self, iteration_s: float = 0.0, fails_at: int = 0, error: Exception | None = None) -> None:
        self.iteration_s = iteration_s
        self.fails_at = fails_at
        self.error = error
        self.go = threading.Event()
        self.go.set()
        self.under_way = threading.Event()  # a job has begun an iteration
        self.jobs: list[StyleJob] = []  # as they were started
        self.iterations = 0  # of all jobs
        self.taken_at: list[float] = []  # times of the pictures, on the monotonic clock
        self.thread = ""  # that iterated
        self.closed = 0  # runs

    def start(self, jobs: Sequence[StyleJob]) -> FakeRun:
        self.jobs.extend(jobs)
        return FakeRun(self, jobs[0])


class FakeRun:
    """One job. Its picture is as bright as iterations were done."""

    def __init__(self, engine: FakeEngine, job: StyleJob) -> None:
        self.engine = engine
        self.sizes = [(width, height) for width, height, n in job.scales for _ in range(n)]  # of each iteration
        self.done = 0

    @property
    def finished(self) -> bool:
        return self.done == len(self.sizes)

    def advance(self, iterations: int = 1) -> tuple[Report, ...]:
        self.engine.thread = threading.current_thread().name
        self.engine.under_way.set()
        assert self.engine.go.wait(10), "the test never let the engine go on"
        time.sleep(self.engine.iteration_s)
        width, height = self.sizes[self.done]
        diverged_at = None
        if self.engine.error is not None and self.done + 1 == self.engine.fails_at:
            if not isinstance(self.engine.error, Diverged):
                raise self.engine.error
            diverged_at = self.engine.fails_at  # its picture stays what it was
        else:
            self.done += 1
        self.engine.iterations += 1
        n = max(1, self.done)
        losses = Losses(content={"relu4_2": 1.0 / n}, style={"relu1_1": 2.0 / n}, tv=0.5)
        pixels_left = sum(w * h for w, h in self.sizes[self.done :])
        return (Report(self.done, len(self.sizes), width, height, losses, pixels_left, diverged_at),)

    def snapshot(self, index: int) -> Callable[[], Tensor]:
        picture = self.picture(index)
        return lambda: picture

    def close(self) -> None:
        self.engine.closed += 1

    def picture(self, index: int) -> Tensor:
        self.engine.taken_at.append(time.monotonic())
        width, height = self.sizes[max(0, self.done - 1)]
        return torch.full((height, width, 3), min(255, self.done), dtype=torch.uint8)
