"""The access log: one JSON line for each RPC, written when it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime

from gramophone_server.errors import StartupError
from gramophone_server.telemetry.line_writer import LineWriter, write_some

__all__ = ["AccessLog", "trace_id"]

log = logging.getLogger(__name__)

CLOSE_S = 1.0  # for the last lines, at the end of the process

# version-trace-parent-flags, of https://www.w3.org/TR/trace-context/; a later version may add fields at the end.
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class AccessLog:
    """Writes to a file or standard error. If the file is moved away, as by logrotate, a new one is created. It never
    waits: a thread writes, and lines that nobody reads in time, or that do not fit on the disk, are dropped."""

    def __init__(self, path: str) -> None:
        """``path``: a file, "-" for standard error, "" for no log. Raises `StartupError` if it cannot be written."""
        self._is_stderr = path == "-"
        self._file, self._writer = None, None
        if path and not self._is_stderr:
            try:
                self._file = _File(path)
            except OSError as error:
                raise StartupError(f"--access-log: cannot write to {path}: {error.strerror}") from None
            self._writer = LineWriter("access log", self._file.write, on_loss=_lost, on_recovery=_recovered)

    @property
    def dropped(self) -> int:
        """Lines of the file that could not be written."""
        return self._writer.dropped if self._writer is not None else 0

    def write(self, **fields: str | float | None) -> None:
        """Writes a line with the time, in UTC, and `fields`. If lines cannot be written, the server's log reports since
        when and how many are missing."""
        if self._writer is None and not self._is_stderr:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}) + "\n"
        if self._writer is not None:
            self._writer.put(line.encode())
        else:
            sys.stderr.write(line)

    def close(self) -> None:
        """Closes the file after its last line, for which it waits for `CLOSE_S` at most."""
        if self._writer is None or self._file is None:
            return
        if self._writer.close(CLOSE_S):
            self._file.close()
        else:
            log.error("the access log is closed before its last lines are written: nobody reads it")


class _File:
    """A file at a path, or a pipe with a name, whose reader may come later."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._is_torn = False  # a line was written in part
        try:
            self._open()
        except OSError as error:
            if error.errno != errno.ENXIO:  # a pipe without a reader
                raise

    def write(self, lines: bytes) -> None:
        """Writes to the file that the path names now. Raises OSError."""
        descriptor = self._descriptor
        if descriptor is None or not self._is_current(descriptor):
            self.close()
            descriptor = self._open()
        rest = memoryview(b"\n" + lines if self._is_torn else lines)
        size = len(rest)
        try:
            while rest:
                rest = rest[write_some(descriptor, rest) :]
        finally:
            if len(rest) < size:
                self._is_torn = len(rest) > 0

    def close(self) -> None:
        """Closes it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        # Non-blocking: opening a pipe without a reader would wait for one.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o666)
        self._is_torn = False
        return self._descriptor

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except OSError:
            return False


def _lost(error: OSError | None, _: bytes) -> None:
    reason = "nobody reads it" if error is None else error
    log.error("the access log cannot be written; calls are missing from it from now on: %s", reason)


def _recovered(missing: int) -> None:
    log.warning("the access log is written again; %d calls are missing from it", missing)


def trace_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The id of the client's trace, 32 hexadecimal digits; None without a valid `traceparent`."""
    for key, value in metadata or ():
        if key == "traceparent" and isinstance(value, str) and (found := TRACEPARENT.fullmatch(value)):
            return found[1]
    return None
