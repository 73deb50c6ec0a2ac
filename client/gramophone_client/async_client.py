"""The client for asyncio; `client` has the one without."""

from __future__ import annotations

import asyncio
from functools import partial
from types import TracebackType
from typing import NoReturn, Self, Unpack

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.deprecations import accepts_old_keywords
from gramophone_client.errors import GramophoneError
from gramophone_client.streams.job_control import AsyncJobControl
from gramophone_client.streams.job_stream import AsyncJobStream
from gramophone_client.streams.recovery import PATIENCE_S, Recovery
from gramophone_client.streams.submission import prepare_job
from gramophone_client.transport import parsing, uploads
from gramophone_client.transport.call_options import DEFAULT_MAX_RETRIES, Metadata, checked_seconds
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import image_bytes, job_request
from gramophone_client.transport.readiness import wait_until_serving
from gramophone_client.types.options import (
    CheckpointOptions,
    FrameOptions,
    ImageInput,
    JobOptions,
    Styles,
    UploadedImage,
)
from gramophone_client.types.server_info import ServerInfo
from gramophone_client.types.signatures import shows_options
from gramophone_client.types.updates import JobStatus, Stylized

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "DEFAULT_TARGET", "DEFAULT_TIMEOUT_S", "AsyncGramophoneClient"]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 900.0
# A checkpoint of 64 MiB, or more from a server that allows it; gRPC's own 4 MiB is less than one PNG.
DEFAULT_MAX_MESSAGE_BYTES = 160 * 2**20


class AsyncGramophoneClient:
    """A connection to one server, for the event loop that runs where it is made.

    async with AsyncGramophoneClient("gpu-1:50051") as client:
        stylized = await client.stylize("photo.jpg", "painting.jpg", beta=5)
        stylized.save("out.png")

    Every call has a deadline: `timeout` of the call, else of the client. All methods raise `GramophoneError`s.

    A target may name several equivalent servers ("ipv4:10.0.0.1:50051,10.0.0.2:50051", or a DNS name with several
    addresses). The client uses the first that answers, and the next one after that is lost. A server that shuts down
    keeps its connections until its jobs have ended, and refuses new jobs. These are sent again for `patience`
    seconds, and reach the next address after the server has exited.

    If the images and the checkpoint of a job have more than 4 MiB together, the client uploads the largest of them and
    names them in the request, unless the server has them already. The job's `timeout` includes this.
    """

    @accepts_old_keywords
    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        max_retries: int = DEFAULT_MAX_RETRIES,
        metadata: Metadata | None = None,
    ) -> None:
        """`timeout` is the time of a call, in seconds, that is given none itself. `credentials` are those of
        `grpc.ssl_channel_credentials`; None connects in plaintext.

        `max_retries`, 0 to 4, is how often a call is repeated that the server refuses because it is full or that finds
        no server, and how often a job that loses its servers is sent again before it has run for 10 s. With 0 a refused
        call fails at once, so that refusals can be counted, and no job is sent again.

        `metadata` is sent with every call: a token for a proxy, for example, or a `traceparent`, whose trace the
        server's access log names. That of a call itself replaces values of the same keys. See `Metadata`.
        """
        self._connection = Connection(
            target,
            timeout=timeout,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
            max_retries=max_retries,
            metadata=metadata,
        )

    @property
    def target(self) -> str:
        """The address of the server, or of several."""
        return self._connection.target

    @property
    def timeout(self) -> float:
        """The seconds of a call that is given no `timeout` itself."""
        return self._connection.timeout_s

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or sent to a process; make one there")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls, which then raise `ClientClosedError`, and closes the connection."""
        await self._connection.close()

    @shows_options
    @accepts_old_keywords
    async def stylize(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        patience: float = PATIENCE_S,
        timeout: float | None = None,
        request_id: str | None = None,
        metadata: Metadata | None = None,
        **job: Unpack[JobOptions],
    ) -> Stylized:
        """Paints `content` in the style of one or several pictures and returns the finished picture.

        `job` takes `preset`, `seed`, `start_image`, `result_format`, `result_quality`, `detach_grace`, `resume` and
        every field of a recipe; see `JobOptions`.

        The call is retried up to `max_retries` times if the server is full or cannot be reached. If the server is not
        ready, shuts down or is lost during the call, it is retried for `patience` seconds, on any server that the
        target leads to.

        A call with the `request_id` (a UUID) of an existing job finds that job instead of making another one. None
        makes a new id, so that retries never make a second job.
        """
        connection = self._calling(metadata)
        timeout_s, patience_s = connection.timeout(timeout), checked_seconds("patience", patience, or_zero=True)
        sent = await prepare_job(connection, content, styles, job, patience_s=patience_s, request_id=request_id)
        recovery = Recovery(connection, timeout_s=timeout_s, grace_s=0.0)
        recovery.start(sent)
        while True:
            recovery.start_call()
            request = pb.StylizeRequest(spec=sent.spec, request_id=sent.request_id)
            try:
                with connection.errors_rebuilt(timeout_s):
                    return parsing.stylized(await connection.start("Stylize", request, recovery.left_s))
            except GramophoneError as error:
                await recovery.next_attempt(error)

    @shows_options
    @accepts_old_keywords
    def stream(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = CheckpointOptions(),  # noqa: B008
        patience: float = PATIENCE_S,
        timeout: float | None = None,
        request_id: str | None = None,
        metadata: Metadata | None = None,
        **job: Unpack[JobOptions],
    ) -> AsyncJobStream:
        """Runs a job like `stylize` and yields its updates: `Accepted`, then `Progress` and `Frame`s, then `Result`.

        async with client.stream("photo.jpg", "painting.jpg") as updates:
            async for update in updates:
                if isinstance(update, Frame):
                    update.picture.save("now.jpg")

        Entering sends the job, and raises the error if the server refuses it. A slow reader gets the newest frame,
        never a backlog; `frames=None` asks for no frames. Leaving the context stops the job at the server, or leaves it
        without a watcher for `detach_grace` seconds. Without a context that happens when Python drops the stream. An
        error carries the newest frame as `.frame` and the newest checkpoint as `.checkpoint`.

        With `detach_grace`, the client reconnects after a connection is lost, until that time has passed, and the
        iteration continues with the next update.

        If the job's server is lost or shuts down, the job is sent again, to any server that the target then leads to:
        from the newest checkpoint, or from the start if there is none. The updates continue with another `Accepted`,
        whose `resumed_at` is the iteration of that checkpoint; later iterations are computed, and reported, again.
        After `patience` without any server the loss is raised; with 0 a job is never sent again. A job that failed by
        itself is never sent again, nor is one that was sent again `max_retries` times without running for 10 s in
        between; the error then says how to go on by hand.

        Before `Accepted` the same request is sent again for `patience` if the server is not ready, shuts down or is
        lost. If no connection could be made at all, the error is raised at once.
        """
        connection = self._connection.with_metadata(metadata)
        prepare = partial(
            prepare_job,
            connection,
            content,
            styles,
            job,
            patience_s=checked_seconds("patience", patience, or_zero=True),
            request_id=request_id,
            frames=frames,
            checkpoints=checkpoints,
        )
        return AsyncJobStream(
            connection,
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=connection.timeout(timeout),
            grace_s=job.get("detach_grace") or 0.0,
            prepare=prepare,
        )

    @accepts_old_keywords
    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = None,
        timeout: float | None = None,
        detach_grace: float = 0.0,
        metadata: Metadata | None = None,
    ) -> AsyncJobStream:
        """Yields the updates of a job that exists already. Updates and errors are those of `stream`.

        They start after the update whose `sequence` is `after_sequence`, if the server still has them; 0 starts
        with `Accepted`. After a lost connection the client reconnects until `detach_grace` seconds have passed. A lost
        job is not sent again, because the client does not have its images.
        """
        return AsyncJobStream(
            self._connection.with_metadata(metadata),
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=self._connection.timeout(timeout),
            grace_s=checked_seconds("detach_grace", detach_grace, or_zero=True),
            job_id=job_id,
            sequence=after_sequence,
        )

    @shows_options
    @accepts_old_keywords
    def control(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(max_in_flight=2),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = CheckpointOptions(),  # noqa: B008
        patience: float = PATIENCE_S,
        timeout: float | None = None,
        request_id: str | None = None,
        metadata: Metadata | None = None,
        **job: Unpack[JobOptions],
    ) -> AsyncJobControl:
        """Runs a job like `stream`, with control of it: pause it, change weights, get a picture, end it early.

        async with client.control("photo.jpg", "painting.jpg") as job:
            async for update in job:
                if isinstance(update, Progress) and update.iteration == 50:
                    await job.update(beta=8)

        Entering sends the job, and raises the error if the server refuses it. A job that is lost with its server is
        sent again as in `stream`, and continues with the changes of all commands. See `AsyncJobControl`.
        """
        connection = self._connection.with_metadata(metadata)
        prepare = partial(
            prepare_job,
            connection,
            content,
            styles,
            job,
            patience_s=checked_seconds("patience", patience, or_zero=True),
            request_id=request_id,
            frames=frames,
            checkpoints=checkpoints,
        )
        return AsyncJobControl(
            connection,
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=connection.timeout(timeout),
            grace_s=job.get("detach_grace") or 0.0,
            prepare=prepare,
        )

    @accepts_old_keywords
    def control_job(
        self,
        job_id: str,
        *,
        frames: FrameOptions | None = FrameOptions(max_in_flight=2),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = None,
        timeout: float | None = None,
        detach_grace: float = 0.0,
        metadata: Metadata | None = None,
    ) -> AsyncJobControl:
        """Takes control of a job that exists already. Raises `JobControlledError` if another client controls it.

        After a lost connection the client reconnects until `detach_grace` seconds have passed. A lost job is not sent
        again, because the client does not have its images.
        """
        return AsyncJobControl(
            self._connection.with_metadata(metadata),
            frames=frames,
            checkpoints=checkpoints,
            timeout_s=self._connection.timeout(timeout),
            grace_s=checked_seconds("detach_grace", detach_grace, or_zero=True),
            job_id=job_id,
        )

    @accepts_old_keywords
    async def upload(
        self, image: ImageInput, *, timeout: float | None = None, metadata: Metadata | None = None
    ) -> UploadedImage:
        """Uploads an image once, so that any number of jobs can name it instead of sending it.

        The returned value can be used in place of any image. It is uploaded again automatically if the server no longer
        has the image when a job names it, or if another server gets the job.
        """
        connection = self._calling(metadata)
        data = await asyncio.to_thread(image_bytes, image)
        return await uploads.upload(connection, data, connection.timeout(timeout))

    @accepts_old_keywords
    async def get_job(
        self, job_id: str, *, timeout: float | None = 10.0, metadata: Metadata | None = None
    ) -> JobStatus:
        """The current status of a job."""
        connection = self._calling(metadata)
        answer = await connection.call("GetJob", job_request(pb.GetJobRequest(), job_id), connection.timeout(timeout))
        return parsing.job_status(answer.job)

    @accepts_old_keywords
    async def cancel_job(
        self, job_id: str, *, timeout: float | None = 10.0, metadata: Metadata | None = None
    ) -> JobStatus:
        """Stops a job and returns its status. A job that has ended stays as it is."""
        connection = self._calling(metadata)
        answer = await connection.call(
            "CancelJob", job_request(pb.CancelJobRequest(), job_id), connection.timeout(timeout)
        )
        return parsing.job_status(answer.job)

    @accepts_old_keywords
    async def list_jobs(self, *, timeout: float | None = 10.0, metadata: Metadata | None = None) -> list[JobStatus]:
        """The jobs of the server, newest first. Raises `ListingDisabledError` unless the server's operator allows it.

        `timeout` applies to each page of 100 jobs.
        """
        connection = self._calling(metadata)
        jobs: list[JobStatus] = []
        token = ""
        while True:
            request = pb.ListJobsRequest(page_size=100, page_token=token)
            page = await connection.call("ListJobs", request, connection.timeout(timeout))
            jobs += [parsing.job_status(job) for job in page.jobs]
            token = page.next_page_token
            if not token:
                return jobs

    @accepts_old_keywords
    async def server_info(self, *, timeout: float | None = 10.0, metadata: Metadata | None = None) -> ServerInfo:
        """The server's version, device, network, layers, limits, presets and load."""
        connection = self._calling(metadata)
        answer = await connection.call("GetServerInfo", pb.GetServerInfoRequest(), connection.timeout(timeout))
        return parsing.server_info(answer)

    @accepts_old_keywords
    async def wait_until_ready(self, timeout: float | None = 60.0, *, metadata: Metadata | None = None) -> None:
        """Returns as soon as the server's health status is SERVING. Raises `NotReadyError` after `timeout`."""
        connection = self._calling(metadata)
        await wait_until_serving(connection, connection.timeout(timeout))

    def _calling(self, metadata: Metadata | None) -> Connection:
        """The connection for a call with `metadata`. Raises the error of a client that cannot be used here."""
        self._connection.check()
        return self._connection.with_metadata(metadata)
