"""A worker with clients on a clock that only the engine moves: hours of scheduling in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gramophone.recipe import Recipe
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.scheduling.forecast import Work
from gramophone_server.scheduling.place_turns import exchange, in_order
from gramophone_server.scheduling.task import Task
from gramophone_server.scheduling.throughput import ThroughputModel
from gramophone_server.scheduling.worker import Worker
from tests.support.clock import ManualClock
from tests.support.engines import FakeEngine
from tests.support.observers import Recorder

Client = Iterator[tuple[Task, float]]  # the tasks that it sends, one after the other, and idle seconds before each

ITERATION_S = 0.1  # of 64 x 32 px, as on a slow machine
# A style of 256 px stands for one of 2048 px: 13 s, of which the dearest convolution takes a tenth.
STYLE_PIXEL_S = 13 / 256**2
STEP_PIXELS = 256**2 / 10


def state(iterations: int, styles: Sequence[int] = (32,), **recipe: Any) -> JobState:
    """A job whose style images are squares with these sides, and new to the engine."""
    recipe = {"size": 64, "smallest_size": 0, "iterations": iterations, **recipe}
    images = tuple(torch.zeros((1, 1, 1), dtype=torch.uint8).expand(3, side, side) for side in styles)
    weights = (1.0,) * len(styles)
    content = torch.zeros((1, 1, 1), dtype=torch.uint8).expand(3, 32, 64)
    return JobState(
        StyleJob(recipe=Recipe(**recipe), content=content, styles=images, style_weights=weights, start=None, seed=1)
    )


class Device:
    """A worker with clients."""

    def __init__(self, max_running: int = 16, **engine: Any) -> None:
        self.clock = ManualClock(reading_s=1e-7)
        options = {"pixel_s": ITERATION_S / (64 * 32), "style_pixel_s": STYLE_PIXEL_S, "step_pixels": STEP_PIXELS}
        self.engine = FakeEngine(clock=self.clock, **(options | engine))
        self.throughput = ThroughputModel(self.clock)
        self.worker = Worker(self.engine, self.throughput, 2**20, clock=self.clock)
        self.running: list[Task] = []
        self.waiting: list[Task] = []
        self._clients: list[tuple[Task, Client]] = []  # by the task that they wait for
        self._due: list[tuple[float, Task, Client]] = []
        self.max_running = max_running
        self.longest_step_s = 0.0
        self.exchanges = 0

    def task(self, owner: str, iterations: int, styles: Sequence[int] = (32,), **recipe: Any) -> Task:
        return Task(state=state(iterations, styles, **recipe), observer=Recorder(self.clock), owner=owner)

    def add(self, client: Client) -> None:
        """A client sends its first task."""
        item = next(client, None)
        if item is not None:
            self._due.append((self.clock.now + item[1], item[0], client))

    def run(self, until: Callable[[], object], seconds: float = math.inf) -> None:
        """Runs until the condition holds, or for some seconds."""
        end = self.clock.now + seconds
        while not until() and self.clock.now < end:
            for entry in [entry for entry in self._due if entry[0] <= self.clock.now]:
                self._due.remove(entry)
                entry[1].queued_at = self.clock.now
                self.waiting.append(entry[1])
                self.waiting.sort(key=lambda task: task.latest_start_at)
                self._clients.append(entry[1:])
            places = self.max_running - sum(not task.memory_short for task in self.running)
            for task in self.worker.memory.startable(in_order(self.waiting, self.running), places, self.running):
                self.waiting.remove(task)
                self.worker.admit(task)
                self.running.append(task)
            if places <= 0:
                self._exchange_places()
            before = self.clock.now
            self.worker.step(self.running)
            self.longest_step_s = max(self.longest_step_s, self.clock.now - before)
            if not self.running:
                self.clock.advance(0.01)
            self.running = [task for task in self.running if not task.ended]
            for ended in [pair for pair in self._clients if pair[0].ended]:
                self._clients.remove(ended)
                self.add(ended[1])

    def _exchange_places(self) -> None:
        """As the compute thread does."""
        host_bytes, memory = sum(task.state.bytes for task in self.waiting), self.worker.memory
        due = exchange(
            self.running,
            self.waiting,
            self.clock.now,
            lambda task: memory.has_host_memory(task, host_bytes),
            lambda task: memory.may_take_place(task, self.running),
        )
        if due is not None:
            self.worker.give_place_up(due.leaving)
            self.waiting.remove(due.starting)
            due.starting.keeps_place, due.starting.came_early = due.to_stay, due.is_early
            self.worker.admit(due.starting)
            self.running[self.running.index(due.leaving)] = due.starting
            self.waiting.append(due.leaving)
            self.waiting.sort(key=lambda task: task.latest_start_at)
            self.exchanges += 1

    def seconds(self, task: Task, limit_s: float = 100_000) -> float:
        """How long a job takes that is sent now."""
        started_at = self.clock.now
        self.add(iter([(task, 0.0)]))
        self.run(lambda: task.ended, limit_s)
        assert isinstance(task.observer, Recorder) and task.ended and task.observer.error is None
        return self.clock.now - started_at


def stream(
    device: Device,
    owner: str | Callable[[], str],
    iterations: int,
    styles: Sequence[int] = (32,),
    idle_s: float = 0.0,
    cancels_after: float | None = None,
    deadline_s: Callable[[], float] = lambda: math.inf,
    needs_s: float = 0.0,
    **recipe: Any,
) -> Client:
    """A client that sends one job after another. ``owner``: its name, or a function that names a new connection.
    ``deadline_s``: of the next job, after its arrival; ``needs_s``: what the forecast says that it needs."""
    while True:
        task = device.task(owner if isinstance(owner, str) else owner(), iterations, styles, **recipe)
        task.deadline_at = device.clock.now + idle_s + deadline_s()
        task.remaining = Work(needs_s, needs_s, needs_s, needs_s, 0.0, 0.0, 1) if needs_s else None
        if cancels_after is not None:
            assert isinstance(task.observer, Recorder)
            task.observer.cancel_at(device.clock.now + idle_s + cancels_after)
        yield task, idle_s
