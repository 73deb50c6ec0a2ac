"""The engine as the scheduler knows it: protocols, so that neither it nor its tests need kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, Unpack

from torch import Tensor

from gramophone_server.domain.checkpoint import Checkpoint
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, Shape

__all__ = ["Batch", "BatchEngine", "CacheCounts", "Checkpoints", "Engine"]


class CacheCounts(NamedTuple):
    """What a cache has done since the start, and what it holds now."""

    hits: int
    misses: int
    bytes: int
    most_bytes: int


class Batch(Protocol):
    """So many slots for jobs of one shape, which join and leave between iterations. Belongs to one thread.

    A job's result does not depend on who is in the other slots, and no slot is touched when a job joins or leaves
    another. An empty slot costs as much time as a taken one.

    Every method may raise `errors.OutOfDeviceMemory`. Nothing is lost then: whoever was to join is as it was before, and
    the jobs in the batch stand at their last whole iteration and can leave. After any other exception they are lost.
    """

    @property
    def shape(self) -> Shape:
        """Of every job in it."""

    @property
    def slots(self) -> int:
        """Its width."""

    @property
    def states(self) -> Mapping[int, JobState]:
        """The jobs in it by slot. They count on while they are in it, but have no tensors."""

    def join(self, work: JobState) -> int:
        """Takes a job into the lowest free slot, which is returned. Raises `ValueError` where there is none, the shape is
        another, no iteration is left or the job is in a batch."""

    def leave(self, slot: int) -> JobState:
        """Hands the job back with its tensors, and empties the slot."""

    def drop(self, slot: int) -> None:
        """Empties the slot; its job is over, or lost."""

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        """Does so many iterations of every job, but none beyond the scale of any, and reports each as of the last, by
        slot. The device is waited for once, at the end. Raises `ValueError` if a job has none left here."""

    def iterations_left(self, slot: int) -> int:
        """Of the job at this scale."""

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        """The present picture of a job, as `job.Run.snapshot`: uint8 [height, width, 3], waited for by the call."""

    def copy(self, slot: int) -> JobState:
        """The job as it is now, on the CPU and in no batch: for a checkpoint. The job itself goes on."""

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        """Changes weights or the step of a job from the next iteration on, which is returned. Nothing is captured anew.
        Raises `InvalidRecipe`."""

    def close(self) -> None:
        """Gives back what the batch holds. Jobs that have not left are lost."""


class Checkpoints(Protocol):
    """How an engine writes a job's state as bytes and reads it again, see `engine.checkpoint_format`. For any thread."""

    def size(self, state: JobState, *, light: bool = False) -> int:
        """Bytes of a checkpoint of the job; a light one has the picture and no state of the optimiser."""

    def require_room(self, state: JobState, *, light: bool = False, most_bytes: int) -> None:
        """Raises `errors.InvalidRequest` if a checkpoint of the job takes more than ``most_bytes``."""

    def write(self, state: JobState, *, picture: Tensor | None = None, most_bytes: int) -> bytes:
        """The bytes of a job that is in no batch; with ``picture``, uint8 [height, width, 3], a light checkpoint. Raises
        `errors.InvalidRequest` if they are more than ``most_bytes``, and `ValueError` if the job has no state to write."""

    def read(self, data: bytes, *, most_bytes: int) -> Checkpoint:
        """What `write` wrote. Raises `errors.InvalidRequest`."""


class BatchEngine(Protocol):
    """An engine whose jobs share batches."""

    @property
    def memory_bytes(self) -> int:
        """That batches may take on the device, all together."""

    @property
    def checkpoints(self) -> Checkpoints:
        """The format of this engine's checkpoints."""

    def require_device(self) -> None:
        """Raises whatever the device raises if it is of no use any more. Costs an addition on it."""

    def admit(self, job: StyleJob) -> JobState:
        """A job that has not begun; takes nothing on the device. Raises `errors.InvalidRequest` if it never could."""

    def picture(self, work: JobState) -> Callable[[], Tensor]:
        """`Batch.snapshot` of a job that has begun and is in no batch."""

    def batch(self, shape: Shape, slots: int) -> Batch:
        """An empty batch. Raises `ValueError` above `most_slots`, and `errors.OutOfDeviceMemory`."""

    def most_slots(self, shape: Shape) -> int:
        """How many slots the device's libraries can count, whatever the memory."""

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        """Bytes on the device that a batch takes, without the network; an estimate, exact to some percent. Costs
        milliseconds the first time, nothing after that."""


class Engine(BatchEngine, Protocol):
    """A `BatchEngine` engine, and what the server says about it."""

    @property
    def device_name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def backbone(self) -> str: ...
    @property
    def weights_source(self) -> str: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def style_cache(self) -> CacheCounts: ...
