"""What the `gramophone` command's exit codes mean."""

from __future__ import annotations

from collections.abc import Sequence

from gramophone_client import errors
from gramophone_client.errors import GramophoneError

__all__ = ["BAD_REQUEST", "DONE", "EXIT_CODES", "INTERRUPTED", "exit_code"]

DONE, BAD_REQUEST, NO_SERVER, NO_ROOM, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130

EXIT_CODES = f"""\
exit codes:
  {DONE:>3}  done
  {BAD_REQUEST:>3}  bad usage, a file that cannot be read or written, or a request that the server refused
  {NO_SERVER:>3}  no server there, or it is not ready, or the connection was lost
  {NO_ROOM:>3}  the server is full, the job does not fit on it, or the time is up
  {FAILED:>3}  the job failed: the loss diverged, or somebody cancelled it, or the server has a defect
  {INTERRUPTED:>3}  interrupted (Ctrl-C); the job is stopped at the server, or with --detach goes on for so long

A job that is lost with its server is sent again, from its last checkpoint, wherever HOST:PORT leads to by then.
When a job ends early and a frame had arrived, that unfinished picture is kept as OUT, or beside an older OUT.
"""

# First match wins; others are FAILED.
CODES: Sequence[tuple[type[GramophoneError], int]] = (
    (errors.InvalidRequest, BAD_REQUEST),
    (errors.MessageTooLarge, BAD_REQUEST),
    (errors.JobNotFound, BAD_REQUEST),
    (errors.JobControlled, BAD_REQUEST),
    (errors.JobEnded, BAD_REQUEST),
    (errors.RequestIdTaken, BAD_REQUEST),
    (errors.ListingDisabled, BAD_REQUEST),
    (errors.ConnectionFailed, NO_SERVER),
    (errors.Exhausted, NO_ROOM),
    (errors.DeadlineExceeded, NO_ROOM),
)


def exit_code(error: GramophoneError) -> int:
    """The exit code that stands for the error."""
    return next((code for kind, code in CODES if isinstance(error, kind)), FAILED)
