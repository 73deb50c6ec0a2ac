"""The server's end of a `decoder_process`."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import IO

import torch
from torch import Tensor

from gramophone_server.config import Limits
from gramophone_server.domain.byte_copies import memory_of
from gramophone_server.errors import EngineFailed
from gramophone_server.images import decoder_process
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.decoder_process import READY, REPLY, REQUEST, Outcome
from gramophone_server.images.shortages import MEMORY, Shortage, shortage_behind

__all__ = ["DecoderProcess"]

log = logging.getLogger(__name__)

PIPE_BYTES = 2**20  # of a pipe; the default of 64 KiB makes 400 system calls for a picture of 24 MB
START_S = 30.0  # longest start; it takes 0.2 s on a quiet machine
# Longest time from the first byte of a request to the last one of its reply; an image of 32 megapixels takes 2 s.
DECODE_S = 60.0


class DecoderProcess:
    """A process that decodes one image after another. It is started when it is first needed, and again if it has ended.

    Thread-safe. `start` and `decode` block, one after the other; `kill` does not.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._use = threading.Lock()  # held while the process starts, decodes or is waited for
        self._lock = threading.Lock()  # of `_child` and `_killed`
        self._child: subprocess.Popen[bytes] | None = None
        self._killed = False

    @property
    def id(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._child is None else self._child.pid

    @property
    def killed(self) -> bool:
        """Whether it was killed, so that it does not start again."""
        return self._killed

    def start(self) -> None:
        """Starts the process, if it does not run. Raises `Shortage` if the machine cannot."""
        with self._use:
            self._running()

    def decode(self, data: bytes, needed: int) -> Tensor:
        """The picture in ``data``, uint8 [3, height, width], see `decoding.decode`. Raises `UnusableImage`, `Shortage`,
        and `EngineFailed` if the process crashes."""
        with self._use:
            child = self._running()
            try:
                return self._exchange(child, data, needed)
            except (UnusableImage, EngineFailed, Shortage):
                raise
            except TimeoutError:
                self._end(child)
                raise Shortage(f"an image was not decoded within {DECODE_S:g} s") from None
            except (EOFError, BrokenPipeError):
                self._end(child)
                if child.returncode == -signal.SIGKILL:  # by the kernel, which has no memory left, or by `kill`
                    raise Shortage(MEMORY) from None
                log.error("a process that decodes images has crashed: exit code %d", child.returncode)
                raise EngineFailed from None
            except BaseException:
                self._end(child)  # it may be in the middle of a reply
                raise

    def kill(self) -> None:
        """Ends the process at once, whatever it does. It does not start again. Its zombie is left to `close`."""
        with self._lock:
            self._killed = True
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """Kills the process, and waits for its end, which takes some milliseconds."""
        self.kill()
        with self._use:
            self._forget()

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, which is ready for a request. Raises `Shortage`."""
        if self._killed:
            raise Shortage("the process that decodes images was ended")
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._forget()
        limits = str(self._limits.max_image_bytes), str(self._limits.max_image_pixels)
        command = [sys.executable, "-P", "-m", decoder_process.__name__, *limits]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        try:
            child = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, env=environment
            )
        except OSError as error:
            raise Shortage(shortage_behind(error) or f"no process could be started ({error.strerror})") from None
        with self._lock:
            self._child = child
            if self._killed:
                child.kill()
        for stream in (_input(child), _output(child)):
            with contextlib.suppress(AttributeError, OSError):  # not Linux, or the user's pipes have much memory
                fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            os.set_blocking(stream.fileno(), False)  # a process that hangs must not hang the server's thread
        try:
            _read_into(_output(child), memoryview(bytearray(len(READY))), time.monotonic() + START_S)
        except (EOFError, TimeoutError):
            self._end(child)
            if not self._killed:
                log.error("a process that decodes images has not started: exit code %d", child.returncode)
            raise Shortage("a process that decodes images has not started") from None
        return child

    def _exchange(self, child: subprocess.Popen[bytes], data: bytes, needed: int) -> Tensor:
        ends_at = time.monotonic() + DECODE_S
        _write(_input(child), REQUEST.pack(len(data), needed), ends_at)
        _write(_input(child), data, ends_at)
        replies = _output(child)
        head = bytearray(REPLY.size)
        _read_into(replies, memoryview(head), ends_at)
        outcome, width, height, size = REPLY.unpack(head)
        if outcome == Outcome.DECODED:
            picture = torch.empty((3, height, width), dtype=torch.uint8)
            # The system fills it, without the interpreter's lock.
            _read_into(replies, memory_of(picture), ends_at)
            return picture
        body = bytearray(size)
        _read_into(replies, memoryview(body), ends_at)
        text = body.decode()
        if outcome == Outcome.UNUSABLE:
            raise UnusableImage(text)
        if outcome == Outcome.SHORTAGE:
            raise Shortage(text)
        log.error("an image could not be decoded because of a defect:\n%s", text)
        raise EngineFailed

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        child.kill()
        self._forget()

    def _forget(self) -> None:
        """Waits for the end of a process that ends, and closes its pipes."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.wait()
            _input(child).close()
            _output(child).close()


def _input(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdin is not None, "it is a pipe"
    return child.stdin


def _output(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdout is not None, "it is a pipe"
    return child.stdout


def _wait(stream: IO[bytes], event: int, ends_at: float) -> None:
    """Returns when the stream can be read or written, or has ended. Raises `TimeoutError` at ``ends_at``, on the
    monotonic clock."""
    poll = select.poll()  # which takes no file descriptor
    poll.register(stream, event)
    if not poll.poll(max(0.0, ends_at - time.monotonic()) * 1000):
        raise TimeoutError


def _write(stream: IO[bytes], data: bytes, ends_at: float) -> None:
    """Writes all of ``data``. Raises `TimeoutError`, and `BrokenPipeError` if nobody reads the stream any more."""
    rest = memoryview(data)
    while rest:
        _wait(stream, select.POLLOUT, ends_at)
        with contextlib.suppress(BlockingIOError):
            rest = rest[os.write(stream.fileno(), rest) :]


def _read_into(stream: IO[bytes], view: memoryview, ends_at: float) -> None:
    """Fills ``view``. Raises `TimeoutError`, and `EOFError` if the stream ends before."""
    while view:
        _wait(stream, select.POLLIN, ends_at)
        with contextlib.suppress(BlockingIOError):
            read = os.readv(stream.fileno(), [view])
            if not read:
                raise EOFError
            view = view[read:]
