"""An engine that makes no art: patterns at a set pace, to see what everything around the engine carries.

An iteration of a batch takes the same time whatever its size and width, and the compute thread sleeps through it. So a
batch pays always, and what is measured is the transport, the scheduler and the encoders. Like the real one it is
deterministic: a picture is a function of the job's seed, the size and the iteration, so a job that was moved, resumed or
batched must show the same.
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
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.domain.job import Losses, Report, StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, Shape, SlotTensors
from gramophone_server.engine.checkpoint_format import CheckpointFormat
from gramophone_server.network.vgg import BACKBONES

__all__ = ["FakeEngine"]

MOST_SLOTS = 256
BYTES_PER_PIXEL = 276  # as if it had L-BFGS's state, so that limits of memory can be tried
MEMORY_BYTES = 8 * 2**30
STATE_BYTES_PER_PIXEL = {Optimiser.ADAM: 24, Optimiser.LBFGS: 252}  # of the real optimisers
KEPT_PATTERNS = 64  # one of 512 x 512 px has 0.75 MiB


def _layout(recipe: Recipe, height: int, width: int) -> SlotTensors:
    """Pictures, and a filler that makes checkpoints as large as those of the real engine; see `optimisers.layout`."""
    image = torch.empty((3, height, width), device="meta")
    held = {"image": image, "last_good": image, **({"mean": image} if recipe.average else {})}
    state = STATE_BYTES_PER_PIXEL.get(recipe.optimiser, 0)
    return held | {"filler": torch.empty((height, width, state), dtype=torch.uint8, device="meta")}


class FakeEngine:
    """See `work.Engine`."""

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
    style_cache = CacheCounts(hits=0, misses=0, bytes=0, most_bytes=0)
    memory_bytes = MEMORY_BYTES
    checkpoints = CheckpointFormat(_layout)

    def __init__(self, iteration_s: float) -> None:
        """``iteration_s``: seconds that an iteration of a batch takes; 0: none."""
        self.iteration_s = iteration_s

    def admit(self, job: StyleJob) -> JobState:
        """See `work.BatchEngine`."""
        return JobState(job)

    def batch(self, shape: Shape, slots: int) -> FakeBatch:
        """See `work.BatchEngine`."""
        if not 1 <= slots <= MOST_SLOTS:
            raise ValueError(f"a batch has 1 to {MOST_SLOTS} slots, got {slots}")
        return FakeBatch(self, shape, slots)

    def most_slots(self, shape: Shape) -> int:
        """See `work.BatchEngine`."""
        return MOST_SLOTS

    def require_device(self) -> None:
        """See `work.BatchEngine`."""

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        """See `work.BatchEngine`."""
        return BYTES_PER_PIXEL * shape.width * shape.height * slots

    def picture(self, work: JobState) -> Callable[[], Tensor]:
        """See `work.BatchEngine`."""
        return _shown(work)


class FakeBatch:
    """See `work.Batch`. A job's tensors are made when it leaves, of its picture; it needs no others."""

    def __init__(self, engine: FakeEngine, shape: Shape, slots: int) -> None:
        self.shape, self.slots = shape, slots
        self.states: dict[int, JobState] = {}
        self._engine = engine

    def join(self, work: JobState) -> int:
        """See `work.Batch`."""
        if work.joined or work.finished or work.shape != self.shape or len(self.states) == self.slots:
            raise ValueError("the batch is full or of another shape, or the job is in a batch or at its end")
        if work.next_at != work.at:
            work.at, work.averaged = work.next_at, 0
        slot = next(slot for slot in range(self.slots) if slot not in self.states)
        work.tensors, work.joined = None, True
        self.states[slot] = work
        return slot

    def leave(self, slot: int) -> JobState:
        """See `work.Batch`."""
        work = self.states.pop(slot)
        work.tensors, work.joined = _tensors(work), False
        return work

    def drop(self, slot: int) -> None:
        """See `work.Batch`."""
        self.states.pop(slot).joined = False

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        """See `work.Batch`."""
        left = min((work.iterations_left for work in self.states.values()), default=0)
        if not left:
            raise ValueError("a batch needs jobs, and each an iteration to do here")
        n = min(iterations, left)
        if self._engine.iteration_s:
            time.sleep(n * self._engine.iteration_s)
        for work in self.states.values():
            work.advanced(n)
        return {slot: work.report(_losses(work)) for slot, work in self.states.items()}

    def iterations_left(self, slot: int) -> int:
        """See `work.Batch`."""
        return self.states[slot].iterations_left

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        """See `work.Batch`."""
        return _shown(self.states[slot])

    def copy(self, slot: int) -> JobState:
        """See `work.Batch`."""
        work = self.states[slot]
        return replace(work, joined=False, tensors=_tensors(work))

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        """See `work.Batch`."""
        return self.states[slot].update(**changes)

    def close(self) -> None:
        """See `work.Batch`. There is nothing to give back."""


def _losses(work: JobState) -> Losses:
    """They fall, and tell the weights."""
    recipe = work.recipe
    return Losses(
        content={layer: recipe.alpha * weight / work.done for layer, weight in recipe.content_layers},
        style={layer: recipe.beta * weight / work.done for layer, weight in recipe.style_layers},
        tv=recipe.tv_weight / work.done,
    )


def _shown(work: JobState) -> Callable[[], Tensor]:
    width, height, _ = work.scales[work.at]
    moved = (work.job.seed + work.done) % 256
    return lambda: _pattern(height, width) + moved  # which wraps


def _tensors(work: JobState) -> dict[str, Tensor]:
    image = _shown(work)().permute(2, 0, 1).float() / 255
    return {"image": image, "last_good": image}


@lru_cache(maxsize=KEPT_PATTERNS)
def _pattern(height: int, width: int) -> Tensor:
    """uint8 [height, width, 3]: slopes and a little noise, so that it compresses about as a picture does."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 32, (height, width, 3), generator=generator)
    slopes = torch.arange(height)[:, None, None] + 2 * torch.arange(width)[None, :, None] + 85 * torch.arange(3)
    return ((slopes // 2 + noise) % 256).to(torch.uint8)
