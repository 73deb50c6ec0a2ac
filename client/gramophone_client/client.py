"""The client without asyncio: a thin layer on `AsyncGramophoneClient`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent import futures
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from gramophone_client.async_client import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    AsyncGramophoneClient,
)
from gramophone_client.deprecations import accepts_old_keywords
from gramophone_client.errors import CallCancelledError
from gramophone_client.streams.job_control import AsyncJobControl
from gramophone_client.streams.recovery import PATIENCE_S
from gramophone_client.transport.connection import CLOSED_MESSAGE, DEFAULT_MAX_RETRIES
from gramophone_client.types.options import (
    Changes,
    CheckpointOptions,
    FrameOptions,
    ImageInput,
    JobOptions,
    Styles,
    UploadedImage,
)
from gramophone_client.types.server_info import ServerInfo
from gramophone_client.types.updates import Accepted, Checkpoint, Frame, JobStatus, Result, Stylized, Update

__all__ = ["GramophoneClient", "JobControl"]

T = TypeVar("T")


class GramophoneClient:
    """`AsyncGramophoneClient` without asyncio: the same calls, made on an event loop in a thread of the client.

    with GramophoneClient("gpu-1:50051") as client:
        client.stylize("photo.jpg", "painting.jpg", beta=5).save("out.png")
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
    ) -> None:
        """The arguments are those of `AsyncGramophoneClient`."""
        created: futures.Future[AsyncGramophoneClient] = futures.Future()

        async def run() -> None:
            self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
            try:
                client = AsyncGramophoneClient(
                    target,
                    timeout=timeout,
                    max_message_bytes=max_message_bytes,
                    credentials=credentials,
                    max_retries=max_retries,
                )
            except BaseException as error:  # noqa: BLE001 - raised for the caller
                return created.set_exception(error)
            async with client:
                created.set_result(client)
                await self._closing.wait()

        self._closed = False
        # No call starts after `close`. Reentrant: the garbage collector may close a generator in the thread that holds
        # it.
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=lambda: asyncio.run(run()), name="gramophone-client", daemon=True)
        self._thread.start()
        self._client = created.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls, which then raise `CallCancelledError`, and closes the connection."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @accepts_old_keywords
    def stylize(
        self,
        content: ImageInput,
        styles: Styles,
        *,
        patience: float = PATIENCE_S,
        timeout: float | None = None,
        request_id: str | None = None,
        **job: Unpack[JobOptions],
    ) -> Stylized:
        """As `AsyncGramophoneClient.stylize`."""
        return self._run(
            self._client.stylize(content, styles, patience=patience, timeout=timeout, request_id=request_id, **job)
        )

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
        **job: Unpack[JobOptions],
    ) -> Generator[Update, None, None]:
        """As `AsyncGramophoneClient.stream`; leaving the loop, or closing the generator, ends the call at once."""
        return self._iterate(
            self._client.stream(
                content,
                styles,
                frames=frames,
                checkpoints=checkpoints,
                patience=patience,
                timeout=timeout,
                request_id=request_id,
                **job,
            )
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
    ) -> Generator[Update, None, None]:
        """As `AsyncGramophoneClient.watch`; leaving the loop, or closing the generator, ends the call at once."""
        return self._iterate(
            self._client.watch(
                job_id,
                after_sequence,
                frames=frames,
                checkpoints=checkpoints,
                timeout=timeout,
                detach_grace=detach_grace,
            )
        )

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
        **job: Unpack[JobOptions],
    ) -> JobControl:
        """As `AsyncGramophoneClient.control`."""
        controlled = self._client.control(
            content,
            styles,
            frames=frames,
            checkpoints=checkpoints,
            patience=patience,
            timeout=timeout,
            request_id=request_id,
            **job,
        )
        return JobControl(controlled, self._run, self._start)

    @accepts_old_keywords
    def control_job(
        self,
        job_id: str,
        *,
        frames: FrameOptions | None = FrameOptions(max_in_flight=2),  # noqa: B008  (frozen)
        checkpoints: CheckpointOptions | None = None,
        timeout: float | None = None,
        detach_grace: float = 0.0,
    ) -> JobControl:
        """As `AsyncGramophoneClient.control_job`."""
        controlled = self._client.control_job(
            job_id, frames=frames, checkpoints=checkpoints, timeout=timeout, detach_grace=detach_grace
        )
        return JobControl(controlled, self._run, self._start)

    @accepts_old_keywords
    def upload(self, image: ImageInput, *, timeout: float | None = None) -> UploadedImage:
        """As `AsyncGramophoneClient.upload`."""
        return self._run(self._client.upload(image, timeout=timeout))

    @accepts_old_keywords
    def get_job(self, job_id: str, *, timeout: float | None = 10.0) -> JobStatus:
        """As `AsyncGramophoneClient.get_job`."""
        return self._run(self._client.get_job(job_id, timeout=timeout))

    @accepts_old_keywords
    def cancel_job(self, job_id: str, *, timeout: float | None = 10.0) -> JobStatus:
        """As `AsyncGramophoneClient.cancel_job`."""
        return self._run(self._client.cancel_job(job_id, timeout=timeout))

    @accepts_old_keywords
    def list_jobs(self, *, timeout: float | None = 10.0) -> list[JobStatus]:
        """As `AsyncGramophoneClient.list_jobs`."""
        return self._run(self._client.list_jobs(timeout=timeout))

    @accepts_old_keywords
    def server_info(self, *, timeout: float | None = 10.0) -> ServerInfo:
        """As `AsyncGramophoneClient.server_info`."""
        return self._run(self._client.server_info(timeout=timeout))

    @accepts_old_keywords
    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """As `AsyncGramophoneClient.wait_until_ready`."""
        self._run(self._client.wait_until_ready(timeout))

    def _iterate(self, updates: AsyncGenerator[Update, None]) -> Generator[Update, None, None]:
        # An interrupted step may still be unwinding when the generator is closed: one at a time.
        lock = asyncio.Lock()

        async def step() -> Update | None:
            async with lock:
                return await anext(updates, None)

        async def leave() -> None:
            async with lock:
                await updates.aclose()

        try:
            while (update := self._run(step())) is not None:
                yield update
        finally:
            self._start(leave())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the client's loop and returns its result."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError(
                "a call was made in the client's own thread, where it would wait for itself forever; "
                "do not make it in __del__ or in code that Python's garbage collector may run"
            )
        future = self._start(coroutine)
        try:
            return future.result()
        except futures.CancelledError:  # the loop ended during the call
            raise CallCancelledError(CLOSED_MESSAGE) from None
        except BaseException:  # Ctrl-C in the caller's thread
            future.cancel()
            raise

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> futures.Future[T]:
        """Starts a coroutine without waiting for it. Leaving a job must not wait: Python's garbage collector may close
        a generator in any thread, including the client's own and one that holds locks which the client's thread
        needs."""
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        refused: futures.Future[T] = futures.Future()
        refused.set_exception(CallCancelledError(CLOSED_MESSAGE))
        return refused


class JobControl:
    """`AsyncJobControl` without asyncio: a context manager and an iterator of updates. Its methods may be called from
    any thread, also while another one iterates.

    with client.control("photo.jpg", "painting.jpg") as job:
        for update in job:
            ...
    """

    def __init__(
        self,
        job: AsyncJobControl,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
        start: Callable[[Coroutine[Any, Any, Any]], object],
    ) -> None:
        self._job = job
        self._run = run
        self._start = start

    def __enter__(self) -> Self:
        self._run(self._job.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._start(self._job.__aexit__(kind, error, traceback))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Update:
        async def step() -> Update | None:
            return await anext(self._job, None)

        arrived: Update | None = self._run(step())
        if arrived is None:
            raise StopIteration
        return arrived

    @property
    def accepted(self) -> Accepted | None:
        """As `AsyncJobControl.accepted`."""
        return self._job.accepted

    def result(self) -> Result:
        """As `AsyncJobControl.result`."""
        result: Result = self._run(self._job.result())
        return result

    def pause(self) -> int:
        """As `AsyncJobControl.pause`."""
        return int(self._run(self._job.pause()))

    def resume(self) -> int:
        """As `AsyncJobControl.resume`."""
        return int(self._run(self._job.resume()))

    def update(self, **changes: Unpack[Changes]) -> int:
        """As `AsyncJobControl.update`."""
        return int(self._run(self._job.update(**changes)))

    def picture(self) -> Frame:
        """As `AsyncJobControl.picture`."""
        frame: Frame = self._run(self._job.picture())
        return frame

    def checkpoint(self, *, light: bool = False) -> Checkpoint:
        """As `AsyncJobControl.checkpoint`."""
        checkpoint: Checkpoint = self._run(self._job.checkpoint(light=light))
        return checkpoint

    def finish(self) -> int:
        """As `AsyncJobControl.finish`."""
        return int(self._run(self._job.finish()))
