"""Programs of this checkout in processes: their output, signals to them, and their end.

There are no sleeps: each wait is for a line of output or for the end of a process. Its limit is reached only by a
broken program or on a very busy machine.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

ROOT = Path(__file__).parent.parent.parent
PHOTO = ROOT / "examples" / "photos" / "cat.jpg"  # 768 x 511
PAINTING = ROOT / "examples" / "styles" / "woodcut.jpg"
WITHIN_S = 60.0  # the limit of each wait; a server is ready after 2 s, and a small job takes less


def environment() -> dict[str, str]:
    """Without settings of a server or a client, and with the packages of this checkout, which need not be installed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GRAMOPHONE_")}
    own["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("proto", "server", "client", "."))
    own["GRAMOPHONE_CONFIG"] = os.devnull  # no named targets
    return own


class Process:
    """A Python program of this checkout, with both of its outputs. It is killed at the end of the block."""

    def __init__(self, *command: str | Path, cwd: Path, stderr: int = subprocess.STDOUT, **settings: str) -> None:
        """``stderr``: a descriptor for its standard error, which is part of `output` by default."""
        self.command = tuple(str(word) for word in command)
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, *self.command],
            cwd=cwd,
            env=environment() | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # a group of its own, which `signal` reaches as a terminal's Ctrl-C does
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(WITHIN_S)
        self._reader.join(WITHIN_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that has ended it. None while it runs."""
        return self._process.poll()

    def read_output(self) -> str:
        """All that it has printed so far, without waiting for more."""
        while not self._lines.empty():
            self.output += self._lines.get() or ""
        return self.output

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def line(self, start: str) -> str:
        """Waits for a line that starts with `start` and returns the rest of it."""
        end = time.monotonic() + WITHIN_S
        while (line := self._next(end)) is not None:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"{self.command} did not print {start!r}, but:\n{self.output}")

    def code(self, within_s: float = WITHIN_S) -> int:
        """Waits until the process has ended and its output is read. Returns the exit code."""
        end = time.monotonic() + within_s
        while self._next(end) is not None:
            pass
        return self._process.wait(max(0.0, end - time.monotonic()))

    def _next(self, end: float) -> str | None:
        try:
            line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise AssertionError(
                f"{self.command} took more than {WITHIN_S:g} s; its output is:\n{self.output}"
            ) from None
        self.output += line or ""
        return line

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)


def processes_in(folder: Path) -> list[int]:
    """The processes with this working folder: each test has its own. Skips the test where there is no /proc."""
    if not Path("/proc/self/cwd").exists():
        pytest.skip("finds processes in /proc")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder and "(zombie)" not in (process / "status").read_text():
                found.append(int(process.name))
        except OSError:  # has ended, or belongs to another user
            continue
    return found


class Server(Process):
    """A server on a free port, which listens at `address`: one with the real weights, or as `module` starts it."""

    def __init__(
        self,
        *flags: str,
        cwd: Path,
        module: str = "gramophone_server.main",
        stderr: int = subprocess.STDOUT,
        **settings: str,
    ) -> None:
        super().__init__("-m", module, "--port", "0", *flags, cwd=cwd, stderr=stderr, **settings)
        try:
            self.address = self.line("listening on ")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def client(self, *words: str | Path, cwd: Path) -> Process:
        """A `gramophone` command for this server."""
        return Process("-m", "gramophone_client.cli", *words, "--server", self.address, cwd=cwd)

    def run_client(self, *words: str | Path, cwd: Path) -> str:
        """Runs a `gramophone` command to its end and returns its output. The command must succeed."""
        with self.client(*words, cwd=cwd) as client:
            code = client.code()
        assert code == 0, client.output
        return client.output
