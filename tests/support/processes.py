"""Programs of this checkout as processes of their own: what they say, signals, and an end for each of them.

Nothing here sleeps for a guessed time: every wait is for a line of output or for a process to end, and has a limit that
only a broken program or a very busy machine reaches.
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

ROOT = Path(__file__).parent.parent.parent
WITHIN_S = 60.0  # for anything that is waited for; a server is ready after 2 s, a small job takes less


class Process:
    """A Python program of this checkout, and what it says on both of its outputs. It does not outlive its block."""

    def __init__(self, *command: str | Path, cwd: Path, **settings: str) -> None:
        # Whoever runs the tests may have settings of their own, and may not have installed this checkout.
        env = {name: value for name, value in os.environ.items() if not name.startswith("GRAMOPHONE_")}
        env["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("proto", "server", "client", "."))
        env |= settings
        self.command = tuple(str(word) for word in command)
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, *self.command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
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

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def line(self, start: str) -> str:
        """The rest of the next line that begins with `start`, as soon as it is said."""
        end = time.monotonic() + WITHIN_S
        while (line := self._next(end)) is not None:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise AssertionError(f"{self.command} never said {start!r}, but:\n{self.output}")

    def code(self) -> int:
        """The exit code, as soon as the process has ended and everything that it said has been read."""
        end = time.monotonic() + WITHIN_S
        while self._next(end) is not None:
            pass
        return self._process.wait(max(0.0, end - time.monotonic()))

    def _next(self, end: float) -> str | None:
        try:
            line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"{self.command} took more than {WITHIN_S:g} s; it said:\n{self.output}") from None
        self.output += line or ""
        return line

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)


class Server(Process):
    """A server with the real weights, or what another `module` makes of it, on a free port; `address` once it listens."""

    def __init__(self, *flags: str, cwd: Path, module: str = "gramophone_server.main", **settings: str) -> None:
        super().__init__("-m", module, "--port", "0", *flags, cwd=cwd, **settings)
        try:
            self.address = self.line("listening on ")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def client(self, *words: str | Path, cwd: Path) -> Process:
        """`gramophone`, talking to this server."""
        return Process("-m", "gramophone_client.cli", *words, "--server", self.address, cwd=cwd)
