"""What a job tells its caller: frozen values, built from the messages here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.timestamp_pb2 import Timestamp
from PIL import Image

from gramophone.recipe import InvalidRecipe, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_client.errors import ServerFailed
from gramophone_client.picture import Format, Picture

__all__ = [
    "Accepted",
    "Frame",
    "JobStatus",
    "Limits",
    "Losses",
    "Progress",
    "Result",
    "ServerInfo",
    "Stylized",
    "Update",
    "Waiting",
    "job_status",
    "server_info",
    "stylized",
    "update",
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
    """The job was admitted. Always the first update, exactly once."""

    job_id: str  # for `watch`, `get_job` and `cancel_job`, and in the server's log; whoever knows it may use it
    recipe: Recipe  # complete, the preset's values filled in
    seed: int
    width: int  # of the result, in pixels
    height: int
    iterations: int  # over all scales
    queue_position: int  # jobs that run before this one
    attached: bool  # the `request_id` named a job that was there already


@dataclass(frozen=True)
class Waiting(Numbered):
    """The job still waits, and its place in the queue has changed."""

    queue_position: int  # jobs that run before this one, at least one


@dataclass(frozen=True)
class Progress(Numbered):
    """The job's state after an iteration; a slow reader misses some."""

    iteration: int  # 1 to `iterations`, counted over all scales
    iterations: int
    width: int  # of the present scale, in pixels
    height: int
    losses: Losses  # at the picture before this iteration's step
    iterations_per_second: float  # over the present scale; 0 if not measured yet
    time_left_s: float | None  # estimated; None if the server cannot say


@dataclass(frozen=True)
class Frame(Numbered):
    """The picture as it forms; a slow reader misses some and gets the newest."""

    iteration: int
    picture: Picture
    dropped: int  # frames replaced by newer ones since the last that was sent


@dataclass(frozen=True)
class Result(Numbered):
    """The finished picture. Always the last update of a job that succeeds."""

    picture: Picture
    losses: Losses
    iterations: int  # done, over all scales
    stop_reason: str  # "ITERATIONS_DONE"; more may come
    elapsed_s: float  # from the first iteration to the last, without queueing

    def image(self) -> Image.Image:
        """The decoded picture."""
        return self.picture.image()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture; see `Picture.save`."""
        self.picture.save(path)


FORMATS: Mapping[str, Format] = {"jpeg": "jpeg", "png": "png", "webp": "webp"}

Update = Accepted | Waiting | Progress | Frame | Result


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
    state: str  # "QUEUED", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED"; more may come
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
    queue_position: int  # jobs that run before this one


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    max_image_bytes: int  # encoded
    max_image_pixels: int  # decoded
    max_size: int  # longest side of a result, in pixels
    max_styles: int
    max_iterations: int  # of a job, over all scales
    max_queued: int
    max_detach_s: int  # longest `detach_grace`
    max_kept_s: int  # for which a job is kept after its end
    max_kept: int  # jobs that are kept after their end
    max_kept_bytes: int  # of their results, counted as 3 per pixel
    max_blocked_s: int  # for which a reader may leave a message untaken


@dataclass(frozen=True)
class ServerInfo:
    """The server as it was at the moment of the call."""

    version: str
    device: str
    precision: str
    backbone: str
    weights: str  # source, sha256 and attribution
    layers: tuple[str, ...]  # from the first to the deepest
    limits: Limits
    presets: Mapping[str, Recipe]
    running_jobs: int
    queued_jobs: int


def update(message: pb.JobEvent) -> Update | None:
    """The event's value; None for a kind of event younger than this client, which may be skipped."""
    sequence = message.sequence
    match message.WhichOneof("event"):
        case "accepted":
            return replace(_accepted(message.accepted), sequence=sequence)
        case "waiting":
            return Waiting(message.waiting.queue_position, sequence=sequence)
        case "progress":
            return replace(_progress(message.progress), sequence=sequence)
        case "frame":
            frame = message.frame
            return Frame(frame.iteration, _picture(frame.image), frame.dropped, sequence=sequence)
        case "result":
            return replace(_result(message.result), sequence=sequence)
    return None


def stylized(message: pb.StylizeResponse) -> Stylized:
    """The answer to `Stylize`."""
    accepted = _accepted(message.accepted)
    result = vars(_result(message.result))
    return Stylized(**result, recipe=accepted.recipe, seed=accepted.seed, job_id=accepted.job_id)


def job_status(message: pb.Job) -> JobStatus:
    """The job of `GetJob`, `ListJobs` and `CancelJob`."""

    def time(name: str) -> datetime | None:
        return _time(getattr(message, name)) if message.HasField(name) else None

    return JobStatus(
        job_id=message.job_id,
        state=_name(pb.JobState, message.state, "JOB_STATE_"),
        create_time=_time(message.create_time),
        start_time=time("start_time"),
        end_time=time("end_time"),
        expire_time=time("expire_time"),
        iteration=message.iteration,
        iterations=message.iterations,
        width=message.width,
        height=message.height,
        losses=_losses(message.losses) if message.HasField("losses") else None,
        stop_reason=_name(pb.StopReason, message.stop_reason, "STOP_REASON_") if message.stop_reason else "",
        queue_position=message.queue_position,
    )


def server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """The answer to `GetServerInfo`."""
    limits = message.limits
    return ServerInfo(
        version=message.version,
        device=message.device,
        precision=message.precision,
        backbone=message.backbone,
        weights=message.weights,
        layers=tuple(message.layers),
        limits=Limits(
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_size=limits.max_size,
            max_styles=limits.max_styles,
            max_iterations=limits.max_iterations,
            max_queued=limits.max_queued,
            max_detach_s=limits.max_detach_s,
            max_kept_s=limits.max_kept_s,
            max_kept=limits.max_kept,
            max_kept_bytes=limits.max_kept_bytes,
            max_blocked_s=limits.max_blocked_s,
        ),
        presets={preset.name: _recipe(preset.recipe) for preset in message.presets},
        running_jobs=message.running_jobs,
        queued_jobs=message.queued_jobs,
    )


def _accepted(message: pb.Accepted) -> Accepted:
    return Accepted(
        job_id=message.job_id,
        recipe=_recipe(message.recipe),
        seed=message.seed,
        width=message.width,
        height=message.height,
        iterations=message.iterations,
        queue_position=message.queue_position,
        attached=message.attached,
    )


def _progress(message: pb.Progress) -> Progress:
    return Progress(
        iteration=message.iteration,
        iterations=message.iterations,
        width=message.width,
        height=message.height,
        losses=_losses(message.losses),
        iterations_per_second=message.iterations_per_second,
        time_left_s=_seconds(message.time_left) if message.HasField("time_left") else None,
    )


def _result(message: pb.Result) -> Result:
    return Result(
        picture=_picture(message.image),
        losses=_losses(message.losses),
        iterations=message.iterations,
        stop_reason=_name(pb.StopReason, message.stop_reason, "STOP_REASON_"),
        elapsed_s=_seconds(message.elapsed),
    )


def _losses(message: pb.Losses) -> Losses:
    return Losses(
        total=message.total,
        content=message.content,
        style=message.style,
        tv=message.tv,
        content_layers={loss.layer: loss.value for loss in message.content_layers},
        style_layers={loss.layer: loss.value for loss in message.style_layers},
    )


def _picture(message: pb.Image) -> Picture:
    name = _name(pb.ImageFormat, message.format, "IMAGE_FORMAT_").lower()
    if name not in FORMATS:
        raise ServerFailed(f"the server sent a picture of an unknown format ({name}); a newer client may read it")
    return Picture(format=FORMATS[name], width=message.width, height=message.height, data=message.data)


def _recipe(message: pb.Recipe) -> Recipe:
    try:
        return recipe_from_message(message)
    except InvalidRecipe as error:
        raise ServerFailed(
            f"the server's recipe is not one that this client knows ({error}); update the client"
        ) from error


def _name(numbers: EnumTypeWrapper, number: int, prefix: str) -> str:
    """The enum value's name without its prefix; its number if it is younger than this client."""
    return numbers.Name(number).removeprefix(prefix) if number in numbers.values() else str(number)


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
