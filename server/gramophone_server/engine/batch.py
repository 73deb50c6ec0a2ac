"""The engine's batch: slots of a stage, and the jobs in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Unpack

import torch
from torch import Tensor

from gramophone_server.domain.job import Losses, Report, ran_out_of_memory
from gramophone_server.domain.job_state import JobState, RecipeUpdate, Shape
from gramophone_server.engine.device_copy import DeviceToHostCopier
from gramophone_server.engine.graph_runner import GraphRunnerPool
from gramophone_server.engine.scales import prepared, resize, shown, style_size
from gramophone_server.engine.style_targets import StyleTargets
from gramophone_server.errors import OutOfDeviceMemory

__all__ = ["EngineBatch"]


class EngineBatch:
    """Jobs of one shape that share the iterations of a stage; see `work.Batch`."""

    def __init__(
        self, stages: GraphRunnerPool, targets: StyleTargets, snapshots: DeviceToHostCopier, shape: Shape, slots: int
    ) -> None:
        self.shape, self.slots = shape, slots
        self._stages, self._targets, self._snapshots = stages, targets, snapshots
        self._states: dict[int, JobState] = {}
        with self._within_memory(shape.width, shape.height):
            self.stage = stages.take(shape, slots)

    @property
    def states(self) -> Mapping[int, JobState]:
        """The jobs by slot; see `engine_api.Batch.states`."""
        return MappingProxyType(self._states)

    def join(self, work: JobState) -> int:
        """Takes a job in; see `work.Batch.join`."""
        if work.joined or work.finished:
            raise ValueError("the job is in a batch already" if work.joined else "the job has no iteration left")
        if work.shape != self.shape:
            raise ValueError(f"the job's shape is {work.shape}, the batch's {self.shape}")
        slot = next((slot for slot in range(self.slots) if slot not in self._states), None)
        if slot is None:
            raise ValueError(f"all {self.slots} slots are taken")
        try:
            with self._within_memory(*work.job.result_size):
                self._fill(slot, work)
        except BaseException:
            self.stage.clear(slot)
            raise
        if work.next_at != work.at:
            work.at, work.averaged = work.next_at, 0
        work.tensors, work.joined = None, True
        self._states[slot] = work
        return slot

    def leave(self, slot: int) -> JobState:
        """Hands a job back; see `work.Batch.leave`. Where the device has no room for its tensors, they come to the CPU."""
        work = self._states[slot]
        try:
            tensors = self.stage.take(slot)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            with self._within_memory(*work.job.result_size):
                tensors = self.stage.take(slot, to_cpu=True)
        del self._states[slot]
        self.stage.clear(slot)
        work.tensors, work.joined = tensors, False
        return work

    def drop(self, slot: int) -> None:
        """Empties a slot; see `work.Batch.drop`."""
        self._states.pop(slot).joined = False
        self.stage.clear(slot)

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        """Some iterations of every job; see `work.Batch.advance`."""
        for slot, work in self._states.items():
            if not work.iterations_left:
                raise ValueError(f"the job in slot {slot} has no iteration left at this scale: it must leave")
        if not self._states:
            raise ValueError("no job is in the batch")
        n = min(iterations, *(work.iterations_left for work in self._states.values()))
        with self._within_memory(self.shape.width, self.shape.height):
            try:
                self.stage.iterate(n)
                read = self._read()
            except Exception as error:
                if ran_out_of_memory(error):
                    self._catch_up()
                raise
        reports = {}
        for slot, work in self._states.items():
            work.advanced(n)
            losses, diverged_at = read[slot]
            work.diverged_at = diverged_at and diverged_at + work.done - work.gradients
            reports[slot] = work.report(losses)
        return reports

    def iterations_left(self, slot: int) -> int:
        """Of a job at this scale."""
        return self._states[slot].iterations_left

    def picture(self, slot: int) -> Tensor:
        """The present picture of a job: uint8 [height, width, 3], RGB, a copy on the CPU."""
        return self.snapshot(slot)()

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        """The present picture of a job, for later; see `work.Batch.snapshot`."""
        work = self._states[slot]
        with self._within_memory(*work.job.result_size):
            pictures = self.stage.canvas.slot(slot)
            return self._snapshots.take(shown(pictures, self.shape.average, work.averaged, not work.diverged_at))

    def copy(self, slot: int) -> JobState:
        """A job as it is now, on the CPU; see `work.Batch.copy`."""
        work = self._states[slot]
        with self._within_memory(*work.job.result_size):
            return replace(work, joined=False, tensors=self.stage.take(slot, to_cpu=True))

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        """Changes weights or the step of a job; see `work.Batch.update`."""
        work = self._states[slot]
        before, first = (work.recipe, work.scales), work.update(**changes)
        try:
            with self._within_memory(*work.job.result_size), torch.inference_mode():
                self.stage.objective.set_weights(slot, work.recipe)
                self.stage.canvas.step[slot] = work.recipe.step
        except BaseException:
            work.recipe, work.scales = before
            raise
        return first

    def close(self) -> None:
        """Leaves the buffers to the next batch; see `work.Batch.close`."""
        if self.slots:
            self._stages.give_back(self.stage)
            self._states.clear()
            self.slots = 0

    @torch.inference_mode()
    def _fill(self, slot: int, work: JobState) -> None:
        job, shape, device = work.job, self.shape, self.stage.canvas.image.device
        content = resize(job.content.to(device), shape.width, shape.height)
        tensors = prepared(work, content)
        longest = max(shape.width, shape.height)
        grams = [
            self._targets.grams(
                style, digest, *style_size(style, longest, work.recipe.style_scale), shape.style_layers, shape.pooling
            )
            for style, digest in zip(job.styles, job.style_digests, strict=True)
        ]
        self.stage.objective.set_targets(slot, work.recipe, content, list(zip(grams, job.style_weights, strict=True)))
        before = work.done - work.gradients  # iterations that the device's count knows nothing of
        diverged_at = work.diverged_at and work.diverged_at - before
        self.stage.put(slot, tensors, work.recipe.step, work.gradients, diverged_at)

    @torch.inference_mode()
    def _read(self) -> list[tuple[Losses, int]]:
        """By slot, of the last iteration: the losses, and which gradient was not finite. The only place that waits for
        the device, and it does so once."""
        stage, content, style = self.stage, self.shape.content_layers, self.shape.style_layers
        rows = torch.cat([stage.terms.double(), stage.canvas.diverged_at[None].double()]).T.tolist()
        return [
            (
                Losses(
                    content=dict(zip(content, column[: len(content)], strict=True)),
                    style=dict(zip(style, column[len(content) :], strict=True)),
                    tv=tv,
                ),
                int(diverged_at),
            )
            for *column, tv, diverged_at in rows
        ]

    def _catch_up(self) -> None:
        """Counts what was done before the memory ended: an evaluation, which takes the memory, is counted behind it."""
        counts = self.stage.canvas.count.tolist()
        for slot, work in self._states.items():
            work.advanced(counts[slot] - work.gradients)

    @contextlib.contextmanager
    def _within_memory(self, width: int, height: int) -> Iterator[None]:
        """Raises `OutOfDeviceMemory` where memory ends, and drops what was only kept in case."""
        try:
            yield
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            self._targets.clear()
            self._stages.clear()
            raise OutOfDeviceMemory(width, height) from error
