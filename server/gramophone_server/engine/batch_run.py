"""Runs of jobs through all their scales as one batch, without a scheduler: warm-up, benchmarks and tests use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.engine.batch import EngineBatch
from gramophone_server.errors import OutOfDeviceMemory

__all__ = ["BatchRun"]

# The fields of a recipe that jobs of one run must have in common: they have the same shape at every scale, and go from
# scale to scale at the same iteration.
SHARED_FIELDS = (
    "pooling",
    "size",
    "optimiser",
    "iterations",
    "coarse_iterations",
    "smallest_size",
    "average",
)


class BatchRun:
    """A run of jobs as one batch, made by `VggEngine.run_batch`. Belongs to the engine's thread.

    A job that diverges does not disturb the others, and shows its last good picture from then on. Methods may raise
    `errors.OutOfDeviceMemory`.
    """

    def __init__(self, new_batch: Callable[[Shape, int], EngineBatch], states: Sequence[JobState]) -> None:
        """``new_batch``: makes an empty batch of a shape and a number of slots.

        Raises `ValueError` if the jobs differ in more than a run allows.
        """
        for state in states[1:]:
            _require_shared(states[0].job, state.job)
        self._new_batch = new_batch
        self._states = states
        self._batch: EngineBatch | None = None  # of the current scale; slot i has job i
        self._closed = False

    @property
    def finished(self) -> bool:
        """Whether no iteration is left, or the run is closed."""
        return self._closed or self._states[0].finished

    def advance(self, iterations: int = 1) -> tuple[Report, ...]:
        """Runs up to ``iterations`` iterations of every job, but none beyond the current scale.

        Returns each job's report of the last iteration, in the order of the jobs. Waits for the device once, at the
        end.
        """
        try:
            if not self._states[0].iterations_left:
                self._next_scale()
            return tuple(self.batch.advance(iterations).values())
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(*self._states[0].job.result_size) from error

    def picture(self, index: int) -> Tensor:
        """The current picture of one job at the current scale: uint8 [height, width, 3], RGB, a copy on the CPU."""
        return self.batch.picture(index)

    def snapshot(self, index: int) -> Callable[[], Tensor]:
        """Starts a copy of the current picture; see `engine_api.Batch.snapshot`."""
        return self.batch.snapshot(index)

    def close(self) -> None:
        """Returns the buffers to the engine. No other method but `finished` may be called afterwards."""
        if self._batch is not None:
            self._batch.close()
            self._batch = None
        self._closed = True

    @property
    def batch(self) -> EngineBatch:
        """The batch of the current scale, which all jobs have joined."""
        assert not self._closed, "the run is closed"
        return self._batch or self._next_scale()

    def _next_scale(self) -> EngineBatch:
        if self._batch is not None:
            for slot in range(len(self._states)):
                self._batch.leave(slot)
            self._batch.close()
            self._batch = None
        batch = self._new_batch(self._states[0].shape, len(self._states))
        for state in self._states:
            batch.join(state)
        self._batch = batch
        return batch


def _require_shared(first: StyleJob, other: StyleJob) -> None:
    for name in SHARED_FIELDS:
        a, b = getattr(first.recipe, name), getattr(other.recipe, name)
        if a != b:
            raise ValueError(f"jobs of a run must have the same {name}, got {a} and {b}")
    for name in ("content_layers", "style_layers"):
        a, b = ([layer for layer, _ in getattr(job.recipe, name)] for job in (first, other))
        if a != b:
            raise ValueError(f"jobs of a run must have the same {name}, got {a} and {b}")
    if first.result_size != other.result_size:
        raise ValueError(f"jobs of a run must have one size, got {first.result_size} and {other.result_size}")
