"""Standard output and standard error of the process, which never block it, whatever reads them.

Python's side writes to a queue, which a thread empties: `sys.stderr`, and with it the log, warnings and tracebacks, and
`sys.stdout`. C code (gRPC's core, torch, OpenMP) writes to descriptor 2 itself, so this becomes non-blocking, and what
does not fit is lost. Only our side of it does: a pipe or a terminal is opened once more, because its flags belong to
all processes that share it. What cannot be opened again, a socket or a pipe of another user, is replaced by a pipe of
our own, whose lines go to the same queue. The last words of a crash in C code are lost there; those of Python are not,
through `faulthandler`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import logging
import os
import stat
import sys
import threading

from gramophone_server.telemetry.line_writer import LineWriter, write_all

__all__ = ["DRAIN_S", "MAX_LINE_BYTES", "drain", "dropped_lines", "make_non_blocking"]

log = logging.getLogger(__name__)

DRAIN_S = 1.0  # at the end of the process, for the last lines of each stream that somebody reads
STDOUT, STDERR = 1, 2
MAX_LINE_BYTES = 2**16  # longer ones are written in parts

_writers: dict[str, LineWriter] = {}  # by the name of the stream


def make_non_blocking() -> None:
    """Call it once, before the log is set up."""
    for descriptor in (0, STDOUT, STDERR):
        _open_if_closed(descriptor)
    stdout, stderr = os.dup(STDOUT), os.dup(STDERR)
    _writers["stdout"] = LineWriter("stdout", lambda data: write_all(stdout, data), on_loss=_stdout_lost)
    _writers["stderr"] = LineWriter("stderr", lambda data: write_all(stderr, data), gap=_missing_lines)
    sys.stdout = _text(_writers["stdout"], STDOUT)
    sys.stderr = _text(_writers["stderr"], STDERR)
    if not _is_non_blocking(STDERR) and not _reopened(STDERR):
        _through_pipe(STDERR, _writers["stderr"])
        faulthandler.enable(stderr)
    else:
        faulthandler.enable(STDERR)
    atexit.register(drain)


def drain() -> None:
    """Waits for the last lines of streams that are read, for `DRAIN_S` at most."""
    for writer in _writers.values():
        writer.drain(DRAIN_S)


def dropped_lines() -> dict[str, int]:
    """Lines that could not be written, by the name of the stream."""
    return {name: _writers[name].dropped if name in _writers else 0 for name in ("stdout", "stderr")}


class _Lines(io.RawIOBase):
    """A file whose complete lines go to a writer. It never blocks and never fails."""

    def __init__(self, writer: LineWriter, descriptor: int) -> None:
        self._writer, self._descriptor = writer, descriptor
        self._lock = threading.RLock()
        self._incomplete = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Takes all of it."""
        with self._lock:
            lines, end, self._incomplete = (self._incomplete + bytes(data)).rpartition(b"\n")
            complete = lines + end
            if len(self._incomplete) > MAX_LINE_BYTES:
                complete, self._incomplete = complete + self._incomplete, b""
            if complete:
                self._writer.put(complete)
        return len(data)


def _text(writer: LineWriter, descriptor: int) -> io.TextIOWrapper:
    lines = _Lines(writer, descriptor)
    return io.TextIOWrapper(lines, "utf-8", "backslashreplace", write_through=True)  # type: ignore[arg-type]


def _missing_lines(number: int) -> bytes:
    return b"%d lines of this log are missing here: nobody has read it in time\n" % number


def _stdout_lost(error: OSError | None, lines: bytes) -> None:
    reason, text = "nobody reads it" if error is None else error.strerror, lines.decode(errors="replace").strip()
    log.warning("standard output cannot be written (%s); it lacks this line: %s", reason, text)


def _open_if_closed(descriptor: int) -> None:
    """Keeps a closed standard descriptor from becoming that of a file or a connection, to which C code would log."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _is_non_blocking(descriptor: int) -> bool:
    """Whether nothing that reads it can block a writer: a file, or a device such as /dev/null."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(descriptor))


def _reopened(descriptor: int) -> bool:
    """Opens its file once more, for this process alone. False if that is not possible."""
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return False
    os.dup2(own, descriptor)
    os.close(own)
    return True


def _through_pipe(descriptor: int, writer: LineWriter) -> None:
    """Replaces it by a pipe of our own, whose lines a thread hands to the writer."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.dup2(writing, descriptor)
    os.close(writing)

    def read() -> None:
        lines = _Lines(writer, descriptor)
        with contextlib.suppress(OSError):
            while data := os.read(reading, 65536):
                lines.write(data)

    threading.Thread(target=read, name="stderr pipe", daemon=True).start()
