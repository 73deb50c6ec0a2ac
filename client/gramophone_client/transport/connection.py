"""The channel to a server, the errors of its calls, and the retries that gRPC makes by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client.errors import CallCancelledError, InvalidRequestError, from_rpc
from gramophone_client.transport.request_writer import send

__all__ = ["CLOSED_MESSAGE", "DEFAULT_MAX_RETRIES", "SERVICE", "Connection", "channel_options"]

CLOSED_MESSAGE = "the call was stopped because its client was closed"
DEFAULT_MAX_RETRIES = 3
MAX_RETRIES = 4  # gRPC makes at most 5 attempts, whatever a service config says
SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"].full_name
# Longest wait for a connection before a job is sent. If connecting takes longer, a job that is lost at once counts as
# never having arrived.
CONNECT_S = 1.0
CONNECTING = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)


def channel_options(max_message_bytes: int, max_retries: int = DEFAULT_MAX_RETRIES) -> list[tuple[str, Any]]:
    """The options of a channel for pictures, with messages of at most `max_message_bytes` in both directions."""
    # Before its first response a job can safely be sent again: on UNAVAILABLE, and on RESOURCE_EXHAUSTED, for which the
    # server's grpc-retry-pushback-ms sets the time (negative: never). The throttle stops retries on the whole channel
    # after five failures; ten successes make up for one failure.
    service_config = {
        "methodConfig": [
            {
                "name": [{"service": SERVICE}],
                "retryPolicy": {
                    "maxAttempts": max(2, max_retries + 1),  # gRPC ignores a policy of one attempt
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
        # With bandwidth probing the transport buffers 6 to 8 MB of old frames per stream before the server notices a
        # slow reader (measured; https://github.com/grpc/grpc/issues/21348).
        ("grpc.http2.bdp_probe", 0),
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.enable_retries", int(max_retries > 0)),
        # A request larger than this buffer (by default 256 KiB) is never sent twice, and requests contain images.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        # Detects a dead peer within 50 s, even while a queued job sends nothing for a long time.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Finds a server that starts during the wait within 1 s; gRPC's own pauses grow to 120 s.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


class Connection:
    """A channel and its stubs. `target` may name several servers; gRPC then uses the first that answers."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float,
        max_message_bytes: int,
        credentials: grpc.ChannelCredentials | None,
        max_retries: int = DEFAULT_MAX_RETRIES,
    ) -> None:
        if isinstance(max_retries, bool) or max_retries not in range(MAX_RETRIES + 1):
            rule = f"must be 0 to {MAX_RETRIES}, because gRPC makes at most {MAX_RETRIES + 1} attempts"
            message = f"max_retries: {rule}; got {max_retries!r}"
            raise InvalidRequestError(message, violations=(Violation("max_retries", rule),))
        self.target = target
        self.max_retries = max_retries
        self.timeout_s = timeout_s  # default timeout of a call
        options = channel_options(max_message_bytes, max_retries)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        self.service: Any = pb_grpc.StyleTransferServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def close(self) -> None:
        """Ends all calls."""
        await self._channel.close()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to a server now."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def wait_until_connected(self) -> None:
        """Returns after the channel has connected or failed to, or after `CONNECT_S`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                while (state := self._channel.get_state(try_to_connect=True)) in CONNECTING:
                    await self._channel.wait_for_state_change(state)

    async def call_unary(self, method: Any, request: object, timeout_s: float | None) -> Any:
        """Makes a unary call and returns its response. Raises `GramophoneError`s."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        with self.errors_rebuilt(timeout_s):
            return await method(request, timeout=timeout_s)

    def call_streaming(self, method: Any, requests: AsyncGenerator[Any, None], timeout_s: float) -> Any:
        """Starts a call with a stream of requests, which are sent until the call ends; see `send`."""
        call = method(timeout=timeout_s)
        send(call, requests)
        return call

    @contextlib.contextmanager
    def errors_rebuilt(self, timeout_s: float) -> Iterator[None]:
        """Raises errors of gRPC in its block as `GramophoneError`s. `timeout_s` is the caller's, for the message."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, target=self.target, timeout_s=timeout_s) from error
        except grpc.aio.UsageError as error:  # the channel was closed between two calls
            raise CallCancelledError(CLOSED_MESSAGE) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC raises the same error when the channel was closed during the call; the task was not cancelled then.
            raise CallCancelledError(CLOSED_MESSAGE) from None
