"""A service that plays scripts instead of running jobs: real stubs and a real port, but no engine."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from PIL import Image, PngImagePlugin

from gramophone.recipe import Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone.wire import recipe_to_message
from gramophone_server.errors import GramophoneError, ImageNotFound, InvalidRequest, JobNotFound
from gramophone_server.rpc.status import abort_status
from tests.support.clock import WITHIN_S

HANG = object()  # a step that lasts until the call has ended
NOWHERE = "127.0.0.1:1"  # a port without a listener


class Answer(NamedTuple):
    """A step that waits for the next message of a controller and answers it, unless it is an acknowledgement."""

    iteration: int = 1
    error: str = ""  # the description of an error in the field `beta` of the command
    output: pb.JobEvent | None = None  # sent after the answer


SIZE = (24, 18)


def encoded(colour: str = "red", format: str = "PNG", size: tuple[int, int] = SIZE, note: str = "") -> bytes:
    """A small picture."""
    out, text = io.BytesIO(), PngImagePlugin.PngInfo()
    if note:
        text.add_text("gramophone", note)
    Image.new("RGB", size, colour).save(out, format, pnginfo=text)
    return out.getvalue()


def accepted(**fields) -> pb.JobEvent:
    defaults = {"job_id": "j1", "recipe": recipe_to_message(Recipe()), "seed": 7, "width": 24, "height": 18}
    return pb.JobEvent(accepted=pb.Accepted(**defaults | {"iterations": 300} | fields))


def progress(iteration: int) -> pb.JobEvent:
    losses = pb.Losses(total=3, content=1, style=2, style_layers=[pb.LayerLoss(layer="relu1_1", value=2)])
    return pb.JobEvent(
        progress=pb.Progress(
            iteration=iteration,
            iterations=300,
            width=12,
            height=9,
            scale=1,
            scales=2,
            losses=losses,
            iterations_per_second=8,
            time_left=Duration(seconds=90, nanos=500_000_000),
        )
    )


def frame(iteration: int, colour: str = "blue", size: tuple[int, int] = (12, 9)) -> pb.JobEvent:
    image = pb.Image(format=pb.IMAGE_FORMAT_JPEG, width=size[0], height=size[1], data=encoded(colour, "JPEG", size))
    return pb.JobEvent(frame=pb.Frame(iteration=iteration, image=image, dropped=2))


def result(data: bytes | None = None) -> pb.JobEvent:
    image = pb.Image(format=pb.IMAGE_FORMAT_PNG, width=24, height=18, data=data or encoded("green"))
    losses = pb.Losses(total=0.5, content=0.25, style=0.25)
    done = pb.STOP_REASON_ITERATIONS_DONE
    elapsed = Duration(seconds=2, nanos=250_000_000)
    return pb.JobEvent(result=pb.Result(image=image, losses=losses, iterations=300, stop_reason=done, elapsed=elapsed))


def waiting(queue_position: int, wait_s: int | None = None) -> pb.JobEvent:
    wait = None if wait_s is None else Duration(seconds=wait_s)
    return pb.JobEvent(waiting=pb.Waiting(queue_position=queue_position, estimated_wait=wait))


def picture(iteration: int) -> pb.JobEvent:
    """A frame in answer to a controller's command."""
    image = pb.Image(format=pb.IMAGE_FORMAT_PNG, width=SIZE[0], height=SIZE[1], data=encoded("purple"))
    return pb.JobEvent(frame=pb.Frame(iteration=iteration, image=image))


def checkpoint(iteration: int, light: bool = True) -> pb.JobEvent:
    state = pb.Checkpoint(iteration=iteration, light=light, data=b"state after %d" % iteration)
    return pb.JobEvent(checkpoint=state)


def changed(iteration: int, **fields) -> pb.JobEvent:
    return pb.JobEvent(
        changed=pb.Changed(iteration=iteration, recipe=recipe_to_message(Recipe(**fields)), iterations=300)
    )


def numbered(*steps) -> list:
    """The steps, with sequence numbers from 1 on."""
    for number, step in enumerate(steps, 1):
        if isinstance(step, pb.JobEvent):
            step.sequence = number
    return list(steps)


def job(**fields) -> pb.Job:
    defaults = {"job_id": "j1", "state": pb.JOB_STATE_RUNNING, "create_time": Timestamp(seconds=1_750_000_000)}
    return pb.Job(**defaults | {"iteration": 10, "iterations": 300, "width": 24, "height": 18} | fields)


def refused(error: GramophoneError) -> grpc.Status:
    """The status that the real server sends for this error."""
    code, message, trailers = abort_status(error)
    return rpc_status(code, message, trailers)


def rpc_status(code: grpc.StatusCode, message: str = "", trailers: tuple = ()) -> grpc.Status:
    """A status as gRPC itself or a proxy makes it."""
    status = grpc.Status()
    status.code, status.details, status.trailing_metadata = code, message, trailers
    return status


PHOTO, PAINTING = encoded("red"), encoded("yellow")
LOST = rpc_status(grpc.StatusCode.UNAVAILABLE, "gone")
NO_RETRIES = (("grpc-retry-pushback-ms", "-1"),)  # trailers that stop gRPC's own retries, which take time


class FakeService(pb_grpc.StyleTransferServiceServicer):
    """Plays one of `scripts` per call, in their order, and the last one for all further calls. Records the requests."""

    def __init__(self) -> None:
        self.scripts: list[list] = [[accepted(), progress(10), frame(10), progress(20), frame(20), result()]]
        self.specs: list[pb.JobSpec] = []
        self.library_ops: list[pb.LibraryOp] = []
        self.request_ids: list[str] = []
        self.watches: list[pb.WatchJobRequest] = []
        self.messages: list[pb.StylizeInteractiveRequest] = []  # of controllers
        self.metadata: list[tuple[str, tuple[tuple[str, str | bytes], ...]]] = []  # of each call, by its name
        self.images: dict[str, bytes] = {}  # uploaded, by digest
        self.uploads = 0
        self.max_upload_bytes = 2**30  # an upload is refused as soon as it has more
        self.jobs = [job()]
        self.target = ""
        self.stop = lambda: None  # ends all calls and the server
        self.hanging = threading.Event()  # a call is at its HANG
        self.uploading = threading.Event()  # the first chunk of an image has arrived
        self.go = threading.Event()  # cleared: an upload is answered when it is set again
        self.go.set()
        self.call_ended = threading.Event()  # a call has ended, by its script or before
        self.cancelled = False  # whether the last call ended before the end of its script
        self.health = health.HealthServicer()

    @property
    def commands(self) -> list[str]:
        """The kinds of the controllers' messages."""
        return [message.WhichOneof("command") for message in self.messages]

    def Stylize(self, request, context):
        self.request_ids.append(request.request_id)
        response = pb.StylizeResponse()
        for event in self._play(request.spec, context):
            for name in ("accepted", "result"):
                if event.HasField(name):
                    getattr(response, name).CopyFrom(getattr(event, name))
        return response

    def StylizeStream(self, request, context):
        self.request_ids.append(request.request_id)
        for event in self._play(request.spec, context):
            yield pb.StylizeStreamResponse(event=event)

    def WatchJob(self, request, context):
        self.watches.append(request)
        for event in self._play(None, context):
            yield pb.WatchJobResponse(event=event)

    def StylizeInteractive(self, requests, context):
        first = next(requests)
        self.messages.append(first)
        spec = first.start.spec if first.HasField("start") else None
        for step in self._play(spec, context):
            if isinstance(step, Answer):
                yield from self._answer(step, next(requests))
            else:
                yield pb.StylizeInteractiveResponse(event=step)

    def _answer(self, step, request):
        self.messages.append(request)
        kind = request.WhichOneof("command")
        if kind == "ack":
            return
        answer = pb.CommandResult(command_id=request.command_id, iteration=step.iteration)
        if step.error:
            answer.field_errors.add(field=f"{kind}.beta", description=step.error)
        yield pb.StylizeInteractiveResponse(command_result=answer)
        if step.output is not None:
            yield pb.StylizeInteractiveResponse(event=step.output)

    def UploadImage(self, requests, context):
        self.call_ended.clear()
        if not context.add_callback(self.call_ended.set):
            self.call_ended.set()
        data = b""
        for request in requests:
            data += request.chunk
            self.uploading.set()
            if len(data) > self.max_upload_bytes:
                context.abort_with_status(refused(InvalidRequest([Violation("chunk", f"is {len(data)} bytes")])))
        self.go.wait(WITHIN_S)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.images[digest] = data
        self.uploads += 1
        return pb.UploadImageResponse(digest=digest, width=SIZE[0], height=SIZE[1])

    def GetJob(self, request, context):
        return pb.GetJobResponse(job=self._found(request.job_id, context))

    def ListJobs(self, request, context):
        first = int(request.page_token or 0)
        token = str(first + 1) if first + 1 < len(self.jobs) else ""
        return pb.ListJobsResponse(jobs=self.jobs[first : first + 1], next_page_token=token)

    def CancelJob(self, request, context):
        found = self._found(request.job_id, context)
        if not found.HasField("end_time"):
            found.state = pb.JOB_STATE_CANCELLED
            found.end_time.FromSeconds(1_750_000_060)
        return pb.CancelJobResponse(job=found)

    def GetServerInfo(self, request, context):
        return pb.GetServerInfoResponse(
            version="1.2.3",
            device="cpu (a test)",
            precision="fp32",
            backbone="vgg19",
            weights="none",
            layers=["relu1_1", "relu4_2"],
            limits=pb.Limits(
                max_image_bytes=10 * 2**20,
                max_image_pixels=25_000_000,
                max_size=2048,
                max_queued=16,
                max_running=2,
                max_paused_s=600,
                max_checkpoint_bytes=64 * 2**20,
                max_watchers=8,
                max_message_bytes=8 * 2**20,
            ),
            presets=[pb.PresetRecipe(name="fast", recipe=recipe_to_message(Recipe()))],
            running_jobs=1,
            paused_jobs=1,
            style_cache=pb.CacheStats(hits=3, misses=1, bytes=5 * 2**19, max_bytes=64 * 2**20),
            uploads=pb.CacheStats(max_bytes=2**30),
            estimated_wait=Duration(seconds=12, nanos=500_000_000),
            library_ops=self.library_ops,
            self_test_time=Duration(nanos=70_000_000),
        )

    def set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        self.health.set("gramophone.v1.StyleTransferService", status)

    def _found(self, job_id, context) -> pb.Job:
        for found in self.jobs:
            if found.job_id == job_id:
                return found
        context.abort_with_status(refused(JobNotFound(job_id)))

    def _play(self, spec, context) -> Iterator[pb.JobEvent]:
        if spec is not None:
            self.specs.append(spec)
            images = (spec.content, spec.start_image, *(style.image for style in spec.styles))
            missing = {image.digest: None for image in images if image.digest and image.digest not in self.images}
            checkpoint = "" if spec.resume_digest in self.images else spec.resume_digest
            if missing or checkpoint:
                context.abort_with_status(refused(ImageNotFound(*missing, checkpoint=checkpoint)))
        is_complete, ended = False, threading.Event()
        self.call_ended.clear()

        def end() -> None:
            self.cancelled = not is_complete
            ended.set()
            self.call_ended.set()

        context.add_callback(end)
        for step in self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]:
            if step is HANG:
                self.hanging.set()
                ended.wait(WITHIN_S)
                return
            if isinstance(step, grpc.Status):
                is_complete = True
                context.abort_with_status(step)
            is_complete = not isinstance(step, Answer) and step.HasField("result")
            yield step


class _MetadataReader(grpc.ServerInterceptor):
    def __init__(self, service: FakeService) -> None:
        self._service = service

    def intercept_service(self, continuation, details):
        name = details.method.rpartition("/")[2]
        self._service.metadata.append((name, tuple(map(tuple, details.invocation_metadata))))
        return continuation(details)


@contextmanager
def serving() -> Iterator[FakeService]:
    """A fake service on a free port of the loopback."""
    service = FakeService()
    # Not grpc.aio: the client under test may have an event loop in another thread, and grpc.aio does not poll reliably
    # for two loops.
    with futures.ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads, interceptors=[_MetadataReader(service)], options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_StyleTransferServiceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(service.health, server)
        service.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        service.stop = lambda: server.stop(None).wait()
        try:
            yield service
        finally:
            service.stop()
