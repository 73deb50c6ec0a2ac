"""From what happens to a job to the messages that say so; each picture is encoded once for all who want it alike."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
from gramophone_server import images
from gramophone_server.images import Encoding
from gramophone_server.job import Losses
from gramophone_server.jobs import Job, Plan, State
from gramophone_server.mailbox import Accepted, Event, Finished, Frame, Picture, Progress, Waiting

__all__ = ["Encoders", "event_message", "frame_encoding", "job_message", "result_encoding", "version"]

# One more does not help while the compute thread has the cores.
ENCODERS = 2
FRAME_QUALITY, RESULT_QUALITY = 85, 95  # of JPEG and WebP, where the request says 0


def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def frame_encoding(options: pb.FrameOptions) -> Encoding:
    """How a watcher wants its frames."""
    return Encoding(
        _format(options.format, images.Format.JPEG), options.quality or FRAME_QUALITY, max_side=options.max_side
    )


def result_encoding(spec: pb.JobSpec) -> Encoding:
    """How a job's result is wanted."""
    return Encoding(_format(spec.result_format, images.Format.PNG), spec.result_quality or RESULT_QUALITY)


class Encoders:
    """Threads that encode pictures."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(ENCODERS, "encode")

    def close(self) -> None:
        """Gives the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encoded(self, picture: Picture, encoding: Encoding, metadata: str | None = None) -> pb.Image:
        """The picture's only encoding of this kind; the first to ask for it starts it."""
        future = picture.encodings.get(encoding)
        if future is None:
            wait = picture.wait
            assert wait is not None, "a picture is dropped when all that is wanted of it has been encoded"

            def encode() -> images.Encoded:
                return images.encode(wait(), *encoding, metadata)  # on its thread, also the waiting

            future = asyncio.get_running_loop().run_in_executor(self._threads, encode)
            picture.encodings[encoding] = future
            future.add_done_callback(_noted)
        encoded = await asyncio.shield(future)  # others wait for it, too
        return pb.Image(
            format=f"IMAGE_FORMAT_{encoded.format}",
            width=encoded.width,
            height=encoded.height,
            data=encoded.data,
        )


def _noted(future: asyncio.Future[Any]) -> None:
    """An error that no watcher has waited for must not be reported as lost."""
    if not future.cancelled():
        future.exception()


async def event_message(
    number: int, event: Event, job: Job, encoders: Encoders, frames: Encoding, attached: bool, weights: str
) -> pb.JobEvent:
    """The event for one watcher, who wants `frames` so, and whose request was `attached` to the job or made it."""
    plan = job.plan
    assert plan is not None, "a job has a plan before it has events"
    message = pb.JobEvent(sequence=number)
    match event:
        case Accepted(position):
            message.accepted.CopyFrom(
                pb.Accepted(
                    job_id=job.id,
                    recipe=recipe_to_message(plan.recipe),
                    seed=plan.seed,
                    width=plan.width,
                    height=plan.height,
                    iterations=plan.iterations,
                    queue_position=position,
                    attached=attached,
                    resumed_at=plan.resumed_at,
                )
            )
        case Waiting(position):
            message.waiting.queue_position = position
        case Progress(report, iterations_per_second, time_left_s):
            message.progress.CopyFrom(
                pb.Progress(
                    iteration=report.iteration,
                    iterations=report.iterations,
                    width=report.width,
                    height=report.height,
                    losses=_losses(report.losses),
                    iterations_per_second=iterations_per_second,
                    time_left=_duration(time_left_s),
                )
            )
        case Frame(iteration, picture, dropped):
            image = await encoders.encoded(picture, frames)
            message.frame.CopyFrom(pb.Frame(iteration=iteration, image=image, dropped=dropped))
        case Finished(picture, losses, iterations, elapsed_s):
            image = await encoders.encoded(picture, job.encoding, _how_it_was_made(plan, weights))
            picture.wait = None  # all want the result alike, so the pixels have done their part
            message.result.CopyFrom(
                pb.Result(
                    image=image,
                    losses=_losses(losses),
                    iterations=iterations,
                    stop_reason=pb.STOP_REASON_ITERATIONS_DONE,
                    elapsed=_duration(elapsed_s),
                )
            )
    return message


def job_message(job: Job) -> pb.Job:
    """The job as it stands."""
    message = pb.Job(
        job_id=job.id,
        state=f"JOB_STATE_{job.state.name}",
        create_time=_timestamp(job.created_at),
        start_time=_timestamp(job.started_at),
        end_time=_timestamp(job.ended_at),
        expire_time=_timestamp(job.expires_at),
    )
    if job.plan is not None:
        message.iterations, message.width, message.height = job.plan.iterations, job.plan.width, job.plan.height
        message.iteration = job.plan.resumed_at
    if job.state is State.QUEUED:
        message.queue_position = job.position
    if job.progress is not None:
        message.iteration = job.progress.report.iteration
        message.losses.CopyFrom(_losses(job.progress.report.losses))
    if job.result is not None:
        message.stop_reason = pb.STOP_REASON_ITERATIONS_DONE
    return message


def _format(value: int, default: images.Format) -> images.Format:
    """The format of a number; an unknown one is refused elsewhere, with all else that is wrong."""
    known = value in pb.ImageFormat.values() and value
    return images.Format[pb.ImageFormat.Name(known).removeprefix("IMAGE_FORMAT_")] if known else default


def _how_it_was_made(plan: Plan, weights: str) -> str:
    """ASCII JSON for the result's metadata: with the same images it makes the same picture again."""
    made = {
        "gramophone": version(),
        "recipe": dataclasses.asdict(plan.recipe),  # fields by name; layers as [name, weight]
        "style_weights": plan.style_weights,
        "seed": plan.seed,
        "weights": weights,
    }
    return json.dumps(made)


def _losses(losses: Losses) -> pb.Losses:
    return pb.Losses(
        total=losses.total,
        content=sum(losses.content.values()),
        style=sum(losses.style.values()),
        tv=losses.tv,
        content_layers=(pb.LayerLoss(layer=layer, value=value) for layer, value in losses.content.items()),
        style_layers=(pb.LayerLoss(layer=layer, value=value) for layer, value in losses.style.items()),
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def _timestamp(seconds: float | None) -> timestamp_pb2.Timestamp | None:
    if seconds is None:
        return None
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp
