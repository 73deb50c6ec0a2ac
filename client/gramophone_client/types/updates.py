"""The updates, results and statuses of a job, as frozen values; `transport.parsing` builds them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from PIL import Image

from gramophone.recipe import Recipe
from gramophone_client.types.picture import Picture, write_atomically

__all__ = [
    "Accepted",
    "Changed",
    "Checkpoint",
    "Frame",
    "JobState",
    "JobStatus",
    "Losses",
    "Paused",
    "Progress",
    "Result",
    "Resumed",
    "StopReason",
    "Stylized",
    "Update",
    "UploadProgress",
    "Waiting",
]


class JobState(StrEnum):
    """The stage of a job's life."""

    QUEUED = "QUEUED"  # its images are being decoded, or it waits in the queue
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"  # by its controller
    SUCCEEDED = "SUCCEEDED"  # it has a result
    FAILED = "FAILED"  # `watch` raises its error
    CANCELLED = "CANCELLED"  # by `cancel_job`, or because it had no watcher
    UNKNOWN = "UNKNOWN"  # a state newer than this client


class StopReason(StrEnum):
    """Why a job ended with a result."""

    ITERATIONS_DONE = "ITERATIONS_DONE"  # all iterations of its recipe
    TIME_BUDGET = "TIME_BUDGET"  # the recipe's `time_budget` was used up
    FINISHED = "FINISHED"  # by its controller
    UNKNOWN = "UNKNOWN"  # a reason newer than this client


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, each multiplied by its weight: total = content + style + tv."""

    total: float
    content: float
    style: float
    tv: float
    content_layers: Mapping[str, float]  # by layer name
    style_layers: Mapping[str, float]

    def __repr__(self) -> str:
        return f"Losses(total={self.total:g}, content={self.content:g}, style={self.style:g}, tv={self.tv:g})"


@dataclass(frozen=True)
class NumberedUpdate:
    """The base class of all updates: each has a sequence number."""

    # Increases with each update of a job; for `after_sequence` of `watch`.
    sequence: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Accepted(NumberedUpdate):
    """The job was admitted. Always the first update. Another one means that the job was lost and sent again.

    Iteration numbers then go back to `resumed_at`: later iterations were lost with the server.
    """

    job_id: str  # for `watch`, `get_job` and `cancel_job`, and in the server's log; any client that knows it may use it
    recipe: Recipe  # complete, the preset's values filled in
    seed: int
    width: int  # of the result, in pixels
    height: int
    iterations: int  # over all scales
    queue_position: int  # position in the queue; 0: starts at once, 1: starts when a running job ends
    attached: bool  # the `request_id` named an existing job
    resumed_at: int = 0  # with `resume`: completed iterations of the checkpoint
    estimated_wait_s: float | None = None  # until the job starts; None if the server has no estimate


@dataclass(frozen=True)
class Waiting(NumberedUpdate):
    """The job still waits in the queue, and its position has changed."""

    queue_position: int  # position in the queue, from 1
    estimated_wait_s: float | None = None  # until the job starts; None if the server has no estimate


@dataclass(frozen=True)
class Progress(NumberedUpdate):
    """The job's progress after an iteration; a slow reader misses some."""

    iteration: int  # 1 to `iterations`, counted over all scales
    iterations: int
    width: int  # of the current scale, in pixels
    height: int
    losses: Losses  # at the picture before this iteration's step
    iterations_per_second: float  # at the current scale, since the last pause; 0 if not measured yet
    time_left_s: float | None  # None if the server has no estimate
    scale: int = (
        0  # the current scale, 1 (the coarsest) to `scales`; both are 0 if the server is too old to report them
    )
    scales: int = 0


@dataclass(frozen=True)
class Frame(NumberedUpdate):
    """The intermediate picture after an iteration; a slow reader misses some and gets the newest."""

    iteration: int
    picture: Picture
    dropped: int  # frames that newer ones have replaced since the last frame

    def image(self) -> Image.Image:
        """The decoded picture."""
        return self.picture.image()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture; see `Picture.save`."""
        self.picture.save(path)

    def _repr_png_(self) -> bytes | None:
        return self.picture._repr_png_()

    def _repr_jpeg_(self) -> bytes | None:
        return self.picture._repr_jpeg_()


@dataclass(frozen=True)
class Checkpoint(NumberedUpdate):
    """The job's state after an iteration, from which `resume` continues on any server."""

    iteration: int
    light: bool  # only the picture and the iteration; the optimiser restarts
    data: bytes = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state atomically, replacing an existing file."""
        write_atomically(path, self.data)


@dataclass(frozen=True)
class Paused(NumberedUpdate):
    """The job is paused after an iteration, on a command of its controller."""

    iteration: int


@dataclass(frozen=True)
class Resumed(NumberedUpdate):
    """A paused job continues."""

    iteration: int  # the last one completed before the pause


@dataclass(frozen=True)
class Changed(NumberedUpdate):
    """The controller has changed the job's recipe."""

    iteration: int  # the first with this recipe
    recipe: Recipe  # complete, with the changes
    iterations: int  # of the whole job, over all scales


@dataclass(frozen=True)
class Result(NumberedUpdate):
    """The finished picture. Always the last update of a job that succeeds."""

    picture: Picture
    losses: Losses
    iterations: int  # done, over all scales
    stop_reason: StopReason
    elapsed_s: float  # from the start of the first iteration to the end of the last, including pauses

    def image(self) -> Image.Image:
        """The decoded picture."""
        return self.picture.image()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture; see `Picture.save`."""
        self.picture.save(path)

    def _repr_png_(self) -> bytes | None:
        return self.picture._repr_png_()

    def _repr_jpeg_(self) -> bytes | None:
        return self.picture._repr_jpeg_()


@dataclass(frozen=True)
class UploadProgress:
    """How much of a job's large images and checkpoint has been uploaded."""

    sent_bytes: int  # taken by the connection; the last few kilobytes may be on their way
    total_bytes: int


Update = Accepted | Waiting | Progress | Frame | Checkpoint | Paused | Resumed | Changed | Result


@dataclass(frozen=True)
class Stylized(Result):
    """The finished picture of `stylize`, with its recipe and seed."""

    recipe: Recipe
    seed: int
    job_id: str


@dataclass(frozen=True)
class JobStatus:
    """The status of a job at the time of the call."""

    job_id: str
    state: JobState
    create_time: datetime = field(repr=False)  # all times are in UTC
    start_time: datetime | None = field(repr=False)  # None until it runs
    end_time: datetime | None = field(repr=False)  # None until it has ended
    # When it is removed, or stopped if it has no watcher; None while it has one
    expire_time: datetime | None = field(repr=False)
    iteration: int  # done, over all scales
    iterations: int
    width: int  # of the result, in pixels; 0 while the images are being decoded
    height: int
    losses: Losses | None  # None before the first iteration
    stop_reason: StopReason | None  # None unless the job succeeded
    queue_position: int  # position in the queue while it is queued; 0: starts next
