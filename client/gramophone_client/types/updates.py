"""What a job tells its caller: frozen values; `messages` builds them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from PIL import Image

from gramophone.recipe import Recipe
from gramophone_client.types.picture import Picture, write_whole

__all__ = [
    "Accepted",
    "Changed",
    "Checkpoint",
    "Frame",
    "JobStatus",
    "Losses",
    "Paused",
    "Progress",
    "Result",
    "Resumed",
    "Stylized",
    "Update",
    "Waiting",
]


@dataclass(frozen=True)
class Losses:
    """The terms of the objective, each with its weight in it: total = content + style + tv."""

    total: float
    content: float
    style: float
    tv: float
    content_layers: Mapping[str, float]  # by layer name
    style_layers: Mapping[str, float]


@dataclass(frozen=True)
class Numbered:
    """What all updates have."""

    # Grows from update to update of a job, for `after_sequence` of `watch`.
    sequence: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Accepted(Numbered):
    """The job was admitted. Always the first update; another one says that the job was sent again, and begins anew there.

    Iteration numbers then go back to `resumed_at`: what was done since that checkpoint was lost with the server.
    """

    job_id: str  # for `watch`, `get_job` and `cancel_job`, and in the server's log; whoever knows it may use it
    recipe: Recipe  # complete, the preset's values filled in
    seed: int
    width: int  # of the result, in pixels
    height: int
    iterations: int  # over all scales
    queue_position: int  # place in the queue; 0 begins at once, 1 when a place among those worked on is free
    attached: bool  # the `request_id` named a job that was there already
    resumed_at: int = 0  # iterations that the checkpoint had behind it, with `resume`
    estimated_wait_s: float | None = None  # until it begins; None if the server cannot say


@dataclass(frozen=True)
class Waiting(Numbered):
    """The job still waits, and its place in the queue has changed."""

    queue_position: int  # place in the queue, from 1
    estimated_wait_s: float | None = None  # until it begins; None if the server cannot say


@dataclass(frozen=True)
class Progress(Numbered):
    """The job's state after an iteration; a slow reader misses some."""

    iteration: int  # 1 to `iterations`, counted over all scales
    iterations: int
    width: int  # of the present scale, in pixels
    height: int
    losses: Losses  # at the picture before this iteration's step
    iterations_per_second: float  # over the present scale, from the last pause on; 0 if not measured yet
    time_left_s: float | None  # estimated; None if the server cannot say


@dataclass(frozen=True)
class Frame(Numbered):
    """The picture as it forms; a slow reader misses some and gets the newest."""

    iteration: int
    picture: Picture
    dropped: int  # frames replaced by newer ones since the last that was sent


@dataclass(frozen=True)
class Checkpoint(Numbered):
    """The job's state after an iteration, from which `resume` goes on, on any server."""

    iteration: int
    light: bool  # the picture and the iteration only, so that the optimiser begins anew
    data: bytes = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it, whole or not at all, replacing what is there."""
        write_whole(path, self.data)


@dataclass(frozen=True)
class Paused(Numbered):
    """The job stands still after an iteration, as its controller asked."""

    iteration: int


@dataclass(frozen=True)
class Resumed(Numbered):
    """A paused job goes on."""

    iteration: int  # behind which it stood still


@dataclass(frozen=True)
class Changed(Numbered):
    """The controller has changed the job."""

    iteration: int  # the first that is done so
    recipe: Recipe  # complete, as it holds from then on
    iterations: int  # of the whole job, over all scales


@dataclass(frozen=True)
class Result(Numbered):
    """The finished picture. Always the last update of a job that succeeds."""

    picture: Picture
    losses: Losses
    iterations: int  # done, over all scales
    stop_reason: str  # "ITERATIONS_DONE", "TIME_BUDGET", "FINISHED" (its controller wanted that); more may come
    elapsed_s: float  # from the first iteration to the last: without the wait for the first, with pauses

    def image(self) -> Image.Image:
        """The decoded picture."""
        return self.picture.image()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture; see `Picture.save`."""
        self.picture.save(path)


Update = Accepted | Waiting | Progress | Frame | Checkpoint | Paused | Resumed | Changed | Result


@dataclass(frozen=True)
class Stylized(Result):
    """The finished picture of `stylize`, with what it was made from."""

    recipe: Recipe
    seed: int
    job_id: str


@dataclass(frozen=True)
class JobStatus:
    """How a job stood at the moment of the call."""

    job_id: str
    state: str  # "QUEUED", "RUNNING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELLED"; more may come
    create_time: datetime  # this and the others in UTC
    start_time: datetime | None  # None until it runs
    end_time: datetime | None  # None until it has ended
    expire_time: datetime | None  # when it is forgotten, or stopped for want of a watcher; None while it is watched
    iteration: int  # done, over all scales
    iterations: int
    width: int  # of the result, in pixels; 0 while the images are being decoded
    height: int
    losses: Losses | None  # None before the first iteration
    stop_reason: str  # as of `Result`; "" unless it has one
    queue_position: int  # place in the queue while it is queued; 0 is about to begin
