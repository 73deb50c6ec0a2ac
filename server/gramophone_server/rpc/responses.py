"""Events of a job, jobs, and what a server is, as messages."""

from __future__ import annotations

import dataclasses
import json

from google.protobuf import duration_pb2, timestamp_pb2

from gramophone.recipe import PRESETS
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
from gramophone_server.config import Limits, version
from gramophone_server.domain.engine_api import Engine
from gramophone_server.domain.events import (
    Accepted,
    Changed,
    Event,
    Finished,
    Paused,
    Progress,
    Resumed,
    Waiting,
)
from gramophone_server.domain.job import Losses
from gramophone_server.images import codec
from gramophone_server.images.codec import Encoding
from gramophone_server.jobs.job import Job, JobPhase, JobSummary

__all__ = [
    "accepted_message",
    "constant_info",
    "frame_encoding",
    "image_message",
    "job_message",
    "result_encoding",
    "result_message",
    "result_metadata",
    "small_event",
]

FRAME_QUALITY, RESULT_QUALITY = 85, 95  # of JPEG and WebP, if the request has 0


def constant_info(engine: Engine, limits: Limits) -> pb.GetServerInfoResponse:
    """What GetServerInfo answers as long as the server runs: all but the numbers of jobs and of the caches."""
    response = pb.GetServerInfoResponse(
        version=version(),
        device=engine.device_name,
        precision=engine.precision,
        backbone=engine.backbone,
        weights=engine.weights_source,
        layers=engine.layers,
        limits=pb.Limits(**{f.name: getattr(limits, f.name) for f in dataclasses.fields(Limits)}),
        presets=(pb.PresetRecipe(name=name, recipe=recipe_to_message(preset)) for name, preset in PRESETS.items()),
        library_ops=(pb.LibraryOp(name=name, reason=reason) for name, reason in engine.kernels.by_library.items()),
    )
    response.self_test_time.FromMicroseconds(round(engine.kernels.seconds * 1e6))
    return response


def frame_encoding(options: pb.FrameOptions) -> Encoding:
    """The encoding of a watcher's frames."""
    return Encoding(
        _format(options.format, codec.Format.JPEG), options.quality or FRAME_QUALITY, max_side=options.max_side
    )


def result_encoding(spec: pb.JobSpec) -> Encoding:
    """The encoding of a job's result."""
    return Encoding(_format(spec.result_format, codec.Format.PNG), spec.result_quality or RESULT_QUALITY)


def small_event(message: pb.JobEvent, event: Event, job: Job, *, attached: bool) -> None:
    """Fills in an event without picture and checkpoint. ``attached``: the watcher's request found an existing job."""
    match event:
        case Accepted():
            message.accepted.CopyFrom(accepted_message(event, job, attached=attached))
        case Waiting(position, wait_s):
            message.waiting.CopyFrom(pb.Waiting(queue_position=position, estimated_wait=_duration(wait_s)))
        case Progress():
            message.progress.CopyFrom(_progress(event))
        case Paused(iteration):
            message.paused.iteration = iteration
        case Resumed(iteration):
            message.resumed.iteration = iteration
        case Changed(iteration, recipe, iterations):
            message.changed.CopyFrom(
                pb.Changed(iteration=iteration, recipe=recipe_to_message(recipe), iterations=iterations)
            )
        case _:
            raise AssertionError("an event with a picture or a checkpoint is a large message")


def accepted_message(event: Accepted, job: Job, *, attached: bool) -> pb.Accepted:
    """The parameters of a job."""
    summary = job.admitted_summary
    assert summary is not None, "a job is admitted before it has events"
    return pb.Accepted(
        job_id=job.id,
        recipe=recipe_to_message(summary.recipe),
        seed=summary.seed,
        width=summary.width,
        height=summary.height,
        iterations=summary.iterations,
        queue_position=event.position,
        attached=attached,
        resumed_at=summary.resumed_at,
        estimated_wait=_duration(event.wait_s),
    )


def result_message(event: Finished) -> pb.Result:
    """A result without its image."""
    result = pb.Result(
        losses=_losses(event.losses),
        iterations=event.iterations,
        stop_reason=getattr(pb, f"STOP_REASON_{event.reason.name}"),
    )
    result.elapsed.FromMicroseconds(round(event.elapsed_s * 1e6))
    return result


def image_message(picture: codec.Encoded) -> pb.Image:
    """An image without its bytes."""
    return pb.Image(format=getattr(pb, f"IMAGE_FORMAT_{picture.format}"), width=picture.width, height=picture.height)


def job_message(job: Job) -> pb.Job:
    """The current state of the job."""
    message = pb.Job(
        job_id=job.id,
        state=f"JOB_STATE_{job.phase.name}",
        create_time=_timestamp(job.created_at),
        start_time=_timestamp(job.started_at),
        end_time=_timestamp(job.ended_at),
        expire_time=_timestamp(job.expires_at),
    )
    if job.summary is not None:
        message.iterations, message.width, message.height = (
            job.summary.iterations,
            job.summary.width,
            job.summary.height,
        )
        message.iteration = job.summary.resumed_at
    if job.phase is JobPhase.QUEUED:
        message.queue_position = job.position
    if job.progress is not None:
        message.iteration = job.progress.report.iteration
        message.losses.CopyFrom(_losses(job.progress.report.losses))
    if job.result is not None:
        message.stop_reason = getattr(pb, f"STOP_REASON_{job.result.reason.name}")
    return message


def _format(value: int, default: codec.Format) -> codec.Format:
    """The format of an enum value. `validation` reports an unknown one."""
    known = value in pb.ImageFormat.values() and value
    return codec.Format[pb.ImageFormat.Name(known).removeprefix("IMAGE_FORMAT_")] if known else default


def result_metadata(summary: JobSummary, iterations: int, weights: str) -> str:
    """ASCII JSON for the result's metadata. With the same images it reproduces the picture, unless the recipe was
    changed while the job ran, or the job ended early."""
    recipe = summary.recipe
    metadata = {
        "gramophone": version(),
        "recipe": {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)},  # layers as [name, weight]
        "style_weights": summary.style_weights,
        "seed": summary.seed,
        "weights": weights,
        "iterations": iterations,
        "changed_at": summary.changed_at,
    }
    return json.dumps(metadata)


def _progress(event: Progress) -> pb.Progress:
    report = event.report
    return pb.Progress(
        iteration=report.iteration,
        iterations=report.iterations,
        width=report.width,
        height=report.height,
        scale=report.scale,
        scales=report.scales,
        losses=_losses(report.losses),
        iterations_per_second=event.iterations_per_second,
        time_left=_duration(event.time_left_s),
    )


def _losses(losses: Losses) -> pb.Losses:
    return pb.Losses(
        total=losses.total,
        content=sum(losses.content.values()),
        style=sum(losses.style.values()),
        tv=losses.tv,
        content_layers=(pb.LayerLoss(layer=layer, value=value) for layer, value in losses.content.items()),
        style_layers=(pb.LayerLoss(layer=layer, value=value) for layer, value in losses.style.items()),
    )


def _duration(seconds: float | None) -> duration_pb2.Duration | None:
    if seconds is None:
        return None
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def _timestamp(seconds: float | None) -> timestamp_pb2.Timestamp | None:
    if seconds is None:
        return None
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp
