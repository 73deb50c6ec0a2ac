"""The access log: one JSON line for each RPC, when it is over."""

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

# version-trace-parent-flags, of https://www.w3.org/TR/trace-context/; a later version may have more behind it.
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class AccessLog:
    """Writes to a file, or to standard error. A file that was moved away, by logrotate say, is made anew."""

    def __init__(self, path: str) -> None:
        """``path``: "-" is standard error, and "" is nowhere. Raises `StartupError` if nothing can be written there."""
        try:
            self._handler = (
                logging.NullHandler() if not path else _Stderr() if path == "-" else _File(path, encoding="utf-8")
            )
        except OSError as error:
            raise StartupError(f"--access-log: cannot write to {path}: {error.strerror}") from None
        self._is_on = bool(path)
        self._missing = 0  # lines, since one was written

    def write(self, **fields: str | float | None) -> None:
        """A line with the time, in UTC, and these. Lines that cannot be written are missing; the server's log says since
        when, and how many they were."""
        if not self._is_on:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        try:
            self._handler.handle(logging.LogRecord("access", logging.INFO, "", 0, line, None, None))
        except OSError as error:
            if not self._missing:
                log.error("the access log cannot be written, so calls are missing in it from now on: %s", error)
            self._missing += 1
        else:
            if self._missing:
                log.warning("the access log is written again; %d calls are missing in it", self._missing)
            self._missing = 0

    def close(self) -> None:
        """Closes the file."""
        try:
            self._handler.close()
        except OSError as error:  # of the last lines, on a full disk
            log.error("the access log cannot be closed: %s", error)


class _File(WatchedFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Raises what would be printed with a traceback for each line."""
        raise  # noqa: PLE0704 - logging calls this where the error is being handled


class _Stderr(logging.StreamHandler[TextIO]):
    def __init__(self) -> None:
        super().__init__(sys.stderr)

    handleError = _File.handleError


def trace_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The trace that a caller says its call belongs to, 32 hexadecimal digits; None where it says none, or nonsense."""
    for key, value in metadata or ():
        if key == "traceparent" and isinstance(value, str) and (found := TRACEPARENT.fullmatch(value)):
            return found[1]
    return None
