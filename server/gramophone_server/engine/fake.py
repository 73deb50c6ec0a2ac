"""An engine that makes patterns at a set speed instead of art, to measure everything around the engine.

An iteration of a batch takes the same time for every size and width, and the compute thread sleeps during it. So
sharing a batch is always faster, and a benchmark measures the transport, the scheduler and the encoders. Like the real
engine it is deterministic: a picture is a function of the job's seed, the size and the iteration, so a job that was
moved, resumed or batched must have the same pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Unpack

import torch
from torch import Tensor

from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.engine_api import CacheCounts, KernelReport
from gramophone_server.domain.job import Losses, Report, StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, Shape, SlotTensors
from gramophone_server.engine.checkpoint_format import CheckpointFormat
from gramophone_server.network.vgg import BACKBONES

__all__ = ["FakeEngine"]

MAX_SLOTS = 256
BYTES_PER_PIXEL = 276  # as with L-BFGS's state, so that memory limits can be tested
MEMORY_BYTES = 8 * 2**30
# Of the state of the real optimisers: bytes per pixel, and bytes at any size.
STATE_BYTES = {Optimiser.ADAM: (24, 0), Optimiser.LBFGS: (252, 3632)}
KEPT_PATTERNS = 64  # a pattern of 512 x 512 px has 0.75 MiB


def _layout(recipe: Recipe, height: int, width: int) -> SlotTensors:
    """Pictures, and a filler that makes checkpoints as large as those of the real engine. So each engine reads the
    checkpoints of the other; see `optimisers.slot_layout`."""
    image = torch.empty((3, height, width), device="meta")
    pictures = {"image": image, "last_good": image, **({"mean": image} if recipe.average else {})}
    per_pixel, fixed = STATE_BYTES.get(recipe.optimiser, (0, 0))
    if not (state_bytes := per_pixel * height * width + fixed):
        return pictures
    return pictures | {"filler": torch.empty(state_bytes, dtype=torch.uint8, device="meta")}


class FakeEngine:
    """Implements `engine_api.Engine` without a network."""

    device_name = "none: a fake engine, which makes patterns"
    precision = "none"
    backbone = "none"
    weights_source = "none"
    layers = tuple(
        f"{kind}{block}_{number}"
        for block, count in enumerate(BACKBONES["vgg19"], 1)
        for number in range(1, count + 1)
        for kind in ("conv", "relu")
    )
    kernels = KernelReport(by_library={}, seconds=0.0)
    style_cache = CacheCounts(hits=0, misses=0, bytes=0, max_bytes=0)
    memory_bytes = MEMORY_BYTES
    checkpoints = CheckpointFormat(_layout)

    def __init__(self, iteration_s: float, *, sleep: Callable[[float], object] = time.sleep) -> None:
        """``iteration_s``: seconds that an iteration of a batch takes, 0 or more. ``sleep``: waits for some seconds."""
        self.iteration_s = iteration_s
        self.sleep = sleep

    @property
    def shares_host_memory(self) -> bool:
        """See `engine_api.BatchEngine`. `MEMORY_BYTES` are those of a device that does not exist."""
        return False

    def begin(self, state: JobState) -> FakeBeginning:
        """See `engine_api.BatchEngine`."""
        return FakeBeginning()

    def state_bytes(self, state: JobState) -> int:
        """See `engine_api.BatchEngine`."""
        return self.checkpoints.tensor_bytes(state)

    def admit(self, job: StyleJob) -> JobState:
        """See `engine_api.BatchEngine`."""
        return JobState(job)

    def batch(self, shape: Shape, slots: int) -> FakeBatch:
        """See `engine_api.BatchEngine`."""
        if not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"a batch has 1 to {MAX_SLOTS} slots, got {slots}")
        return FakeBatch(self, shape, slots)

    def max_slots(self, shape: Shape) -> int:
        """See `engine_api.BatchEngine`."""
        return MAX_SLOTS

    def require_device(self) -> None:
        """See `engine_api.BatchEngine`."""

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        """See `engine_api.BatchEngine`."""
        return BYTES_PER_PIXEL * shape.width * shape.height * slots

    def picture(self, state: JobState) -> Callable[[], Tensor]:
        """See `engine_api.BatchEngine`."""
        return _shown(state)


class FakeBeginning:
    """Implements `engine_api.Beginning`: patterns need nothing."""

    next_pixels = 0.0
    next_bytes = 0
    under_way = False

    def advance(self) -> None:
        """See `engine_api.Beginning`."""


class FakeBatch:
    """Implements `engine_api.Batch`. A job's tensors are made from its picture when it leaves."""

    def __init__(self, engine: FakeEngine, shape: Shape, slots: int) -> None:
        self.shape, self.slots = shape, slots
        self.states: dict[int, JobState] = {}
        self._engine = engine

    def join(self, state: JobState, beginning: FakeBeginning | None = None) -> int:
        """See `engine_api.Batch`."""
        if state.joined or state.finished or state.shape != self.shape or len(self.states) == self.slots:
            raise ValueError("the batch is full or of another shape, or the job is in a batch or at its end")
        if state.next_scale_index != state.scale_index:
            state.scale_index, state.averaged = state.next_scale_index, 0
        slot = next(slot for slot in range(self.slots) if slot not in self.states)
        state.tensors, state.joined = None, True
        self.states[slot] = state
        return slot

    def leave(self, slot: int, *, to_host: bool = False) -> JobState:
        """See `engine_api.Batch`."""
        state = self.states.pop(slot)
        state.tensors, state.joined = _tensors(state), False
        return state

    def drop(self, slot: int) -> None:
        """See `engine_api.Batch`."""
        self.states.pop(slot).joined = False

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        """See `engine_api.Batch`."""
        left = min((state.iterations_left for state in self.states.values()), default=0)
        if not left:
            raise ValueError("the batch has no job, or a job without an iteration left at this scale")
        count = min(iterations, left)
        if self._engine.iteration_s:
            self._engine.sleep(count * self._engine.iteration_s)
        for state in self.states.values():
            state.count_iterations(count)
        return {slot: state.report(_losses(state)) for slot, state in self.states.items()}

    def iterations_left(self, slot: int) -> int:
        """See `engine_api.Batch`."""
        return self.states[slot].iterations_left

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        """See `engine_api.Batch`."""
        return _shown(self.states[slot])

    def copy(self, slot: int) -> JobState:
        """See `engine_api.Batch`."""
        state = self.states[slot]
        return replace(state, joined=False, tensors=_tensors(state))

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        """See `engine_api.Batch`."""
        return self.states[slot].update(**changes)

    def close(self) -> None:
        """See `engine_api.Batch`. Does nothing."""


def _losses(state: JobState) -> Losses:
    """Losses that fall with the iterations and show the job's weights."""
    recipe = state.recipe
    return Losses(
        content={layer: recipe.alpha * weight / state.done for layer, weight in recipe.content_layers},
        style={layer: recipe.beta * weight / state.done for layer, weight in recipe.style_layers},
        tv=recipe.tv_weight / state.done,
    )


def _shown(state: JobState) -> Callable[[], Tensor]:
    width, height, _ = state.scales[state.scale_index]
    moved = (state.job.seed + state.done) % 256
    return lambda: _pattern(height, width) + moved  # uint8 wraps around


def _tensors(state: JobState) -> dict[str, Tensor]:
    image = _shown(state)().permute(2, 0, 1).float() / 255
    return {"image": image, "last_good": image}


@lru_cache(maxsize=KEPT_PATTERNS)
def _pattern(height: int, width: int) -> Tensor:
    """uint8 [height, width, 3]: colour ramps and a little noise, so that it compresses about as well as a picture."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 32, (height, width, 3), generator=generator)
    slopes = torch.arange(height)[:, None, None] + 2 * torch.arange(width)[None, :, None] + 85 * torch.arange(3)
    return ((slopes // 2 + noise) % 256).to(torch.uint8)
