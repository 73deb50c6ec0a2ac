"""The access log: one JSON line for each RPC, when it is over."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from gramophone_server.errors import StartupError

__all__ = ["AccessLog", "trace_id"]

# version-trace-parent-flags, of https://www.w3.org/TR/trace-context/; a later version may have more behind it.
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class AccessLog:
    """Writes to a file, or to standard error. A file that was moved away, by logrotate say, is made anew."""

    def __init__(self, path: str) -> None:
        """``path``: "-" is standard error, and "" is nowhere. Raises `StartupError` if nothing can be written there."""
        try:
            handler = (
                logging.NullHandler()
                if not path
                else logging.StreamHandler(sys.stderr)
                if path == "-"
                else WatchedFileHandler(path, encoding="utf-8")
            )
        except OSError as error:
            raise StartupError(f"--access-log: cannot write to {path}: {error.strerror}") from None
        self._handler = handler  # its own, on no logger: nobody else's settings or lines get in
        self._is_on = bool(path)

    def write(self, **fields: str | float | None) -> None:
        """A line with the time, in UTC, and these. What cannot be written is reported on standard error by `logging`."""
        if self._is_on:
            line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
            self._handler.handle(logging.LogRecord("access", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Closes the file."""
        self._handler.close()


def trace_id(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The trace that a caller says its call belongs to, 32 hexadecimal digits; None where it says none, or nonsense."""
    for key, value in metadata or ():
        if key == "traceparent" and isinstance(value, str) and (found := TRACEPARENT.fullmatch(value)):
            return found[1]
    return None
