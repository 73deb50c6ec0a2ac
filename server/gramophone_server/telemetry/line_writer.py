"""Lines for a log that may not be read: writing them never waits, and what is not read in time is dropped."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["MAX_WAITING_BYTES", "LineWriter", "write_all", "write_some"]

MAX_WAITING_BYTES = 1 << 20  # of a log that is not read; then its oldest lines are dropped
# A pipe takes a write of up to 4096 bytes (PIPE_BUF of Linux) as a whole, so lines of several writers do not mix.
CHUNK_BYTES = 4096


class LineWriter:
    """A bounded queue of lines, and a thread that writes them. Its methods may be called from any thread.

    `write` writes bytes, may block, and raises OSError. Lines that it could not write are missing, and so are the
    oldest ones if more than `max_bytes` wait. `gap` makes the line that says in their place how many are missing.
    `on_loss` is called with the error, or None if nobody reads them in time, and the lines, when the first ones are
    lost; `on_recovery` with the number of all that were when no others wait any more. Both on any thread.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[bytes], None],
        *,
        gap: Callable[[int], bytes] | None = None,
        on_loss: Callable[[OSError | None, bytes], None] = lambda _, __: None,
        on_recovery: Callable[[int], None] = lambda _: None,
        max_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self.dropped = 0  # lines, since the start
        self._write = write
        self._gap, self._on_loss, self._on_recovery = gap, on_loss, on_recovery
        self._max_bytes = max_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._missing = 0  # lines, since the last one that was written
        self._is_busy = False  # the thread has lines that do not wait any more
        # Its lock is reentrant: a finaliser that logs may run inside of `put`.
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Lines, or groups of them, that wait for the thread."""
        return len(self._waiting)

    def put(self, lines: bytes) -> None:
        """Adds one line or several that belong together, each with its end. Never waits for a reader."""
        lost = b""
        with self._changed:
            self._waiting.append(lines)
            self._waiting_bytes += len(lines)
            while self._waiting_bytes > self._max_bytes:
                oldest = self._waiting.popleft()
                self._waiting_bytes -= len(oldest)
                lost = lost or (b"" if self._missing else oldest)
                self._count_missing(oldest)
            self._changed.notify_all()
        if lost:
            self._on_loss(None, lost)

    def drain(self, within_s: float) -> bool:
        """Waits until all lines are written or lost. False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_busy, within_s)

    def close(self, within_s: float) -> bool:
        """Ends the thread after the last line. False if that takes longer than `within_s`; then it may be blocked for
        ever, and does not outlive the process."""
        is_drained = self.drain(within_s)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if is_drained:
            self._thread.join(within_s)
        return is_drained

    def _count_missing(self, lines: bytes) -> None:
        number = max(1, lines.count(b"\n"))
        self._missing += number
        self.dropped += number

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                self._is_busy = True
                missing, chunk = self._missing, self._take()
            self._write_chunk(missing, chunk)

    def _take(self) -> bytes:
        """The next entry, and those after it that fit into the same chunk."""
        chunk = [self._waiting.popleft()]
        size = len(chunk[0])
        while self._waiting and size + len(self._waiting[0]) <= CHUNK_BYTES:
            chunk.append(self._waiting.popleft())
            size += len(chunk[-1])
        self._waiting_bytes -= size
        return b"".join(chunk)

    def _write_chunk(self, missing: int, chunk: bytes) -> None:
        try:
            if missing and self._gap is not None:
                self._write(self._gap(missing))
                self._report(missing)
            self._write(chunk)
        except OSError as error:
            with self._changed:
                is_first = not self._missing
                self._count_missing(chunk)
            if is_first:
                self._on_loss(error, chunk)
        else:
            with self._changed:
                missing = 0 if self._waiting else self._missing
            if missing:
                self._report(missing)

    def _report(self, missing: int) -> None:
        with self._changed:
            self._missing -= missing
        self._on_recovery(missing)


def write_some(descriptor: int, data: bytes | memoryview) -> int:
    """Writes a part of `data` and returns its length; blocks, also if the descriptor is non-blocking."""
    while True:
        with contextlib.suppress(BlockingIOError):
            return os.write(descriptor, data)
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        poll.poll()


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of `data`, as `write_some` does."""
    rest = memoryview(data)
    while rest:
        rest = rest[write_some(descriptor, rest) :]
