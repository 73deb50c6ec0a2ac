"""The calls to a server: what is sent with each, and their errors."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from gramophone_client.errors import ClientClosedError, from_rpc
from gramophone_client.transport.call_options import (
    Metadata,
    checked_credentials,
    checked_max_message_bytes,
    checked_max_retries,
    checked_metadata,
    checked_seconds,
    checked_target,
)
from gramophone_client.transport.channel import CLOSED_MESSAGE, SERVICE, Channel
from gramophone_client.transport.request_writer import send

__all__ = ["Connection"]

log: logging.Logger = logging.getLogger("gramophone_client")


class Connection:
    """A channel, and the metadata and the timeout of its calls."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float,
        max_message_bytes: int,
        credentials: grpc.ChannelCredentials | None,
        max_retries: int,
        metadata: Metadata | None,
    ) -> None:
        self.target: str = checked_target(target)
        self.timeout_s: float = checked_seconds("timeout", timeout)
        self.max_retries: int = checked_max_retries(max_retries)
        self.uploads: dict[str, asyncio.Task[Any]] = {}  # under way, by digest; shared by all jobs of the client
        self._metadata = checked_metadata(metadata)
        self._channel = Channel(
            self.target,
            max_message_bytes=checked_max_message_bytes(max_message_bytes),
            max_retries=self.max_retries,
            credentials=checked_credentials(credentials),
        )

    def with_metadata(self, metadata: Metadata | None) -> Connection:
        """This connection, with more metadata in its calls, which replaces that of the same keys."""
        if metadata is None:
            return self
        other, more = copy.copy(self), checked_metadata(metadata)
        keys = {key for key, _ in more}
        other._metadata = (*(pair for pair in self._metadata if pair[0] not in keys), *more)
        return other

    async def close(self) -> None:
        """Ends all calls, also those with more metadata."""
        await self._channel.close()

    def check(self) -> None:
        """Raises the error of a client that cannot be used here; see `Channel.check`."""
        self._channel.check()

    def check_loop(self) -> None:
        """Raises `ClientUsageError` in another event loop or without one."""
        self._channel.check_loop()

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the client's."""
        return self._channel.is_forked

    def timeout(self, given: float | None) -> float:
        """The seconds of a call: those given for it, or those of the client."""
        return self.timeout_s if given is None else checked_seconds("timeout", given)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to a server now."""
        return self._channel.is_connected

    async def wait_until_connected(self) -> None:
        """Returns when there is a connection, or when it is known that there is none, or after a second."""
        with self.errors_rebuilt(self.timeout_s):
            await self._channel.wait_until_connected()

    async def call(self, method: str, request: object, timeout_s: float) -> Any:
        """Makes a unary call and returns its response. Raises `GramophoneError`s."""
        with self.errors_rebuilt(timeout_s):
            return await self.start(method, request, timeout_s)

    def start(self, method: str, request: object, timeout_s: float) -> Any:
        """Starts a call with one request."""
        log.debug("%s of %s, within %.1f s", method, self.target, timeout_s)
        return getattr(self._channel.service, method)(request, timeout=timeout_s, metadata=self._metadata)

    def start_with_stream(self, method: str, requests: AsyncGenerator[Any, None], timeout_s: float) -> Any:
        """Starts a call with a stream of requests, which are sent until the call ends; see `send`."""
        log.debug("%s of %s, within %.1f s", method, self.target, timeout_s)
        call = getattr(self._channel.service, method)(timeout=timeout_s, metadata=self._metadata)
        send(call, requests)
        return call

    def watch_health(self, timeout_s: float) -> Any:
        """Starts a call that returns the server's health status, and each later one. It waits for a server."""
        log.debug("health of %s, within %.1f s", self.target, timeout_s)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        watch = self._channel.health.Watch
        return watch(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=True)

    @contextlib.contextmanager
    def errors_rebuilt(self, timeout_s: float) -> Iterator[None]:
        """Raises errors of gRPC in its block as `GramophoneError`s. `timeout_s` is the caller's, for the message."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, target=self.target, timeout_s=timeout_s) from error
        except grpc.aio.UsageError as error:  # the channel was closed between two calls
            raise ClientClosedError(CLOSED_MESSAGE) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # gRPC raises the same error when the channel was closed during the call; the task was not cancelled then.
            raise ClientClosedError(CLOSED_MESSAGE) from None
