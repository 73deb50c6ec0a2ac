"""The engine's batch: the slots of a graph runner, and the jobs in them."""

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
from gramophone_server.engine.scales import current_picture, resize, tensors_for_scale
from gramophone_server.engine.style_targets import StyleBeginning, StyleTargets
from gramophone_server.errors import OutOfDeviceMemory

__all__ = ["EngineBatch"]


class EngineBatch:
    """Jobs of one shape that share the iterations of a graph runner; implements `engine_api.Batch`."""

    def __init__(
        self,
        runners: GraphRunnerPool,
        style_targets: StyleTargets,
        copier: DeviceToHostCopier,
        shape: Shape,
        slots: int,
    ) -> None:
        self.shape, self.slots = shape, slots
        self._runners, self._style_targets, self._copier = runners, style_targets, copier
        self._states: dict[int, JobState] = {}
        with self._within_memory(shape.width, shape.height):
            self.runner = runners.take(shape, slots)

    @property
    def states(self) -> Mapping[int, JobState]:
        """See `engine_api.Batch.states`."""
        return MappingProxyType(self._states)

    def join(self, state: JobState, beginning: StyleBeginning | None = None) -> int:
        """See `engine_api.Batch.join`."""
        if state.joined or state.finished:
            raise ValueError("the job is in a batch already" if state.joined else "the job has no iteration left")
        if state.shape != self.shape:
            raise ValueError(f"the job's shape is {state.shape}, the batch's {self.shape}")
        slot = next((slot for slot in range(self.slots) if slot not in self._states), None)
        if slot is None:
            raise ValueError(f"all {self.slots} slots are taken")
        try:
            with self._within_memory(*state.job.result_size):
                self._fill(slot, state, beginning or self._style_targets.beginning(state))
                if self.runner.canvas.image.is_cuda:
                    torch.cuda.current_stream().synchronize()  # so that the time of a join is that of its job
        except BaseException:
            self.runner.clear(slot)
            raise
        if state.next_scale_index != state.scale_index:
            state.scale_index, state.averaged = state.next_scale_index, 0
        state.tensors, state.joined = None, True
        self._states[slot] = state
        return slot

    def leave(self, slot: int, *, to_host: bool = False) -> JobState:
        """See `engine_api.Batch.leave`. If the device has no room for the job's tensors, they are on the CPU."""
        state = self._states[slot]
        try:
            tensors = self.runner.take(slot, to_cpu=to_host)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            with self._within_memory(*state.job.result_size):
                tensors = self.runner.take(slot, to_cpu=True)
        del self._states[slot]
        self.runner.clear(slot)
        state.tensors, state.joined = tensors, False
        return state

    def drop(self, slot: int) -> None:
        """See `engine_api.Batch.drop`."""
        self._states.pop(slot).joined = False
        self.runner.clear(slot)

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        """See `engine_api.Batch.advance`."""
        for slot, state in self._states.items():
            if not state.iterations_left:
                raise ValueError(f"the job in slot {slot} has no iteration left at this scale: it must leave")
        if not self._states:
            raise ValueError("no job is in the batch")
        count = min(iterations, *(state.iterations_left for state in self._states.values()))
        with self._within_memory(self.shape.width, self.shape.height):
            try:
                self.runner.iterate(count)
                results = self._read_results()
            except Exception as error:
                if ran_out_of_memory(error):
                    self._read_counts()
                raise
        reports = {}
        for slot, state in self._states.items():
            state.count_iterations(count)
            losses, diverged_at = results[slot]
            # The device counts gradients; after a light checkpoint these are fewer than the iterations.
            state.diverged_at = diverged_at and diverged_at + state.done - state.gradients
            reports[slot] = state.report(losses)
        return reports

    def iterations_left(self, slot: int) -> int:
        """See `engine_api.Batch.iterations_left`."""
        return self._states[slot].iterations_left

    def picture(self, slot: int) -> Tensor:
        """The current picture of a job: uint8 [height, width, 3], RGB, a copy on the CPU."""
        return self.snapshot(slot)()

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        """See `engine_api.Batch.snapshot`."""
        state = self._states[slot]
        with self._within_memory(*state.job.result_size):
            pictures = self.runner.canvas.slot(slot)
            picture = current_picture(pictures, self.shape.average, state.averaged, not state.diverged_at)
            return self._copier.take(picture)

    def copy(self, slot: int) -> JobState:
        """See `engine_api.Batch.copy`."""
        state = self._states[slot]
        with self._within_memory(*state.job.result_size):
            return replace(state, joined=False, tensors=self.runner.take(slot, to_cpu=True))

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        """See `engine_api.Batch.update`."""
        state = self._states[slot]
        before, first = (state.recipe, state.scales), state.update(**changes)
        try:
            with self._within_memory(*state.job.result_size), torch.inference_mode():
                self.runner.objective.set_weights(slot, state.recipe)
                self.runner.canvas.step[slot] = state.recipe.step
        except BaseException:
            state.recipe, state.scales = before
            raise
        return first

    def close(self) -> None:
        """See `engine_api.Batch.close`. The buffers are kept for the next batch of the shape."""
        if self.slots:
            self._runners.give_back(self.runner)
            self._states.clear()
            self.slots = 0

    @torch.inference_mode()
    def _fill(self, slot: int, state: JobState, beginning: StyleBeginning) -> None:
        job, shape, device = state.job, self.shape, self.runner.canvas.image.device
        content = resize(job.content.to(device), shape.width, shape.height)
        tensors = tensors_for_scale(state, content)
        styles = list(zip(beginning.finish(), job.style_weights, strict=True))
        self.runner.objective.set_targets(slot, state.recipe, content, styles)
        # On the device by gradients, as in `advance`.
        diverged_at = state.diverged_at and state.diverged_at - (state.done - state.gradients)
        self.runner.put(slot, tensors, state.recipe.step, state.gradients, diverged_at)

    @torch.inference_mode()
    def _read_results(self) -> list[tuple[Losses, int]]:
        """For each slot, the last losses and the number of the gradient that was not finite, 0 for none.

        This is the only place that waits for the device, and it does so once.
        """
        runner, content, style = self.runner, self.shape.content_layers, self.shape.style_layers
        rows = torch.cat([runner.terms.double(), runner.canvas.diverged_at[None].double()]).T.tolist()
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

    def _read_counts(self) -> None:
        """Reads back how many iterations completed before the device ran out of memory.

        The device increments its counter only after a successful evaluation, which is what takes the memory.
        """
        counts = self.runner.canvas.count.tolist()
        for slot, state in self._states.items():
            state.count_iterations(counts[slot] - state.gradients)

    @contextlib.contextmanager
    def _within_memory(self, width: int, height: int) -> Iterator[None]:
        """Turns running out of memory into `OutOfDeviceMemory` for this size, and empties the engine's caches."""
        try:
            yield
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            self._style_targets.clear()
            self._runners.clear()
            raise OutOfDeviceMemory(width, height) from error
