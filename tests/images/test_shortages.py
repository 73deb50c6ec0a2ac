"""Which errors are the server's fault."""

import errno

import pytest

from gramophone_server.images.shortages import Shortage, shortage_behind


def raised(error, *, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), "memory"),
        (OSError(errno.ENOMEM, ""), "memory"),
        (OSError(errno.EMFILE, ""), "too many open files"),
        (OSError(errno.ENFILE, ""), "too many open files in system"),
        (OSError(errno.ENOSPC, ""), "no space left on device"),
        (BlockingIOError(errno.EAGAIN, ""), "resource temporarily unavailable"),
        (ImportError("libwebp.so: cannot open shared object file"), "a module could not be imported"),
        (Shortage("too many open files"), "too many open files"),
        (raised(ValueError(), cause=MemoryError()), "memory"),
        (raised(SyntaxError(), context=OSError(errno.EMFILE, "")), "too many open files"),
        (OSError("broken data stream when reading image file"), None),
        (OSError(errno.ENOENT, ""), None),
        (SyntaxError("broken PNG file"), None),
    ],
)
def test_the_cause_of_an_error_is_found(error, lacking):
    assert shortage_behind(error) == lacking


def test_an_error_without_a_reason_is_a_shortage_if_the_memory_cannot_be_had():
    assert shortage_behind(OSError("broken data stream"), 2**20) is None
    assert shortage_behind(OSError("broken data stream"), 2**60) == "memory"
