"""The access log: one JSON line for each RPC, written when it ends."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import TextIO

from gramophone_server.errors import StartupError

__all__ = ["AccessLog", "trace_id"]

log = logging.getLogger(__name__)

# version-trace-parent-flags, of https://www.w3.org/TR/trace-context/; a later version may add fields at the end.
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class AccessLog:
    """Writes to a file or standard error. If the file is moved away, as by logrotate, a new one is created."""

    def __init__(self, path: str) -> None:
        """``path``: a file, "-" for standard error, "" for no log. Raises `StartupError` if it cannot be written."""
        try:
            self._handler = (
                logging.NullHandler() if not path else _Stderr() if path == "-" else _File(path, encoding="utf-8")
            )
        except OSError as error:
            raise StartupError(f"--access-log: cannot write to {path}: {error.strerror}") from None
        self._is_on = bool(path)
        self._missing = 0  # lines that could not be written since the last one that was

    def write(self, **fields: str | float | None) -> None:
        """Writes a line with the time, in UTC, and `fields`. If lines cannot be written, the server's log reports since
        when and how many are missing."""
        if not self._is_on:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        try:
            self._handler.handle(logging.LogRecord("access", logging.INFO, "", 0, line, None, None))
        except OSError as error:
            if not self._missing:
                log.error("the access log cannot be written; calls are missing from it from now on: %s", error)
            self._missing += 1
        else:
            if self._missing:
                log.warning("the access log is written again; %d calls are missing from it", self._missing)
            self._missing = 0

    def close(self) -> None:
        """Closes the file."""
        try:
            self._handler.close()
        except OSError as error:  # flushing the last lines to a full disk
            log.error("the access log cannot be closed: %s", error)


class _File(WatchedFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Raises the error, which would otherwise be printed with a traceback for each line."""
        raise  # noqa: PLE0704 - logging calls this where the error is being handled


class _Stderr(logging.StreamHandler[TextIO]):
    def __init__(self) -> None:
        super().__init__(sys.stderr)

    handleError = _File.handleError


def trace_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The id of the caller's trace, 32 hexadecimal digits; None without a valid `traceparent`."""
    for key, value in metadata or ():
        if key == "traceparent" and isinstance(value, str) and (found := TRACEPARENT.fullmatch(value)):
            return found[1]
    return None
