"""Converts the server's messages to the values that a caller gets. No other module does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from gramophone.recipe import InvalidRecipeError, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_client.errors import ServerFailedError
from gramophone_client.types.picture import Format, Picture
from gramophone_client.types.server_info import CacheStats, Limits, ServerInfo
from gramophone_client.types.updates import (
    Accepted,
    Changed,
    Checkpoint,
    Frame,
    JobState,
    JobStatus,
    Losses,
    Paused,
    Progress,
    Result,
    Resumed,
    StopReason,
    Stylized,
    Update,
    Waiting,
)

__all__ = ["job_status", "server_info", "stylized", "update"]

FORMATS: Mapping[int, Format] = {
    pb.IMAGE_FORMAT_JPEG: "jpeg",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_WEBP: "webp",
}

Member = TypeVar("Member", bound=StrEnum)


def update(message: pb.JobEvent) -> Update | None:
    """The update of an event; None for a kind of event newer than this client, which can be skipped."""
    sequence = message.sequence
    match message.WhichOneof("event"):
        case "accepted":
            return replace(_accepted(message.accepted), sequence=sequence)
        case "waiting":
            waiting = message.waiting
            return Waiting(waiting.queue_position, _seconds_of(waiting, "estimated_wait"), sequence=sequence)
        case "progress":
            return replace(_progress(message.progress), sequence=sequence)
        case "frame":
            frame = message.frame
            return Frame(frame.iteration, _picture(frame.image), frame.dropped, sequence=sequence)
        case "checkpoint":
            checkpoint = message.checkpoint
            return Checkpoint(checkpoint.iteration, checkpoint.light, checkpoint.data, sequence=sequence)
        case "paused":
            return Paused(message.paused.iteration, sequence=sequence)
        case "resumed":
            return Resumed(message.resumed.iteration, sequence=sequence)
        case "changed":
            changed = message.changed
            return Changed(changed.iteration, _recipe(changed.recipe), changed.iterations, sequence=sequence)
        case "result":
            return replace(_result(message.result), sequence=sequence)
    return None


def stylized(message: pb.StylizeResponse) -> Stylized:
    """The value of a response to `Stylize`."""
    accepted = _accepted(message.accepted)
    result = vars(_result(message.result))
    return Stylized(**result, recipe=accepted.recipe, seed=accepted.seed, job_id=accepted.job_id)


def job_status(message: pb.Job) -> JobStatus:
    """The status of a job from `GetJob`, `ListJobs` or `CancelJob`."""

    def time(name: str) -> datetime | None:
        return _time(getattr(message, name)) if message.HasField(name) else None

    return JobStatus(
        job_id=message.job_id,
        state=_member(JobState, pb.JobState, message.state, "JOB_STATE_"),
        create_time=_time(message.create_time),
        start_time=time("start_time"),
        end_time=time("end_time"),
        expire_time=time("expire_time"),
        iteration=message.iteration,
        iterations=message.iterations,
        width=message.width,
        height=message.height,
        losses=_losses(message.losses) if message.HasField("losses") else None,
        stop_reason=_stop_reason(message.stop_reason) if message.stop_reason else None,
        queue_position=message.queue_position,
    )


def server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """The value of a response to `GetServerInfo`."""
    limits = message.limits
    return ServerInfo(
        version=message.version,
        device=message.device,
        precision=message.precision,
        backbone=message.backbone,
        weights=message.weights,
        layers=tuple(message.layers),
        limits=Limits(**{field.name: getattr(limits, field.name) for field in fields(Limits)}),
        presets={preset.name: _recipe(preset.recipe) for preset in message.presets},
        running_jobs=message.running_jobs,
        queued_jobs=message.queued_jobs,
        paused_jobs=message.paused_jobs,
        style_cache=_cache_stats(message.style_cache),
        uploads=_cache_stats(message.uploads),
        estimated_wait_s=_seconds_of(message, "estimated_wait"),
        library_ops={op.name: op.reason for op in message.library_ops},
        self_test_s=_seconds(message.self_test_time),
    )


def _cache_stats(message: pb.CacheStats) -> CacheStats:
    return CacheStats(message.hits, message.misses, message.bytes, message.max_bytes)


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
        resumed_at=message.resumed_at,
        estimated_wait_s=_seconds_of(message, "estimated_wait"),
    )


def _progress(message: pb.Progress) -> Progress:
    return Progress(
        iteration=message.iteration,
        iterations=message.iterations,
        width=message.width,
        height=message.height,
        losses=_losses(message.losses),
        iterations_per_second=message.iterations_per_second,
        time_left_s=_seconds_of(message, "time_left"),
        scale=message.scale,
        scales=message.scales,
    )


def _result(message: pb.Result) -> Result:
    return Result(
        picture=_picture(message.image),
        losses=_losses(message.losses),
        iterations=message.iterations,
        stop_reason=_stop_reason(message.stop_reason),
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
    if message.format not in FORMATS:
        raise ServerFailedError(f"the server sent a picture in an unknown format ({message.format}); update the client")
    return Picture(format=FORMATS[message.format], width=message.width, height=message.height, data=message.data)


def _recipe(message: pb.Recipe) -> Recipe:
    try:
        return recipe_from_message(message)
    except InvalidRecipeError as error:
        raise ServerFailedError(
            f"this client does not know the server's recipe ({error}); update the client"
        ) from error


def _stop_reason(number: int) -> StopReason:
    return _member(StopReason, pb.StopReason, number, "STOP_REASON_")


def _member(kind: type[Member], numbers: EnumTypeWrapper, number: int, prefix: str) -> Member:
    """The client's member for a number of the proto; UNKNOWN for one that is not set, or newer than this client."""
    name = numbers.Name(number).removeprefix(prefix) if number in numbers.values() else ""
    return kind(name) if name in list(kind) else kind("UNKNOWN")


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _seconds_of(message: Message, name: str) -> float | None:
    """Seconds of a field of type Duration; None if it is not set."""
    return _seconds(getattr(message, name)) if message.HasField(name) else None


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)
