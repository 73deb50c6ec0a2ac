"""From what happens to a job to the messages that say so; each picture is encoded and each state written once for all."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
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

__all__ = ["Encoders", "JobEventStream", "frame_encoding", "job_message", "result_encoding", "version"]

# What carries the events of a job.
R = TypeVar("R", pb.StylizeStreamResponse, pb.WatchJobResponse, pb.StylizeInteractiveResponse)

# One more does not help while the compute thread has the cores.
ENCODERS = 2
FRAME_QUALITY, RESULT_QUALITY = 85, 95  # of JPEG and WebP, where the request says 0


@functools.cache  # to look for it takes 0.5 ms, and every result says it
def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def frame_encoding(options: pb.FrameOptions) -> Encoding:
    """How a watcher wants its frames."""
    return Encoding(
        _format(options.format, codec.Format.JPEG), options.quality or FRAME_QUALITY, max_side=options.max_side
    )


def result_encoding(spec: pb.JobSpec) -> Encoding:
    """How a job's result is wanted."""
    return Encoding(_format(spec.result_format, codec.Format.PNG), spec.result_quality or RESULT_QUALITY)


class Encoders:
    """Threads that encode pictures and write checkpoints."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(ENCODERS, "encode")

    def close(self) -> None:
        """Gives the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, into: pb.Image, picture: Picture, encoding: Encoding, metadata: str | None = None) -> None:
        """Fills ``into`` with the picture's only encoding of this kind; the first to ask for it starts it."""
        future = picture.encodings.get(encoding)
        if future is None:
            wait = picture.wait
            assert wait is not None, "a picture is dropped when all that is wanted of it has been encoded"

            def encoded() -> codec.Encoded:
                return codec.encode(wait(), *encoding, metadata)  # on its thread, also the waiting

            future = asyncio.get_running_loop().run_in_executor(self._threads, encoded)
            picture.encodings[encoding] = future
            future.add_done_callback(_noted)
        made = await asyncio.shield(future)  # others wait for it, too
        into.format = getattr(pb, f"IMAGE_FORMAT_{made.format}")
        into.width, into.height, into.data = made.width, made.height, made.data

    async def written(self, state: SavedState) -> bytes:
        """The state's only checkpoint; the first to ask for it starts it. Raises `InvalidRequest` if it is too large."""
        if state.written is None:
            state.written = asyncio.get_running_loop().run_in_executor(self._threads, state.write)
            state.written.add_done_callback(_noted)
        return await asyncio.shield(state.written)


def _noted(future: asyncio.Future[Any]) -> None:
    """An error that no watcher has waited for must not be reported as lost."""
    if not future.cancelled():
        future.exception()


class JobEventStream:
    """A job as one of its watchers is told about it.

    `frames` says how it wants its pictures; its request was `attached` to the job or made it; `weights` are the network's.
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

    async def responses(self, kind: type[R]) -> AsyncIterator[R]:
        """What happens to the job, for a watcher that gives no commands. Raises the error that it ended in."""
        async for number, event in self.mailbox.events():
            assert not isinstance(event, Answer), "nobody has asked"
            yield await self.response(kind, number, event)

    async def response(self, kind: type[R], number: int, event: Event, frames: Encoding | None = None) -> R:
        """One event, a frame as ``frames`` instead of as it was wanted. It is written where it is sent from, because every
        message that is put into another is copied, and a frame was copied four times."""
        response = kind()
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
                message.checkpoint.data = await self.encoders.written(state)
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
        plan = self.job.admitted
        assert plan is not None, "a job has a plan before it has events"
        return pb.Accepted(
            job_id=self.job.id,
            recipe=recipe_to_message(plan.recipe),
            seed=plan.seed,
            width=plan.width,
            height=plan.height,
            iterations=plan.iterations,
            queue_position=event.position,
            attached=self._attached,
            resumed_at=plan.resumed_at,
            estimated_wait=_duration(event.wait_s),
        )

    async def _finished(self, event: Finished, result: pb.Result) -> None:
        plan = self.job.plan
        assert plan is not None, "a job has a plan before it has events"
        metadata = _how_it_was_made(plan, event.iterations, self._weights)
        await self.encoders.encode(result.image, event.picture, self.job.encoding, metadata)
        event.picture.wait = None  # all want the result alike, so the pixels have done their part
        result.losses.CopyFrom(_losses(event.losses))
        result.iterations = event.iterations
        result.stop_reason = getattr(pb, f"STOP_REASON_{event.reason.name}")
        result.elapsed.FromMicroseconds(round(event.elapsed_s * 1e6))


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
    if job.state is JobPhase.QUEUED:
        message.queue_position = job.position
    if job.progress is not None:
        message.iteration = job.progress.report.iteration
        message.losses.CopyFrom(_losses(job.progress.report.losses))
    if job.result is not None:
        message.stop_reason = getattr(pb, f"STOP_REASON_{job.result.reason.name}")
    return message


def _format(value: int, default: codec.Format) -> codec.Format:
    """The format of a number; an unknown one is refused elsewhere, with all else that is wrong."""
    known = value in pb.ImageFormat.values() and value
    return codec.Format[pb.ImageFormat.Name(known).removeprefix("IMAGE_FORMAT_")] if known else default


def _how_it_was_made(plan: JobSummary, iterations: int, weights: str) -> str:
    """ASCII JSON for the result's metadata: with the same images it makes the same picture again, unless the recipe was
    changed on the way, or the end came early."""
    made = {
        "gramophone": version(),
        "recipe": dataclasses.asdict(plan.recipe),  # fields by name; layers as [name, weight]
        "style_weights": plan.style_weights,
        "seed": plan.seed,
        "weights": weights,
        "iterations": iterations,
        "changed_at": plan.changed_at,
    }
    return json.dumps(made)


def _progress(event: Progress) -> pb.Progress:
    report = event.report
    return pb.Progress(
        iteration=report.iteration,
        iterations=report.iterations,
        width=report.width,
        height=report.height,
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
