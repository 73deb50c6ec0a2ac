"""The engine as the scheduler knows it: protocols, so that the scheduler and its tests need no kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Unpack

from torch import Tensor

from gramophone_server.domain.checkpoint import Checkpoint
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, Shape

__all__ = ["Batch", "BatchEngine", "Beginning", "CacheCounts", "Checkpoints", "Engine", "KernelReport"]


class CacheCounts(NamedTuple):
    """Counters of a cache since the start, and its current and largest size in bytes."""

    hits: int
    misses: int
    bytes: int
    max_bytes: int


class KernelReport(NamedTuple):
    """What the self-test of the engine's kernels has decided when the engine was loaded."""

    by_library: Mapping[str, str]  # the ops that run through torch's library instead of a kernel, with the reasons
    seconds: float  # that the self-test took


class Beginning(Protocol):
    """What has to be computed before a job can join a batch of its next scale: the targets of its style images. In
    steps, between which other jobs have their turns. It keeps what is computed until the job has joined.

    A job that is cancelled or paused drops it; what other jobs can use of it is in the engine's cache.
    """

    @property
    def next_pixels(self) -> float:
        """The work of the next step, in pixels of style images that go through the network. 0: nothing is left, because
        all of it is done or in the engine's cache."""

    @property
    def next_bytes(self) -> int:
        """Estimated device memory, in bytes, from the next step to the end of its style image; 0 if nothing is left."""

    @property
    def under_way(self) -> bool:
        """Whether it holds `next_bytes` now: a style image is partly done."""

    def advance(self) -> None:
        """Does the next step, and waits for the device. Raises `errors.OutOfDeviceMemory`: then the style image starts
        anew. After any other exception the job is lost."""


class Batch(Protocol):
    """A fixed number of slots for jobs of one shape, which join and leave between iterations. Belongs to one thread.

    The result of a job does not depend on the jobs in other slots, and when a job joins or leaves a slot, no other slot
    is touched. An empty slot takes as much time as a used one.

    Every method may raise `errors.OutOfDeviceMemory`. Then nothing is lost: a job that could not join is unchanged, and
    the jobs in the batch have completed their last whole iteration and can leave. After any other exception the jobs in
    the batch are lost.
    """

    @property
    def shape(self) -> Shape:
        """The shape of all jobs in the batch."""

    @property
    def slots(self) -> int:
        """The number of slots, used or empty: the width of the batch."""

    @property
    def states(self) -> Mapping[int, JobState]:
        """The jobs in the batch, by slot. Their counts are up to date; they have no tensors while they are in it."""

    def join(self, state: JobState, beginning: Any = None) -> int:
        """Puts a job into the lowest free slot, which is returned. What is left of ``beginning``, the job's of
        `BatchEngine.begin`, is done here; without one, all of it. Raises `ValueError` if no slot is free, or the job
        has another shape, no iterations left, or is in a batch."""

    def leave(self, slot: int, *, to_host: bool = False) -> JobState:
        """Empties the slot and returns the state of its job, with tensors: on the device, or in the host's memory."""

    def drop(self, slot: int) -> None:
        """Empties the slot of a job that has ended or is lost; its tensors are freed."""

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        """Runs ``iterations`` of every job, or fewer, so that no job goes beyond its scale. Returns the report of each
        job's last iteration, by slot. Waits for the device once, at the end. Raises `ValueError` if a job has no
        iterations left at its scale."""

    def iterations_left(self, slot: int) -> int:
        """Iterations that the job in this slot has left at its scale."""

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        """Starts a copy of a job's current picture. Returns a function that waits for the copy and returns it: uint8
        [height, width, 3], RGB, on the CPU. Any thread may call it."""

    def copy(self, slot: int) -> JobState:
        """A copy of the current state of a job, on the CPU and in no batch, for a checkpoint. The job itself
        continues."""

    def update(self, slot: int, **changes: Unpack[RecipeUpdate]) -> int:
        """Changes the recipe of a job from the next iteration on, and returns the number of that iteration. No graph is
        captured anew. Raises `InvalidRecipeError`."""

    def close(self) -> None:
        """Frees the memory of the batch. Jobs that have not left are lost."""


class Checkpoints(Protocol):
    """Writes the state of a job as bytes, and reads it; see `engine.checkpoint_format`. Thread-safe."""

    def fits(self, state: JobState, *, light: bool = False, max_bytes: int) -> bool:
        """Whether a checkpoint of the job takes at most ``max_bytes``; a light one has the picture and no state of the
        optimiser. Costs microseconds."""

    def most_bytes(self, state: JobState, *, light: bool = False) -> int:
        """Upper bound of the bytes of a checkpoint of the job. Costs microseconds."""

    def require_room(self, state: JobState, *, light: bool = False, max_bytes: int) -> None:
        """Raises `errors.InvalidRequest` if a checkpoint of the job takes more than ``max_bytes``."""

    def write(self, state: JobState, *, picture: Tensor | None = None, max_bytes: int) -> bytes:
        """The checkpoint of a job that is in no batch; a light one if ``picture``, uint8 [height, width, 3], is given.
        Raises `errors.InvalidRequest` if it is larger than ``max_bytes``, and `ValueError` if the job has no state to
        write."""

    def picture_size(self, data: bytes, *, max_bytes: int) -> tuple[int, int]:
        """(width, height) in pixels of the picture of what `write` has written, from its header. Raises
        `checkpoint.InvalidCheckpoint`. Costs less than a millisecond."""

    def read(self, data: bytes, *, max_bytes: int) -> Checkpoint:
        """Reads what `write` has written. Raises `checkpoint.InvalidCheckpoint`."""


class BatchEngine(Protocol):
    """The part of an engine that the scheduler uses: it admits jobs and opens batches."""

    @property
    def memory_bytes(self) -> int:
        """Device memory for all batches together, in bytes."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Reads and writes this engine's checkpoints."""

    @property
    def shares_host_memory(self) -> bool:
        """Whether the device's memory is the host's: then tensors in the host's memory take of `memory_bytes`, too."""

    def require_device(self) -> None:
        """Raises the device's error if the device no longer works. Costs one addition on it."""

    def admit(self, job: StyleJob) -> JobState:
        """The initial state of a job; takes no device memory. Raises `errors.InvalidRequest` if the job can never
        run."""

    def picture(self, state: JobState) -> Callable[[], Tensor]:
        """As `Batch.snapshot`, for a job that has started and is in no batch."""

    def begin(self, state: JobState) -> Beginning:
        """What a job in no batch needs before it can join one; computes nothing."""

    def state_bytes(self, state: JobState) -> int:
        """Size of the tensors with which a job leaves its batch, in bytes."""

    def batch(self, shape: Shape, slots: int) -> Batch:
        """Opens an empty batch. Raises `errors.OutOfDeviceMemory`, and `ValueError` for more than `max_slots`."""

    def max_slots(self, shape: Shape) -> int:
        """The slots of the widest batch of this shape that the device's libraries can index, whatever the memory."""

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        """Estimated device memory of a batch, in bytes, without the network; accurate to some percent. Takes
        0.1 ms for the first batch of a shape, but 20 ms where ops run through torch's library."""


class Engine(BatchEngine, Protocol):
    """A `BatchEngine`, and what the server reports about it."""

    @property
    def device_name(self) -> str:
        """A description of the device: "cpu (AMD EPYC, 2 threads)"."""

    @property
    def precision(self) -> str:
        """The precision of the network: "fp32", "tf32", "bf16" or "fp16"."""

    @property
    def backbone(self) -> str:
        """The network: "vgg19" or "vgg16"."""

    @property
    def weights_source(self) -> str:
        """Source, attribution and sha256 of the weights."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that a recipe can name, from the first to the deepest."""

    @property
    def kernels(self) -> KernelReport:
        """Which ops run through torch's library instead of a kernel."""

    @property
    def style_cache(self) -> CacheCounts:
        """Counts of the cache of style targets. Thread-safe."""
