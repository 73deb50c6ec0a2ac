"""The exit codes of the `gramophone` command."""

from __future__ import annotations

from collections.abc import Sequence

from gramophone_client import errors
from gramophone_client.errors import GramophoneError

__all__ = ["BAD_REQUEST", "DONE", "EXIT_CODES", "INTERRUPTED", "NO_SERVER", "TERMINATED", "exit_code"]

DONE, BAD_REQUEST, NO_SERVER, NO_ROOM, FAILED, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 5, 130, 143

EXIT_CODES = f"""\
exit codes:
  {DONE:>3}  done
  {BAD_REQUEST:>3}  bad usage, a file that cannot be read or written, or a request that
       the server refused
  {NO_SERVER:>3}  there is no server, or it is not ready, or the connection was lost
  {NO_ROOM:>3}  the server is full, the job does not fit on it, or the time is up
  {FAILED:>3}  the job failed: the loss diverged, the job was cancelled, or the
       server has a defect
  {INTERRUPTED:>3}  interrupted (Ctrl-C); the server stops the job, or continues it for
       the time of --detach. {TERMINATED}: the same after SIGTERM

A job that is lost with its server is sent again, from its last checkpoint, to any server that the target leads to. If a
job ends early after a frame has arrived, that unfinished picture is written as OUT, or next to an existing OUT.
"""

# First match wins; others are FAILED.
CODES: Sequence[tuple[type[GramophoneError], int]] = (
    (errors.InvalidRequestError, BAD_REQUEST),
    (errors.MessageTooLargeError, BAD_REQUEST),
    (errors.JobNotFoundError, BAD_REQUEST),
    (errors.JobControlledError, BAD_REQUEST),
    (errors.JobEndedError, BAD_REQUEST),
    (errors.RequestIdTakenError, BAD_REQUEST),
    (errors.AccessDeniedError, BAD_REQUEST),
    (errors.ConnectionFailedError, NO_SERVER),
    (errors.ExhaustedError, NO_ROOM),
    (errors.DeadlineExceededError, NO_ROOM),
)


def exit_code(error: GramophoneError) -> int:
    """The exit code for an error."""
    return next((code for kind, code in CODES if isinstance(error, kind)), FAILED)
