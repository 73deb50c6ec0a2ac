"""The iteration of a job's updates without asyncio."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar

from gramophone_client.blocking.loop_thread import LoopThread
from gramophone_client.streams.job_control import AsyncJobControl
from gramophone_client.streams.job_stream import AsyncJobStream
from gramophone_client.types.updates import Update

__all__ = ["Iteration"]

S = TypeVar("S", AsyncJobStream, AsyncJobControl)


class Iteration(Generic[S]):
    """What `JobStream` and `JobControl` share: a context manager and an iterator of a job's updates."""

    def __init__(self, thread: LoopThread[Any], job: S) -> None:
        self._thread = thread
        self._job: S = job
        self._has_ended = self._is_left = False

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or sent to a process; `watch` the job there")

    def __enter__(self) -> Self:
        self._thread.run(self._job.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Update:
        if self._has_ended:
            raise StopIteration
        try:
            arrived = self._thread.run(_next_or_none(self._job))
        except KeyboardInterrupt:
            # A notebook would keep the stream, in the traceback. A job under control may get commands after Ctrl-C.
            if isinstance(self._job, AsyncJobStream):
                self._leave()
            raise
        if arrived is None:
            self._has_ended = True
            raise StopIteration
        return arrived

    def _leave(self) -> None:
        """Leaves the job without waiting; see `LoopThread.start`."""
        if not self._is_left:
            self._is_left = True
            self._thread.start(self._job.close())


async def _next_or_none(job: AsyncJobStream | AsyncJobControl) -> Update | None:
    return await anext(job, None)
