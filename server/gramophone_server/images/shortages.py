"""Whether an error is the server's fault: it lacks memory, file descriptors or room. Standard library only."""

from __future__ import annotations

import errno
import mmap
import os

__all__ = ["MEMORY", "Shortage", "shortage_behind"]

# Of system calls that may succeed later, and never because of what a client has sent.
SHORTAGES = frozenset({
    errno.EAGAIN, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC,
})  # fmt: skip
MEMORY = "memory"  # what it is called


class Shortage(Exception):
    """The server lacks something for a moment. The text says what: "memory", "too many open files"."""


def shortage_behind(error: BaseException, needed_bytes: int = 0) -> str | None:
    """What the server lacks, if that is the cause of an error; else None.

    Errors of the interpreter and the system say so. A decoder does not: libjpeg and libwebp report the same error for
    damaged data and for memory that they cannot get. So an error is put down to the data only if the ``needed_bytes``
    that the decoder may take can be allocated now.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Shortage):
            return str(cause)
        if isinstance(cause, MemoryError):
            return MEMORY
        if isinstance(cause, OSError) and cause.errno in SHORTAGES:
            return MEMORY if cause.errno == errno.ENOMEM else os.strerror(cause.errno).lower()
        if isinstance(cause, RuntimeError) and str(cause) == "can't start new thread":
            return "no thread could be started"
        if isinstance(cause, ImportError):
            return "a module could not be imported"
        cause = cause.__cause__ or cause.__context__
    return None if _can_allocate(needed_bytes) else MEMORY


def _can_allocate(size: int) -> bool:
    """Whether the process can get so many bytes at this moment. They are not touched, so it takes microseconds."""
    if not size:
        return True
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return False
    return True
