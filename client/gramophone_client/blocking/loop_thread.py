"""An event loop in a thread of its own, on which other threads run coroutines."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent import futures
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Generic, TypeVar

from gramophone_client.errors import ClientClosedError, ClientUsageError
from gramophone_client.transport.channel import CLOSED_MESSAGE
from gramophone_client.transport.forking import check_process

__all__ = ["LoopThread"]

C = TypeVar("C", bound=AbstractAsyncContextManager[Any])
T = TypeVar("T")


class LoopThread(Generic[C]):
    """The loop, and the client that is made on it and closed with it. A forked process has neither."""

    def __init__(self, make: Callable[[], C]) -> None:
        """Raises what `make` raises."""
        created: futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, C]] = futures.Future()

        async def run() -> None:  # does not hold this object, so that Python can drop it
            closing = asyncio.Event()
            try:
                client = make()
            except BaseException as error:  # noqa: BLE001 - raised for the caller
                return created.set_exception(error)
            async with client:
                created.set_result((asyncio.get_running_loop(), closing, client))
                await closing.wait()

        self._pid = os.getpid()
        self._closed = False
        # No call starts after `close`. Reentrant: the garbage collector may leave a job in the thread that holds it.
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=lambda: asyncio.run(run()), name="gramophone-client", daemon=True)
        self._thread.start()
        self._loop, self._closing, self.client = created.result()
        # A program that drops the client and its streams without closing them would keep the thread and the connection.
        weakref.finalize(self, _close_dropped, self._pid, self._loop, self._closing).atexit = False

    def close(self) -> None:
        """Closes the client, and ends the loop and the thread. In a forked process it does nothing, because the thread
        is the parent's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and returns its result."""
        try:
            check_process(self._pid)
            if threading.current_thread() is self._thread:
                raise ClientUsageError(
                    "a call was made in the client's own thread, where it would wait for itself forever; "
                    "do not make it in __del__ or in code that Python's garbage collector may run"
                )
        except ClientUsageError:
            coroutine.close()
            raise
        future = self.start(coroutine)
        try:
            return future.result()
        except futures.CancelledError:  # the loop ended during the call
            raise ClientClosedError(CLOSED_MESSAGE) from None
        except BaseException:  # Ctrl-C in the caller's thread
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, T]) -> futures.Future[T]:
        """Starts a coroutine without waiting for it. Leaving a job must not wait: Python's garbage collector may leave
        one in any thread, including the client's own and one that holds locks which the client's thread needs."""
        if os.getpid() == self._pid:  # in a forked process, another thread of the parent may have held the lock
            with self._lock:
                if not self._closed:
                    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        refused: futures.Future[T] = futures.Future()
        refused.set_exception(ClientClosedError(CLOSED_MESSAGE))
        return refused


def _close_dropped(pid: int, loop: asyncio.AbstractEventLoop, closing: asyncio.Event) -> None:
    if os.getpid() == pid:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(closing.set)
