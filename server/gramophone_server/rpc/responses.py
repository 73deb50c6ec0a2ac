"""Events of a job as messages. Each picture is encoded once for all watchers, and each checkpoint is written once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
from gramophone_server.config import version
from gramophone_server.domain.events import (
    Accepted,
    Answer,
    Changed,
    Event,
    Finished,
    Frame,
    Paused,
    Picture,
    Progress,
    Resumed,
    Saved,
    SavedState,
    Waiting,
)
from gramophone_server.domain.job import Losses
from gramophone_server.images import codec
from gramophone_server.images.codec import Encoding
from gramophone_server.jobs.job import Job, JobPhase, JobSummary
from gramophone_server.jobs.mailbox import Mailbox

__all__ = ["Encoders", "JobEventStream", "frame_encoding", "job_message", "result_encoding"]

# The messages that carry events of a job.
R = TypeVar("R", pb.StylizeStreamResponse, pb.WatchJobResponse, pb.StylizeInteractiveResponse)

ENCODERS = 2  # threads; more do not help while the compute thread uses the cores
FRAME_QUALITY, RESULT_QUALITY = 85, 95  # of JPEG and WebP, if the request has 0


def frame_encoding(options: pb.FrameOptions) -> Encoding:
    """The encoding of a watcher's frames."""
    return Encoding(
        _format(options.format, codec.Format.JPEG), options.quality or FRAME_QUALITY, max_side=options.max_side
    )


def result_encoding(spec: pb.JobSpec) -> Encoding:
    """The encoding of a job's result."""
    return Encoding(_format(spec.result_format, codec.Format.PNG), spec.result_quality or RESULT_QUALITY)


class Encoders:
    """Threads that encode pictures and write checkpoints."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(ENCODERS, "encode")

    def close(self) -> None:
        """Stops the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, into: pb.Image, picture: Picture, encoding: Encoding, metadata: str | None = None) -> None:
        """Fills ``into`` with the encoded picture. The first call for an encoding starts it; later ones share it."""
        future = picture.encodings.get(encoding)
        if future is None:
            wait = picture.wait
            assert wait is not None, "a picture is dropped after its last encoding"

            def encoded() -> codec.Encoded:
                return codec.encode(wait(), *encoding, metadata)  # `wait` blocks, too, so both are on the thread

            future = asyncio.get_running_loop().run_in_executor(self._threads, encoded)
            picture.encodings[encoding] = future
            future.add_done_callback(_retrieve_exception)
        encoded_picture = await asyncio.shield(future)  # other watchers wait for it, too
        into.format = getattr(pb, f"IMAGE_FORMAT_{encoded_picture.format}")
        into.width, into.height, into.data = encoded_picture.width, encoded_picture.height, encoded_picture.data

    async def write_checkpoint(self, state: SavedState) -> bytes:
        """The bytes of a checkpoint. The first call starts to write it, and later ones share it. Raises
        `InvalidRequest` if it is too large."""
        if state.written is None:
            state.written = asyncio.get_running_loop().run_in_executor(self._threads, state.write)
            state.written.add_done_callback(_retrieve_exception)
        return await asyncio.shield(state.written)


def _retrieve_exception(future: asyncio.Future[Any]) -> None:
    """Keeps asyncio from logging an error that no watcher waited for."""
    if not future.cancelled():
        future.exception()


class JobEventStream:
    """The events of a job as messages for one of its watchers.

    `frames` are the options of the watcher's frames. `attached`: the watcher's request found an existing job. `weights`
    names the weights of the network.
    """

    def __init__(
        self,
        job: Job,
        mailbox: Mailbox,
        encoders: Encoders,
        frames: pb.FrameOptions | None = None,
        *,
        attached: bool = False,
        weights: str = "",
    ) -> None:
        self.job = job
        self.mailbox = mailbox
        self.encoders = encoders
        self._frames = frame_encoding(frames or pb.FrameOptions())
        self._attached = attached
        self._weights = weights

    async def responses(self, message_type: type[R]) -> AsyncIterator[R]:
        """Yields all events, for a watcher that sends no commands. Raises the error that the job ended with."""
        async for number, event in self.mailbox.events():
            assert not isinstance(event, Answer), "only a controller gets answers"
            yield await self.response(message_type, number, event)

    async def response(self, message_type: type[R], number: int, event: Event, frames: Encoding | None = None) -> R:
        """The message of one event. ``frames`` replaces the watcher's encoding of frames. Fields are filled in place:
        a message that is assigned to a field of another one is copied, which would copy a frame four times."""
        response = message_type()
        message = response.event
        message.sequence = number
        match event:
            case Accepted():
                message.accepted.CopyFrom(self._accepted(event))
            case Waiting(position, wait_s):
                message.waiting.CopyFrom(pb.Waiting(queue_position=position, estimated_wait=_duration(wait_s)))
            case Progress():
                message.progress.CopyFrom(_progress(event))
            case Frame(iteration, picture, dropped):
                message.frame.iteration, message.frame.dropped = iteration, dropped
                await self.encoders.encode(message.frame.image, picture, frames or self._frames)
            case Saved(iteration, state):
                message.checkpoint.iteration, message.checkpoint.light = iteration, state.light
                message.checkpoint.data = await self.encoders.write_checkpoint(state)
            case Paused(iteration):
                message.paused.iteration = iteration
            case Resumed(iteration):
                message.resumed.iteration = iteration
            case Changed(iteration, recipe, iterations):
                message.changed.CopyFrom(
                    pb.Changed(iteration=iteration, recipe=recipe_to_message(recipe), iterations=iterations)
                )
            case Finished():
                await self._finished(event, message.result)
        return response

    def _accepted(self, event: Accepted) -> pb.Accepted:
        summary = self.job.admitted_summary
        assert summary is not None, "a job is admitted before it has events"
        return pb.Accepted(
            job_id=self.job.id,
            recipe=recipe_to_message(summary.recipe),
            seed=summary.seed,
            width=summary.width,
            height=summary.height,
            iterations=summary.iterations,
            queue_position=event.position,
            attached=self._attached,
            resumed_at=summary.resumed_at,
            estimated_wait=_duration(event.wait_s),
        )

    async def _finished(self, event: Finished, result: pb.Result) -> None:
        summary = self.job.summary
        assert summary is not None, "a job is admitted before it has events"
        metadata = _result_metadata(summary, event.iterations, self._weights)
        await self.encoders.encode(result.image, event.picture, self.job.encoding, metadata)
        event.picture.wait = None  # the result has one encoding for all watchers, so the pixels can be freed
        result.losses.CopyFrom(_losses(event.losses))
        result.iterations = event.iterations
        result.stop_reason = getattr(pb, f"STOP_REASON_{event.reason.name}")
        result.elapsed.FromMicroseconds(round(event.elapsed_s * 1e6))


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


def _result_metadata(summary: JobSummary, iterations: int, weights: str) -> str:
    """ASCII JSON for the result's metadata. With the same images it reproduces the picture, unless the recipe was
    changed while the job ran, or the job ended early."""
    metadata = {
        "gramophone": version(),
        "recipe": dataclasses.asdict(summary.recipe),  # fields by name; layers as [name, weight]
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
