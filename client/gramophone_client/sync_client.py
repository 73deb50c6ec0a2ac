"""The way to a server, without asyncio: a thin face on `GramophoneClient`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from gramophone_client.client import DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TARGET, DEFAULT_TIMEOUT_S, GramophoneClient
from gramophone_client.job_spec import FrameOptions, ImageInput, JobOptions, Styles
from gramophone_client.updates import JobStatus, ServerInfo, Stylized, Update

__all__ = ["SyncGramophoneClient"]

T = TypeVar("T")


class SyncGramophoneClient:
    """`GramophoneClient` without asyncio: the same calls, made on an event loop in a thread of its own.

    with SyncGramophoneClient("gpu-1:50051") as client:
        client.stylize("photo.jpg", "painting.jpg", beta=5).save("out.png")
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """As of `GramophoneClient`."""
        alive = threading.Event()

        async def live() -> None:
            self._loop, self._closed = asyncio.get_running_loop(), asyncio.Event()
            alive.set()
            await self._closed.wait()

        async def connect() -> GramophoneClient:
            return GramophoneClient(
                target, timeout_s=timeout_s, max_message_bytes=max_message_bytes, credentials=credentials
            )

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), name="gramophone-client", daemon=True)
        self._thread.start()
        alive.wait()
        try:
            self._client = self._run(connect())
        except BaseException:
            self._end_thread()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops what still runs and closes the connection."""
        if self._thread.is_alive():
            self._run(self._client.close())
            self._end_thread()

    def stylize(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> Stylized:
        """As `GramophoneClient.stylize`."""
        return self._run(self._client.stylize(content, styles, timeout_s=timeout_s, request_id=request_id, **job))

    def stream(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        timeout_s: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> Generator[Update, None, None]:
        """As `GramophoneClient.stream`; leaving the loop, or closing the generator, ends the call at once."""
        return self._steps(
            self._client.stream(content, styles, frames=frames, timeout_s=timeout_s, request_id=request_id, **job)
        )

    def watch(
        self,
        job_id: str,
        after_sequence: int = 0,
        *,
        frames: FrameOptions | None = FrameOptions(),  # noqa: B008  (frozen)
        timeout_s: float | None = None,
        detach_grace: float = 0.0,
    ) -> Generator[Update, None, None]:
        """As `GramophoneClient.watch`; leaving the loop, or closing the generator, ends the call at once."""
        return self._steps(
            self._client.watch(job_id, after_sequence, frames=frames, timeout_s=timeout_s, detach_grace=detach_grace)
        )

    def get_job(self, job_id: str, *, timeout_s: float = 10.0) -> JobStatus:
        """As `GramophoneClient.get_job`."""
        return self._run(self._client.get_job(job_id, timeout_s=timeout_s))

    def cancel_job(self, job_id: str, *, timeout_s: float = 10.0) -> JobStatus:
        """As `GramophoneClient.cancel_job`."""
        return self._run(self._client.cancel_job(job_id, timeout_s=timeout_s))

    def list_jobs(self, *, timeout_s: float = 10.0) -> list[JobStatus]:
        """As `GramophoneClient.list_jobs`."""
        return self._run(self._client.list_jobs(timeout_s=timeout_s))

    def server_info(self, *, timeout_s: float = 10.0) -> ServerInfo:
        """As `GramophoneClient.server_info`."""
        return self._run(self._client.server_info(timeout_s=timeout_s))

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """As `GramophoneClient.wait_until_ready`."""
        self._run(self._client.wait_until_ready(timeout_s))

    def _steps(self, updates: AsyncGenerator[Update, None]) -> Generator[Update, None, None]:
        # An interrupted step is still on its way out when the generator is closed: one at a time.
        turn = asyncio.Lock()

        async def step() -> Update | None:
            async with turn:
                return await anext(updates, None)

        async def leave() -> None:
            async with turn:
                await updates.aclose()

        try:
            while (update := self._run(step())) is not None:
                yield update
        finally:
            if self._thread.is_alive():
                self._run(leave())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C in the caller's thread
            future.cancel()
            raise

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()
