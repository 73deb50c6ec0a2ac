"""The way to a server, for asyncio; `sync_client` has the same without."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import ConnectionFailed, DeadlineExceeded, GramophoneError, NotReady
from gramophone_client.streams.job_control import JobControl
from gramophone_client.streams.job_stream import JobStream
from gramophone_client.streams.recovery import PATIENCE_S, Recovery, ResendableJob
from gramophone_client.transport import parsing, uploads
from gramophone_client.transport.connection import SERVICE, Connection
from gramophone_client.transport.job_spec import encoded, job_spec, uploaded
from gramophone_client.types.options import (
    CheckpointOptions,
    FrameOptions,
    ImageInput,
    JobOptions,
    Styles,
    UploadedImage,
)
from gramophone_client.types.server_info import ServerInfo
from gramophone_client.types.updates import JobStatus, Stylized, Update

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "DEFAULT_TARGET", "DEFAULT_TIMEOUT_S", "GramophoneClient"]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 900.0
DEFAULT_MAX_MESSAGE_BYTES = 160 * 2**20  # a request with a checkpoint of 64 MiB; gRPC's own 4 MiB is less than one PNG


class GramophoneClient:
    """A connection to one server, for one event loop: make it where that loop runs.

    async with GramophoneClient("gpu-1:50051") as client:
        stylized = await client.stylize("photo.jpg", "painting.jpg", beta=5)
        stylized.save("out.png")

    Every call has a deadline: `timeout_s` of the call, else of the client. All methods raise `GramophoneError`s.

    A target may name several servers of which any will do ("ipv4:10.0.0.1:50051,10.0.0.2:50051", or a DNS name with
    several addresses): the first that answers is taken, and when it is lost the next. One that shuts down keeps its
    connections until its jobs have ended, and refuses new ones until then: these ask again for `patience_s`, or 30 s, and
    come to the next address when it has gone.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        retries: bool = True,
    ) -> None:
        """`credentials` from `grpc.ssl_channel_credentials`; None talks in plaintext. Without `retries` a call that the
        server refuses fails at once, for whoever counts refusals, and no job is sent again."""
        asyncio.get_running_loop()  # a channel belongs to a loop; without one, gRPC would pick another silently
        self.target = target
        self.timeout_s = timeout_s
        self._connection = Connection(
            target,
            timeout_s=timeout_s,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
            retries=retries,
        )
        self._service: Any = self._connection.service

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops what still runs and closes the connection."""
        await self._connection.close()

    async def stylize(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> Stylized:
        """Paints `content` in the style of one or several pictures and returns the finished one.

        `job` takes `preset`, `seed`, `start_image`, `result_format`, `result_quality`, `detach_grace`, `resume` and every
        field of a recipe; see `job_spec`. A server that is busy or away is asked again, up to three times; one that is not
        ready, shuts down or is lost on the way, for 30 s, in which any server that the target leads to may do the job.

        A call with the `request_id` (a UUID) of a job that is there already finds that job instead of making another.
        None makes a new id, so that asking again never makes a second job.
        """
        spec = await asyncio.to_thread(job_spec, content, styles, **job)
        request = pb.StylizeRequest(spec=spec, request_id=_request_id(request_id))
        sent = Recovery(self._connection, timeout_s=self._seconds(timeout_s), grace_s=0.0)

        async def ask(left_s: float) -> Any:
            with self._connection.errors_rebuilt(sent.timeout_s):
                return await self._service.Stylize(request, timeout=left_s)

        images = uploaded(content, styles, job.get("start_image"))  # which are `renewing`'s, not the submission's
        sent.begin(ResendableJob(spec, request.request_id, (), await self._patience_s(PATIENCE_S)))
        while True:
            sent.start_call()
            try:
                return parsing.stylized(await uploads.renewing(self._connection, images, ask, sent.left_s))
            except GramophoneError as error:
                await sent.next_attempt(error)

    def stream(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = CheckpointOptions(),  # noqa: B008
        patience_s: float = PATIENCE_S,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> AsyncGenerator[Update, None]:
        """The same job, told while it runs: `Accepted`, then `Progress` and `Frame`s as they come, then `Result`.

        A slow reader gets the newest frame, never a backlog; `frames=None` asks for none. Leaving the iteration stops
        the job at the server, or with `detach_grace` leaves it alone for so long: at once with `contextlib.aclosing`,
        else when Python drops the generator. An error carries the newest frame as `.frame`, the newest checkpoint as
        `.checkpoint`.

        With `detach_grace` a connection that is lost after `Accepted` is made again until that time has passed, and the
        iteration goes on with the update after the last one.

        When the job is lost with its server, or that shuts down, it is sent again, to whatever server the target then
        leads to: from the last checkpoint, or from its beginning where there is none. The updates then go on with
        another `Accepted`, whose `resumed_at` says where; iterations since that checkpoint are done, and told, again.
        After `patience_s` without any server the loss is raised; 0 never sends a job again. A job that failed by itself
        is never sent again, nor one that has lost its servers three times without a newer checkpoint.

        Before `Accepted` the same request is sent again for as long, when the server is not ready, shuts down or is lost.
        If there was no connection to begin with, that is raised at once.
        """

        return JobStream(
            self._connection,
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=self._seconds(timeout_s),
            grace_s=job.get("detach_grace") or 0.0,
            prepare=self._submission(content, styles, frames, checkpoints, patience_s, request_id, job),
        ).updates()

    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = None,
        timeout_s: float | None = None,
        detach_grace: float = 0.0,
    ) -> AsyncGenerator[Update, None]:
        """The updates of a job that is there already, as `stream` tells them, also in its errors.

        They begin after the one whose `sequence` is `after_sequence`, as far as the server still knows them; 0 begins
        with `Accepted`. A lost connection is made again until `detach_grace` seconds have passed; a lost job is not
        sent again, since its images are not known here.
        """
        return JobStream(
            self._connection,
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=self._seconds(timeout_s),
            grace_s=detach_grace,
            job_id=job_id,
            sequence=after_sequence,
        ).updates()

    def control(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(max_in_flight=2),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = CheckpointOptions(),  # noqa: B008
        patience_s: float = PATIENCE_S,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> JobControl:
        """The same job, with a hand on it while it runs: pause, other weights, a picture now, the end now.

        async with client.control("photo.jpg", "painting.jpg") as job:
            async for update in job:
                if isinstance(update, Progress) and update.iteration == 50:
                    await job.update(beta=8)

        Entering sends the job and raises what the server has against it. When the job is lost with its server, it is sent
        again as `stream` does it, and goes on with what the commands had changed. See `JobControl`.
        """

        return JobControl(
            self._connection,
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=self._seconds(timeout_s),
            grace_s=job.get("detach_grace") or 0.0,
            prepare=self._submission(content, styles, frames, checkpoints, patience_s, request_id, job),
        )

    def control_job(
        self,
        job_id: str,
        *,
        frames: FrameOptions | None = FrameOptions(max_in_flight=2),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = None,
        timeout_s: float | None = None,
        detach_grace: float = 0.0,
    ) -> JobControl:
        """Takes control of a job that is there already. Raises `JobControlled` if somebody else has it.

        A lost connection is made again until `detach_grace` seconds have passed; a lost job is not sent again, since its
        images are not known here.
        """
        return JobControl(
            self._connection,
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=self._seconds(timeout_s),
            grace_s=detach_grace,
            job_id=job_id,
        )

    async def upload(self, image: ImageInput, *, timeout_s: float | None = None) -> UploadedImage:
        """Leaves an image with the server, so that any number of jobs can name it instead of carrying it.

        What it returns is good wherever an image is. If the server has lost the image when a job comes, or another
        server takes the job, it is uploaded again by itself.
        """
        data = await asyncio.to_thread(encoded, image)
        return await uploads.upload(self._connection, data, timeout_s)

    async def get_job(self, job_id: str, *, timeout_s: float = 10.0) -> JobStatus:
        """How the job stands."""
        answer = await self._connection.ask(self._service.GetJob, pb.GetJobRequest(job_id=job_id), timeout_s)
        return parsing.job_status(answer.job)

    async def cancel_job(self, job_id: str, *, timeout_s: float = 10.0) -> JobStatus:
        """Stops the job and returns how it stands then; one that has ended stays as it is."""
        answer = await self._connection.ask(self._service.CancelJob, pb.CancelJobRequest(job_id=job_id), timeout_s)
        return parsing.job_status(answer.job)

    async def list_jobs(self, *, timeout_s: float = 10.0) -> list[JobStatus]:
        """The jobs that the server has, newest first. Raises `ListingDisabled` unless its owner allows it.

        `timeout_s` is for each page of 100.
        """
        jobs: list[JobStatus] = []
        token = ""
        while True:
            request = pb.ListJobsRequest(page_size=100, page_token=token)
            page = await self._connection.ask(self._service.ListJobs, request, timeout_s)
            jobs += [parsing.job_status(job) for job in page.jobs]
            token = page.next_page_token
            if not token:
                return jobs

    async def server_info(self, *, timeout_s: float = 10.0) -> ServerInfo:
        """What the server is and takes: version, device, network, layers, limits, presets, load."""
        answer = await self._connection.ask(self._service.GetServerInfo, pb.GetServerInfoRequest(), timeout_s)
        return parsing.server_info(answer)

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Returns as soon as the server's health says SERVING. Raises `NotReady` after `timeout_s`."""
        end = time.monotonic() + timeout_s
        said = "no connection"
        while (left_s := end - time.monotonic()) > 0:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            call = self._connection.health.Watch(request, timeout=left_s, wait_for_ready=True)
            try:
                with self._connection.errors_rebuilt(left_s):
                    async for response in call:
                        if response.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                        said = f"its health says {health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)}"
            except DeadlineExceeded:
                break
            except ConnectionFailed:
                said = "the connection was lost"
            finally:
                call.cancel()
            await asyncio.sleep(0.1)  # a server on its way down ends the watch at once, again and again
        raise NotReady(
            f"the server at {self.target} is not ready after {timeout_s:g} s: {said}; start it, or wait for longer"
        )

    def _submission(
        self,
        content: ImageInput,
        styles: Styles,
        frames: FrameOptions | None,
        checkpoints: CheckpointOptions | None,
        patience_s: float,
        request_id: str | None,
        job: JobOptions,
    ) -> Callable[[], Awaitable[ResendableJob]]:
        """What makes the job's message, which reads files."""

        async def prepare() -> ResendableJob:
            spec = await asyncio.to_thread(job_spec, content, styles, frames=frames, checkpoints=checkpoints, **job)
            images = uploaded(content, styles, job.get("start_image"))
            return ResendableJob(spec, _request_id(request_id), images, await self._patience_s(patience_s))

        return prepare

    async def _patience_s(self, asked_s: float) -> float:
        """None without retries. With patience a job is sent when it is known whether a server is there; see `Recovery`."""
        if not self._connection.retries:
            return 0.0
        await self._connection.wait_until_connected()
        return asked_s

    def _seconds(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s


def _request_id(given: str | None) -> str:
    return str(uuid.uuid4()) if given is None else given
