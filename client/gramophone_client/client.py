"""The way to a server, for asyncio; `sync_client` has the same without."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import updates
from gramophone_client.errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    GramophoneError,
    NotReady,
    ServerFailed,
    SlowReader,
    from_rpc,
)
from gramophone_client.job_spec import FrameOptions, ImageInput, JobOptions, Styles, job_spec, watch_request
from gramophone_client.updates import Accepted, Frame, JobStatus, Result, ServerInfo, Stylized, Update

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "DEFAULT_TARGET", "DEFAULT_TIMEOUT_S", "GramophoneClient"]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 900.0
DEFAULT_MAX_MESSAGE_BYTES = 160 * 2**20  # a request with a checkpoint of 64 MiB; gRPC's own 4 MiB is less than one PNG

REATTACH_S = (0.2, 5.0)  # first pause before a lost job is asked for again, longest; each is twice the one before

SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"].full_name


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    # Until its first message a job is safe to send again: on UNAVAILABLE, and on RESOURCE_EXHAUSTED, where the server's
    # grpc-retry-pushback-ms says when (or, negative, never). The throttle ends this for the whole channel after five
    # failures; ten successes make up for one.
    service_config = {
        "methodConfig": [
            {
                "name": [{"service": SERVICE}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # With bandwidth probing the transport hoards 6 to 8 MB of old frames for each stream before the server notices a
        # slow reader (measured; https://github.com/grpc/grpc/issues/21348).
        ("grpc.http2.bdp_probe", 0),
        ("grpc.service_config", json.dumps(service_config)),
        # A request larger than this buffer (256 KiB unless told) is never sent twice, and requests carry images.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        # A dead peer is noticed within 50 s although a queued job says nothing for long.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A server that starts while we wait is found within a second, not after gRPC's growing pauses of up to 120 s.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


class GramophoneClient:
    """A connection to one server, for one event loop: make it where that loop runs.

    async with GramophoneClient("gpu-1:50051") as client:
        stylized = await client.stylize("photo.jpg", "painting.jpg", beta=5)
        stylized.save("out.png")

    Every call has a deadline: `timeout_s` of the call, else of the client. All methods raise `GramophoneError`s.
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
        server refuses fails at once, for whoever counts refusals."""
        asyncio.get_running_loop()  # a channel belongs to a loop; without one, gRPC would pick another silently
        self.target = target
        self.timeout_s = timeout_s
        options = [*_options(max_message_bytes), ("grpc.enable_retries", int(retries))]
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self._service: Any = pb_grpc.StyleTransferServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stops what still runs and closes the connection."""
        await self._channel.close()

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

        `job` takes `preset`, `seed`, `start_image`, `result_format`, `result_quality`, `detach_grace` and every field of
        a recipe; see `job_spec`. A server that is busy or away is asked again, up to three times.

        A call with the `request_id` (a UUID) of a job that is there already finds that job instead of making another.
        None makes a new id, so that asking again never makes a second job.
        """
        spec = await asyncio.to_thread(job_spec, content, styles, **job)
        request = pb.StylizeRequest(spec=spec, request_id=_request_id(request_id))
        return updates.stylized(await self._ask(self._service.Stylize, request, timeout_s))

    def stream(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        timeout_s: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> AsyncGenerator[Update, None]:
        """The same job, told while it runs: `Accepted`, then `Progress` and `Frame`s as they come, then `Result`.

        A slow reader gets the newest frame, never a backlog; `frames=None` asks for none. Leaving the iteration stops
        the job at the server, or with `detach_grace` leaves it alone for so long: at once with `contextlib.aclosing`,
        else when Python drops the generator. An error that comes after a frame carries the newest as `.frame`.

        With `detach_grace` a connection that is lost after `Accepted` is made again until that time has passed, and the
        iteration goes on with the update after the last one.
        """

        async def begin(timeout_s: float) -> Any:
            spec = await asyncio.to_thread(job_spec, content, styles, frames=frames, **job)
            request = pb.StylizeStreamRequest(spec=spec, request_id=_request_id(request_id))
            return self._service.StylizeStream(request, timeout=timeout_s)

        return self._follow(begin, "", 0, frames, timeout_s, job.get("detach_grace") or 0.0)

    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        timeout_s: float | None = None,
        detach_grace: float = 0.0,
    ) -> AsyncGenerator[Update, None]:
        """The updates of a job that is there already, as `stream` tells them, also in its errors.

        They begin after the one whose `sequence` is `after_sequence`, as far as the server still knows them; 0 begins
        with `Accepted`. A lost connection is made again until `detach_grace` seconds have passed.
        """

        async def begin(timeout_s: float) -> Any:
            return self._service.WatchJob(watch_request(job_id, after_sequence, frames), timeout=timeout_s)

        return self._follow(begin, job_id, after_sequence, frames, timeout_s, detach_grace)

    async def get_job(self, job_id: str, *, timeout_s: float = 10.0) -> JobStatus:
        """How the job stands."""
        answer = await self._ask(self._service.GetJob, pb.GetJobRequest(job_id=job_id), timeout_s)
        return updates.job_status(answer.job)

    async def cancel_job(self, job_id: str, *, timeout_s: float = 10.0) -> JobStatus:
        """Stops the job and returns how it stands then; one that has ended stays as it is."""
        answer = await self._ask(self._service.CancelJob, pb.CancelJobRequest(job_id=job_id), timeout_s)
        return updates.job_status(answer.job)

    async def list_jobs(self, *, timeout_s: float = 10.0) -> list[JobStatus]:
        """The jobs that the server has, newest first. Raises `ListingDisabled` unless its owner allows it.

        `timeout_s` is for each page of 100.
        """
        jobs: list[JobStatus] = []
        token = ""
        while True:
            request = pb.ListJobsRequest(page_size=100, page_token=token)
            page = await self._ask(self._service.ListJobs, request, timeout_s)
            jobs += [updates.job_status(job) for job in page.jobs]
            token = page.next_page_token
            if not token:
                return jobs

    async def server_info(self, *, timeout_s: float = 10.0) -> ServerInfo:
        """What the server is and takes: version, device, network, layers, limits, presets, load."""
        return updates.server_info(await self._ask(self._service.GetServerInfo, pb.GetServerInfoRequest(), timeout_s))

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Returns as soon as the server's health says SERVING. Raises `NotReady` after `timeout_s`."""
        end = time.monotonic() + timeout_s
        said = "no connection"
        while (left_s := end - time.monotonic()) > 0:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            call = self._health.Watch(request, timeout=left_s, wait_for_ready=True)
            try:
                with self._errors_rebuilt(left_s):
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

    async def _ask(self, method: Any, request: object, timeout_s: float | None) -> Any:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        with self._errors_rebuilt(timeout_s):
            return await method(request, timeout=timeout_s)

    async def _follow(
        self,
        begin: Callable[[float], Awaitable[Any]],
        job_id: str,
        sequence: int,
        frames: FrameOptions | None,
        timeout_s: float | None,
        grace_s: float,
    ) -> AsyncGenerator[Update, None]:
        """The updates of the call that `begin` makes, and of those that follow when the connection is lost.

        `job_id` is "" until `Accepted` has told it; `sequence` is that of the last event that the caller has.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        call = await begin(timeout_s)
        end = time.monotonic() + timeout_s
        frame = result = None
        try:
            lost_since, pause_s = 0.0, REATTACH_S[0]  # 0: not lost
            while True:
                told = sequence
                try:
                    with self._errors_rebuilt(timeout_s):
                        async for response in call:
                            lost_since, pause_s = 0.0, REATTACH_S[0]
                            if 0 < response.event.sequence <= told:
                                continue  # the caller has it already
                            update = updates.update(response.event)
                            if isinstance(update, Accepted):
                                job_id = update.job_id
                            if isinstance(update, Result):
                                result = (
                                    update  # told when the stream has ended: nobody then cancels a job that is done
                                )
                            elif update is not None:
                                frame = update if isinstance(update, Frame) else frame
                                yield update
                            sequence = max(sequence, response.event.sequence)
                    break
                except GramophoneError as error:
                    if result is not None and _is_lost(error):
                        break
                    now = time.monotonic()
                    lost_since = lost_since or now
                    left_s = min(lost_since + grace_s, end) - now
                    if not job_id or left_s <= 0 or not _is_lost(error):
                        raise
                    call.cancel()
                    await asyncio.sleep(min(pause_s, left_s))
                    pause_s = min(2 * pause_s, REATTACH_S[1])
                    with self._errors_rebuilt(timeout_s):
                        request = watch_request(job_id, sequence, frames)
                        call = self._service.WatchJob(request, timeout=max(0.0, end - time.monotonic()))
            if result is None:
                raise ServerFailed("the server ended the stream without a result")
        except GramophoneError as error:
            error.frame = frame
            raise
        finally:
            call.cancel()
        yield result

    @contextmanager
    def _errors_rebuilt(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, target=self.target, timeout_s=timeout_s) from error
        except grpc.aio.UsageError as error:  # the channel was closed between two calls
            raise Cancelled("the call was stopped because its client was closed") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC raises the same when the channel was closed under the call; that must not look like a cancelled task.
            raise Cancelled("the call was stopped because its client was closed") from None


def _request_id(given: str | None) -> str:
    return str(uuid.uuid4()) if given is None else given


def _is_lost(error: GramophoneError) -> bool:
    """Whether only the connection has ended, as far as one can tell: the service itself would have given a reason."""
    lost = error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL) and not error.reason
    return lost or isinstance(error, SlowReader)
