"""The way to a server, for asyncio; `sync_client` has the same without."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
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
    from_rpc,
)
from gramophone_client.job_spec import FrameOptions, ImageInput, JobOptions, Styles, job_spec
from gramophone_client.updates import Frame, Result, ServerInfo, Stylized, Update

__all__ = ["DEFAULT_MAX_MESSAGE_BYTES", "DEFAULT_TARGET", "DEFAULT_TIMEOUT_S", "GramophoneClient"]

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 900.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20  # gRPC's own 4 MiB is less than one PNG of 2048 x 2048

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
        # With bandwidth probing the transport hoards 6 to 8 MB of old frames before the server notices a slow reader.
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
    ) -> None:
        """`credentials` from `grpc.ssl_channel_credentials`; None talks in plaintext."""
        asyncio.get_running_loop()  # a channel belongs to a loop; without one, gRPC would pick another silently
        self.target = target
        self.timeout_s = timeout_s
        options = _options(max_message_bytes)
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
        self, content: ImageInput, styles: Styles, *, timeout_s: float | None = None, **job: Unpack[JobOptions]
    ) -> Stylized:
        """Paints `content` in the style of one or several pictures and returns the finished one.

        `job` takes `preset`, `seed`, `start_image`, `result_format`, `result_quality` and every field of a recipe; see
        `job_spec`. A server that is busy or away is asked again, up to three times.
        """
        spec = await asyncio.to_thread(job_spec, content, styles, **job)
        return updates.stylized(await self._ask(self._service.Stylize, pb.StylizeRequest(spec=spec), timeout_s))

    async def stream(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        timeout_s: float | None = None,
        **job: Unpack[JobOptions],
    ) -> AsyncGenerator[Update, None]:
        """The same job, told while it runs: `Accepted`, then `Progress` and `Frame`s as they come, then `Result`.

        A slow reader gets the newest frame, never a backlog; `frames=None` asks for none. Leaving the iteration stops
        the job at the server: at once with `contextlib.aclosing`, else when Python drops the generator. An error that
        comes after a frame carries the newest as `.frame`.
        """
        spec = await asyncio.to_thread(job_spec, content, styles, frames=frames, **job)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        call = self._service.StylizeStream(pb.StylizeStreamRequest(spec=spec), timeout=timeout_s)
        frame = result = None
        try:
            with self._errors_rebuilt(timeout_s):
                async for response in call:
                    update = updates.update(response.event)
                    if isinstance(update, Result):
                        result = update  # told when the stream has ended, so that nobody cancels a job that is done
                    elif update is not None:
                        frame = update if isinstance(update, Frame) else frame
                        yield update
            if result is None:
                raise ServerFailed("the server ended the stream without a result")
        except GramophoneError as error:
            error.frame = frame
            raise
        finally:
            call.cancel()
        yield result

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

    @contextmanager
    def _errors_rebuilt(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, target=self.target, timeout_s=timeout_s) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC raises the same when the channel was closed under the call; that must not look like a cancelled task.
            raise Cancelled("the call was stopped because its client was closed") from None
