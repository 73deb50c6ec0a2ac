"""A real server whose logs nobody reads: it serves, reports what is missing, and ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from tests.support.processes import WITHIN_S, environment

CALLS = 500  # each has a line in the log
PIPE_BYTES = 4096  # the smallest pipe, which fifty lines fill
MODULE = ("-m", "gramophone_server.main", "--port", "0", "--metrics-port", "0", "--engine", "fake")


class Unread:
    """A server whose standard error is a pipe that nobody reads."""

    def __init__(self, *flags: str, cwd: Path) -> None:
        command = [sys.executable, *MODULE, *flags]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment(), cwd=cwd, text=True, **streams)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.address, self.metrics, _ = (self.process.stdout.readline().split()[-1] for _ in range(3))
        self.log = self.process.stderr
        fcntl.fcntl(self.log, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def call(self, times: int) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
            for _ in range(times):
                stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WITHIN_S)

    def dropped(self, log: str) -> float:
        with urllib.request.urlopen(self.metrics, timeout=WITHIN_S) as page:
            text = page.read().decode()
        name = f'gramophone_log_lines_dropped_total{{log="{log}"}} '
        return next(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


@contextlib.contextmanager
def unread(*flags: str, cwd: Path) -> Iterator[Unread]:
    server = Unread(*flags, cwd=cwd)
    with server.process:
        try:
            yield server
        finally:
            server.process.kill()


@pytest.mark.parametrize("flags", [(), ("--access-log", "-")], ids=["log", "access log"])
def test_an_unread_log_holds_no_call_and_not_the_end(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with unread("--log-level", "debug", *flags, cwd=tmp_path) as server:
        server.call(CALLS)
        assert server.dropped("stdout") == server.dropped("access") == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WITHIN_S) == 0


def test_a_log_that_is_read_late_says_what_is_missing_and_ends_with_the_end(tmp_path: Path) -> None:
    with unread("--access-log", "-", cwd=tmp_path) as server:
        while not server.dropped("stderr"):
            server.call(CALLS)
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.append(server.log.read()))
        reader.start()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WITHIN_S) == 0
        reader.join(WITHIN_S)
    assert "lines of this log are missing here: nobody has read it in time\n" in texts[0]
    assert texts[0].endswith(" INFO gramophone_server: stopped\n")


def test_an_unread_access_log_holds_no_call_and_not_the_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "access.pipe")
    reader = os.open(tmp_path / "access.pipe", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with unread("--access-log", "access.pipe", cwd=tmp_path) as server:
        server.call(CALLS)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WITHIN_S) == 0
    os.close(reader)
