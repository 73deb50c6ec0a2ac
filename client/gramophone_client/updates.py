"""What a job tells its caller: frozen values, built from the messages here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from PIL import Image

from gramophone.recipe import InvalidRecipe, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_client.errors import ServerFailed
from gramophone_client.picture import Format, Picture

__all__ = [
    "Accepted",
    "Frame",
    "Limits",
    "Losses",
    "Progress",
    "Result",
    "ServerInfo",
    "Stylized",
    "Update",
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
class Accepted:
    """The job was admitted. Always the first update, exactly once."""

    job_id: str  # names the job in the server's log
    recipe: Recipe  # complete, the preset's values filled in
    seed: int
    width: int  # of the result, in pixels
    height: int
    iterations: int  # over all scales
    queue_position: int  # jobs that run before this one


@dataclass(frozen=True)
class Progress:
    """The job's state after an iteration; a slow reader misses some."""

    iteration: int  # 1 to `iterations`, counted over all scales
    iterations: int
    width: int  # of the present scale, in pixels
    height: int
    losses: Losses  # at the picture before this iteration's step
    iterations_per_second: float  # over the present scale; 0 if not measured yet
    time_left_s: float | None  # estimated; None if the server cannot say


@dataclass(frozen=True)
class Frame:
    """The picture as it forms; a slow reader misses some and gets the newest."""

    iteration: int
    picture: Picture
    dropped: int  # frames replaced by newer ones since the last that was sent


@dataclass(frozen=True)
class Result:
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

Update = Accepted | Progress | Frame | Result


@dataclass(frozen=True)
class Stylized(Result):
    """The finished picture of `stylize`, with what it was made from."""

    recipe: Recipe
    seed: int
    job_id: str


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    max_image_bytes: int  # encoded
    max_image_pixels: int  # decoded
    max_size: int  # longest side of a result, in pixels
    max_styles: int
    max_iterations: int  # of a job, over all scales
    max_queued: int


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
    match message.WhichOneof("event"):
        case "accepted":
            return _accepted(message.accepted)
        case "progress":
            return _progress(message.progress)
        case "frame":
            frame = message.frame
            return Frame(frame.iteration, _picture(frame.image), frame.dropped)
        case "result":
            return _result(message.result)
    return None


def stylized(message: pb.StylizeResponse) -> Stylized:
    """The answer to `Stylize`."""
    accepted = _accepted(message.accepted)
    result = vars(_result(message.result))
    return Stylized(**result, recipe=accepted.recipe, seed=accepted.seed, job_id=accepted.job_id)


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
