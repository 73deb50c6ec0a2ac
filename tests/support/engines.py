"""Engines without a network: each iteration is one grey, at the speed that a test sets."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from gramophone_server.domain.engine_api import CacheCounts, KernelReport
from gramophone_server.domain.job import Losses, Report, StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, Shape
from gramophone_server.domain.picture_size import style_size
from gramophone_server.engine.checkpoint_format import CheckpointFormat
from gramophone_server.engine.optimisers import slot_layout
from gramophone_server.errors import Diverged, OutOfDeviceMemory
from tests.support.clock import WITHIN_S

CHECKPOINTS = CheckpointFormat(slot_layout)


class FakeEngine:
    """Runs while `go` is set. Iteration `fails_at` of any job raises `error`.

    An iteration of a batch takes `iteration_s`, plus `pixel_s` for each pixel of each slot, taken or not. Each style
    image takes `style_pixel_s` for each of its pixels at each scale, in steps of `step_pixels`, unless it was taken
    before and `caches_styles`; in the meantime it takes `style_bytes` of memory. To join a batch takes `join_s`. A
    batch of more than `max_pixels` (width x height x slots) runs out of memory. `clock` is
    used in place of the module `time`.
    """

    checkpoints = CHECKPOINTS
    device_name = "fake"
    precision = "fp32"
    backbone = "vgg19"
    weights_source = "none, sha256 0"
    kernels = KernelReport(by_library={}, seconds=0.02)
    style_cache = CacheCounts(hits=3, misses=2, bytes=1000, max_bytes=5000)
    layers = ("conv1_1", "relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1")

    def __init__(
        self,
        iteration_s: float = 0.0,
        fails_at: int = 0,
        error: Exception | None = None,
        *,
        pixel_s: float = 0.0,
        join_s: float = 0.0,
        style_pixel_s: float = 0.0,
        step_pixels: float = 2**17,
        style_bytes: int = 0,
        caches_styles: bool = True,
        shares_host_memory: bool = False,
        max_pixels: int = 2**31,
        memory_bytes: int = 2**40,
        clock: Any = time,
    ) -> None:
        self.clock = clock
        self.iteration_s = iteration_s
        self.pixel_s = pixel_s
        self.join_s = join_s
        self.style_pixel_s, self.step_pixels, self.style_bytes = style_pixel_s, step_pixels, style_bytes
        self.caches_styles = caches_styles
        self.cached: set[object] = set()  # styles by digest and size
        self.beginning_error: Exception | None = None  # of the next steps of beginnings
        self.steps: list[tuple[JobState, float]] = []  # of beginnings: the job, the pixels
        self.shares_host_memory = shares_host_memory
        self.close_error: Exception | None = None  # of batches
        self.device_error: Exception | None = None
        self.max_pixels = max_pixels
        self.memory_bytes = memory_bytes  # each pixel of each slot takes 1000
        self.fails_at = fails_at
        self.error = error
        self.go = threading.Event()
        self.go.set()
        self.under_way = threading.Event()  # an iteration has started
        self.jobs: list[StyleJob] = []  # as they were admitted
        self.iterations = 0  # of all jobs
        self.taken_at: list[float] = []  # when pictures were taken, on the monotonic clock
        self.thread = ""  # name of the thread of the last iteration
        self.closed = 0  # number of closed batches
        self.batches: list[FakeBatch] = []  # as they were opened
        self.joined: list[JobState] = []  # in the order in which they joined their first batch
        self.slices: list[tuple[Shape, int, int]] = []  # of each call of `advance`: shape, jobs, iterations

    def require_device(self) -> None:
        if self.device_error is not None:
            raise self.device_error

    def begin(self, state: JobState) -> FakeBeginning:
        return FakeBeginning(self, state)

    def state_bytes(self, state: JobState) -> int:
        width, height, _ = state.scales[state.scale_index]
        return 24 * width * height

    def admit(self, job: StyleJob) -> JobState:
        self.jobs.append(job)
        return JobState(job)

    def max_slots(self, shape: Shape) -> int:
        return 256

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        return 1000 * shape.width * shape.height * slots

    def picture(self, state: JobState) -> Callable[[], Tensor]:
        self.taken_at.append(self.clock.monotonic())
        picture = _seen(state.tensors["image"])
        return lambda: picture

    def batch(self, shape: Shape, slots: int) -> FakeBatch:
        if shape.width * shape.height * slots > self.max_pixels:
            raise OutOfDeviceMemory(shape.width, shape.height)
        self.batches.append(FakeBatch(self, shape, slots))
        return self.batches[-1]


class FakeBeginning:
    """The passes of a job's styles. Without `style_pixel_s` there is nothing to do."""

    def __init__(self, engine: FakeEngine, state: JobState) -> None:
        self.engine, self.state = engine, state
        width, height, _ = state.scales[state.next_scale_index]
        self.styles = []  # (key, pixels) of those that are left
        for image in state.job.styles if engine.style_pixel_s else ():
            size = style_size(image.shape[2], image.shape[1], max(width, height), state.recipe.style_scale)
            self.styles.append(((image, size), float(math.prod(size))))
        self.left = 0.0  # pixels of the first style, if it is under way

    @property
    def under_way(self) -> bool:
        return self.left > 0

    @property
    def next_pixels(self) -> float:
        missing = [pixels for key, pixels in self.styles if key not in self.engine.cached]
        return min(self.engine.step_pixels, self.left or missing[0]) if self.left or missing else 0.0

    @property
    def next_bytes(self) -> int:
        return self.engine.style_bytes if self.next_pixels else 0

    def advance(self) -> None:
        engine = self.engine
        while not self.left and self.styles and self.styles[0][0] in engine.cached:
            del self.styles[0]
        if not self.styles:
            return
        if engine.beginning_error is not None:
            self.left = 0.0
            raise engine.beginning_error
        (key, pixels) = self.styles[0]
        self.left = self.left or pixels
        step = min(engine.step_pixels, self.left)
        engine.steps.append((self.state, step))
        engine.clock.sleep(step * engine.style_pixel_s)
        self.left = self.left - step if self.left - step > 1 else 0.0
        if not self.left:
            del self.styles[0]
            if engine.caches_styles:
                engine.cached.add(key)


class FakeBatch:
    """The brightness of a slot's picture is the number of iterations that its job has completed."""

    def __init__(self, engine: FakeEngine, shape: Shape, slots: int) -> None:
        self.engine, self.shape, self.slots = engine, shape, slots
        self.states: dict[int, JobState] = {}
        self.closed = False

    def join(self, state: JobState, beginning: FakeBeginning | None = None) -> int:
        if state.joined or state.finished or state.shape != self.shape or len(self.states) == self.slots:
            raise ValueError("the job does not fit")
        if state.next_scale_index != state.scale_index:
            state.scale_index, state.averaged = state.next_scale_index, 0
        self.engine.clock.sleep(self.engine.join_s)
        slot = next(slot for slot in range(self.slots) if slot not in self.states)
        state.tensors, state.joined = None, True
        self.states[slot] = state
        if state not in self.engine.joined:
            self.engine.joined.append(state)
        return slot

    def leave(self, slot: int, *, to_host: bool = False) -> JobState:
        state = self.states.pop(slot)
        state.tensors, state.joined = self._tensors(state), False
        return state

    def drop(self, slot: int) -> None:
        self.states.pop(slot).joined = False

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        engine = self.engine
        if not self.states or not all(state.iterations_left for state in self.states.values()):
            raise ValueError("no job, or a job that has to leave")
        n = min(iterations, *(state.iterations_left for state in self.states.values()))
        engine.slices.append((self.shape, len(self.states), n))
        engine.thread = threading.current_thread().name
        engine.under_way.set()
        assert engine.go.wait(WITHIN_S), "the test did not set `go` again"
        engine.clock.sleep(
            n * (engine.iteration_s + engine.pixel_s * self.shape.width * self.shape.height * self.slots)
        )
        reports = {}
        for slot, state in self.states.items():
            if engine.error is not None and state.done < engine.fails_at <= state.done + n:
                if not isinstance(engine.error, Diverged):
                    raise engine.error
                state.diverged_at = engine.fails_at
            state.count_iterations(n)
            engine.iterations += n
            beta = state.recipe.beta  # shows a test when the weights changed
            losses = Losses(content={"relu4_2": 1.0 / state.done}, style={"relu1_1": beta / state.done}, tv=0.5)
            reports[slot] = state.report(losses)
        return reports

    def iterations_left(self, slot: int) -> int:
        return self.states[slot].iterations_left

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        self.engine.taken_at.append(self.engine.clock.monotonic())
        picture = _seen(self._tensors(self.states[slot])["image"])
        return lambda: picture

    def copy(self, slot: int) -> JobState:
        state = self.states[slot]
        return replace(state, joined=False, tensors=self._tensors(state))

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        return self.states[slot].update(**changes)

    def close(self) -> None:
        self.closed = True
        self.engine.closed += 1
        if self.engine.close_error is not None:
            raise self.engine.close_error

    def _tensors(self, state: JobState) -> dict[str, Tensor]:
        width, height, _ = state.scales[state.scale_index]
        good = state.diverged_at - 1 if state.diverged_at else state.done
        grey = torch.full((3, height, width), min(255, good) / 255)
        return {"image": grey, "last_good": grey}


class NoisyEngine(FakeEngine):
    """An engine whose pictures do not compress. `snapshot_times` holds when the first of each iteration was taken."""

    def __init__(self, side: int, **options: Any) -> None:
        super().__init__(**options)
        self.noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
        self.snapshot_times: dict[int, float] = {}  # by iteration, on the monotonic clock

    def batch(self, shape: Shape, slots: int) -> FakeBatch:
        batch = super().batch(shape, slots)

        def snapshot(slot: int) -> Callable[[], Tensor]:
            self.snapshot_times.setdefault(batch.states[slot].done, self.clock.monotonic())
            return lambda: self.noise

        batch.snapshot = snapshot  # type: ignore[method-assign]
        return batch


def _seen(image: Tensor) -> Tensor:
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
