"""The channel to a server: its options, the retries that gRPC makes by itself, and where it may be used."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client.errors import ClientClosedError, ClientUsageError
from gramophone_client.transport.call_options import DEFAULT_MAX_RETRIES
from gramophone_client.transport.forking import channel_closed, check_grpc, check_process, open_channel

__all__ = ["CLOSED_MESSAGE", "SERVICE", "Channel", "channel_options"]

CLOSED_MESSAGE = "the call was stopped because its client was closed"
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
        ("grpc.http2.max_pings_without_data", 0),  # no limit; gRPC's is two, and then a ping per minute
        # Finds a server that starts during the wait within 1 s; gRPC's own pauses grow to 120 s.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


class Channel:
    """A channel and its stubs, for the process and the event loop that it was made in, until it is closed.

    `target` may name several servers; gRPC then uses the first that answers.
    """

    def __init__(
        self, target: str, *, max_message_bytes: int, max_retries: int, credentials: grpc.ChannelCredentials | None
    ) -> None:
        check_grpc()
        self._pid = os.getpid()
        loop = _running_loop()
        if loop is None:  # gRPC would silently use another loop
            raise ClientUsageError(
                "an AsyncGramophoneClient must be made where an event loop runs: in a coroutine, as with "
                "asyncio.run(main()); GramophoneClient needs none"
            )
        self._loop = loop
        options = channel_options(max_message_bytes, max_retries)
        channel = open_channel(target, credentials, options)
        self._channel: grpc.aio.Channel | None = channel  # None after `close`, which lets gRPC end its thread
        self._service: Any = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(channel)

    async def close(self) -> None:
        """Ends all calls. In a forked process it does nothing, because there is nothing of that process to end."""
        if self.is_forked or self._channel is None:
            return
        self.check_loop()
        channel, self._channel = self._channel, None
        self._service = self._health = None
        try:
            await channel.close()
        finally:
            channel_closed()
            del channel
            channel_closed()

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the channel's."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raises `ClientUsageError` in another process, in another event loop or without one, and `ClientClosedError`
        after `close`."""
        check_process(self._pid)
        if self._channel is None:
            raise ClientClosedError(CLOSED_MESSAGE)
        self.check_loop()

    def check_loop(self) -> None:
        """Raises `ClientUsageError` in another event loop or without one."""
        loop = _running_loop()
        if loop is self._loop:
            return
        advice = "make a client in each event loop (in each asyncio.run), or use GramophoneClient, which needs none"
        if self._loop.is_closed():
            raise ClientUsageError(f"this client's event loop has been closed, and its connection with it; {advice}")
        found = "without an event loop" if loop is None else "in another event loop than the one where it was made"
        raise ClientUsageError(f"this client was used {found}; {advice}")

    @property
    def service(self) -> Any:
        """The stub of the service; raises as `check`."""
        self.check()
        return self._service

    @property
    def health(self) -> Any:
        """The stub of the health service; raises as `check`."""
        self.check()
        return self._health

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to a server now."""
        return self._channel is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def wait_until_connected(self) -> None:
        """Returns after the channel has connected or failed to, or after `CONNECT_S`."""
        self.check()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                while (channel := self._channel) is not None:
                    state = channel.get_state(try_to_connect=True)
                    if state not in CONNECTING:
                        return
                    await channel.wait_for_state_change(state)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
