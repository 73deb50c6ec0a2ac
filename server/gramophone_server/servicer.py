"""The service's RPCs: check the request, call the scheduler, translate what comes back. See `checks` and `status`."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf import duration_pb2
from torch import Tensor

from gramophone.recipe import PRESETS, InvalidRecipe, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone.wire import recipe_from_message, recipe_to_message
from gramophone_server import images
from gramophone_server.checks import check_result, check_spec
from gramophone_server.config import Limits
from gramophone_server.errors import EngineFailed, GramophoneError, InvalidRequest
from gramophone_server.job import Losses, StyleJob
from gramophone_server.mailbox import Accepted, Event, Finished, Frame, Progress
from gramophone_server.scheduler import FrameRule, Job, Scheduler
from gramophone_server.status import refusal

__all__ = ["Servicer", "version"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Two of each: one more does not help while the compute thread has the cores, and each decoder may hold 12 bytes a pixel.
DECODERS, ENCODERS = 2, 2
FRAME_QUALITY, RESULT_QUALITY = 85, 95  # of JPEG and WebP, where the request says 0


def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


class Call:
    """One RPC from its start to its end: whether its client is still there, its job, and its line in the log."""

    def __init__(self, method: str, context: Context, over: Callable[[Call], None]) -> None:
        self.id = secrets.token_hex(6)
        self.gone = False
        self._method = method
        self._context = context
        self._over = over
        self._job: Job | None = None
        self._code: grpc.StatusCode | None = None
        self._started = time.monotonic()
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._task = task
        # The only notice of an end that always comes: a client that leaves while a message is being written makes no
        # CancelledError in the handler, and `context.cancelled()` stays false.
        context.add_done_callback(self._done)  # type: ignore[arg-type]  # the stub asks for a class of its own

    def owns(self, job: Job) -> None:
        """The job ends with this RPC."""
        self._job = job
        if self.gone:
            job.cancel()

    def succeeded(self) -> None:
        """The handler has nothing more to say."""
        self._code = grpc.StatusCode.OK

    async def fail(self, error: BaseException) -> NoReturn:
        """Ends the RPC with the status of `error`. The one way out for every exception of a handler."""
        if isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit):
            raise error
        if isinstance(error, asyncio.CancelledError) and self._task.cancelling():
            raise error  # gRPC cancelled this handler; swallowing that leaks the call's operations
        if not isinstance(error, GramophoneError):
            # A CancelledError from something awaited, too: without a status the client would hang until its deadline.
            log.error("%s job=%s failed", self._method, self.id, exc_info=error)
            error = EngineFailed()
        code, message, trailers = refusal(error)
        self._code = code
        await self._context.abort(code, message, trailing_metadata=trailers)

    def _done(self, _: Any) -> None:
        self.gone = True
        if self._job is not None:
            self._job.cancel()
        code = self._code
        if code is None:
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        took_ms = (time.monotonic() - self._started) * 1000
        log.info("%s job=%s code=%s ms=%.0f", self._method, self.id, code.name, took_ms)
        self._over(self)


class Servicer(pb_grpc.StyleTransferServiceServicer):
    """StyleTransferService of one server."""

    def __init__(self, scheduler: Scheduler, limits: Limits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._decoders = ThreadPoolExecutor(DECODERS, "decode")
        self._encoders = ThreadPoolExecutor(ENCODERS, "encode")
        self._calls: set[Call] = set()
        self._no_calls = asyncio.Event()
        self._no_calls.set()

    async def idle(self) -> None:
        """Returns when no RPC is under way."""
        await self._no_calls.wait()

    def close(self) -> None:
        """Gives the threads back."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def Stylize(self, request: pb.StylizeRequest, context: Context) -> pb.StylizeResponse:
        """See the proto."""
        call = self._call("Stylize", context)
        response = pb.StylizeResponse()
        request.spec.ClearField("frames")
        try:
            async for event in self._events(request.spec, call):
                if event.HasField("accepted"):
                    response.accepted.CopyFrom(event.accepted)
                elif event.HasField("result"):
                    response.result.CopyFrom(event.result)
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    async def StylizeStream(
        self, request: pb.StylizeStreamRequest, context: Context
    ) -> AsyncIterator[pb.StylizeStreamResponse]:
        """See the proto."""
        call = self._call("StylizeStream", context)
        try:
            async for event in self._events(request.spec, call):
                yield pb.StylizeStreamResponse(event=event)
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """See the proto."""
        call = self._call("GetServerInfo", context)
        try:
            engine = self._scheduler.engine
            response = pb.GetServerInfoResponse(
                version=version(),
                device=engine.device_name,
                precision=engine.precision,
                backbone=engine.backbone,
                weights=engine.weights_source,
                layers=engine.layers,
                limits=pb.Limits(**{f.name: getattr(self._limits, f.name) for f in dataclasses.fields(Limits)}),
                presets=(pb.PresetRecipe(name=n, recipe=recipe_to_message(r)) for n, r in PRESETS.items()),
                running_jobs=self._scheduler.running,
                queued_jobs=self._scheduler.queued,
            )
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    def _call(self, method: str, context: Context) -> Call:
        call = Call(method, context, self._over)
        self._calls.add(call)
        self._no_calls.clear()
        return call

    def _over(self, call: Call) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._no_calls.set()

    async def _events(self, spec: pb.JobSpec, call: Call) -> AsyncIterator[pb.JobEvent]:
        """The whole life of a job, for both of its RPCs."""
        with self._scheduler.reserve() as place:  # before any image is decoded
            work = await self._work(spec)
            job = place.submit(work, _frame_rule(spec))
        call.owns(job)
        async for number, event in job.events():
            yield await self._message(number, event, spec, work, call.id)

    async def _work(self, spec: pb.JobSpec) -> StyleJob:
        """The job of a request. Raises `InvalidRequest` with every violation, those of the images included."""
        violations = list(check_spec(spec, self._limits, self._scheduler.engine.layers))
        try:
            recipe = recipe_from_message(spec.recipe)
        except InvalidRecipe:  # among the violations already
            recipe = Recipe()
        needed = min(recipe.size, self._limits.max_size)
        needed_style = min(math.ceil(needed * recipe.style_scale), self._limits.max_size)
        sources = {
            "spec.content.data": (spec.content.data, needed),
            "spec.start_image.data": (spec.start_image.data, needed),
        }
        for i, style in enumerate(spec.styles[: self._limits.max_styles]):
            sources[f"spec.styles[{i}].image.data"] = (style.image.data, needed_style)
        pictures = await asyncio.gather(
            *(self._decoded(field, data, longest) for field, (data, longest) in sources.items() if data),
            return_exceptions=True,
        )
        decoded: dict[str, Tensor] = {}
        for field, picture in zip((field for field, (data, _) in sources.items() if data), pictures, strict=True):
            if isinstance(picture, InvalidRequest):
                violations.extend(picture.violations)
            elif isinstance(picture, BaseException):
                raise picture
            else:
                decoded[field] = picture
        if violations:
            raise InvalidRequest(violations)
        work = StyleJob(
            recipe=recipe,
            content=decoded["spec.content.data"],
            styles=tuple(decoded[f"spec.styles[{i}].image.data"] for i in range(len(spec.styles))),
            style_weights=tuple(s.weight if s.HasField("weight") else 1.0 for s in spec.styles),
            start=decoded.get("spec.start_image.data"),
            seed=spec.seed if spec.HasField("seed") else secrets.randbits(64),
        )
        violations = list(check_result(work))
        if violations:
            raise InvalidRequest(violations)
        return work

    async def _decoded(self, field: str, data: bytes, needed: int) -> Tensor:
        return await _in(self._decoders, partial(images.decode, data, field, self._limits, needed))

    async def _message(self, number: int, event: Event, spec: pb.JobSpec, work: StyleJob, job_id: str) -> pb.JobEvent:
        message = pb.JobEvent(sequence=number)
        match event:
            case Accepted(position):
                width, height = work.result_size
                message.accepted.CopyFrom(
                    pb.Accepted(
                        job_id=job_id,
                        recipe=recipe_to_message(work.recipe),
                        seed=work.seed,
                        width=width,
                        height=height,
                        iterations=sum(scale.iterations for scale in work.scales),
                        queue_position=position,
                    )
                )
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
                options = spec.frames
                image = await self._encoded(
                    picture,
                    _format(options.format, images.Format.JPEG),
                    options.quality or FRAME_QUALITY,
                    options.max_side,
                )
                message.frame.CopyFrom(pb.Frame(iteration=iteration, image=image, dropped=dropped))
            case Finished(picture, losses, iterations, elapsed_s):
                image = await self._encoded(
                    picture,
                    _format(spec.result_format, images.Format.PNG),
                    spec.result_quality or RESULT_QUALITY,
                    metadata=_how_it_was_made(work, self._scheduler.engine.weights_source),
                )
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

    async def _encoded(
        self,
        picture: Callable[[], Tensor],
        format: images.Format,
        quality: int,
        max_side: int = 0,
        metadata: str | None = None,
    ) -> pb.Image:
        def encode() -> images.Encoded:
            return images.encode(picture(), format, quality, max_side, metadata)  # on its thread, also the waiting

        encoded = await _in(self._encoders, encode)
        return pb.Image(
            format=f"IMAGE_FORMAT_{encoded.format}",
            width=encoded.width,
            height=encoded.height,
            data=encoded.data,
        )


async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _frame_rule(spec: pb.JobSpec) -> FrameRule | None:
    if not spec.HasField("frames"):
        return None
    interval = spec.frames.min_interval
    return FrameRule(max(1, spec.frames.every_iterations), interval.seconds + interval.nanos / 1e9)


def _format(value: int, default: images.Format) -> images.Format:
    return images.Format[pb.ImageFormat.Name(value).removeprefix("IMAGE_FORMAT_")] if value else default


def _how_it_was_made(work: StyleJob, weights: str) -> str:
    """ASCII JSON for the result's metadata: with the same images it makes the same picture again."""
    made = {
        "gramophone": version(),
        "recipe": dataclasses.asdict(work.recipe),  # fields by name; layers as [name, weight]
        "style_weights": work.style_weights,
        "seed": work.seed,
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
