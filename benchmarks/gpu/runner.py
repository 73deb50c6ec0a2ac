"""Runs sections one after another, each in a process of its own and with a share of the time.

The process of the next section imports its modules while the current one runs, because importing torch takes 3 to 6 s.
It uses the GPU only after its turn has come. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import records
from benchmarks.gpu.clock import Clock

__all__ = ["ROOT", "Step", "end_session", "environment", "last_line", "run"]

ROOT = Path(__file__).parent.parent.parent
CLOSING = 3.0  # seconds of the time limit for the end: the last process is killed, and the results are written
KEEP_EVERY = 10.0  # seconds between two calls of `keep` while a section runs


class Step(NamedTuple):
    """A section of the check."""

    function: str  # "module:function", called with its `Section`
    share: float  # of the time: in seconds, if the shares of a run add up to its time limit


def run(
    steps: Mapping[str, Step], device: str, clock: Clock, record_file: Path, folder: Path, keep: Callable[[], object]
) -> Generator[str]:
    """Runs every section until the shares up to and including its own are used up, and yields its name after its end.

    Time that one leaves goes to the next. A section that does not end in time is killed with all its processes.
    ``record_file``: the file for what the sections find. ``folder``: for their logs. ``keep`` is called now and then.
    """
    whole, available = sum(step.share for step in steps.values()), clock.left - CLOSING
    due = clock.began + clock.used
    waiting: _Process | None = None
    process: _Process | None = None
    names = list(steps)
    try:
        for index, (name, step) in enumerate(steps.items()):
            process = waiting or _Process(name, step, device, clock, record_file, folder)
            due += step.share / whole * available
            print(f"== {name}: {clock}, {due - time.monotonic():.0f} s for it", flush=True)
            records.write(record_file, "start", name, {"at": datetime.now(UTC).isoformat(timespec="seconds")})
            start = time.monotonic()
            process.go(due)
            if index + 1 < len(names):
                following = names[index + 1]
                waiting = _Process(following, steps[following], device, clock, record_file, folder)
            why = process.wait(due, keep)
            if why:
                print(f"  FAILED, {why}", flush=True)
                records.write(record_file, "failed", name, {"what": "the section", "why": why})
            records.write(record_file, "end", name, {"seconds": round(time.monotonic() - start, 1)})
            yield name
    finally:
        for one in (process, waiting):
            if one is not None:
                one.kill()


class _Process:
    """The process of a section, which waits for its turn."""

    def __init__(self, name: str, step: Step, device: str, clock: Clock, record_file: Path, folder: Path) -> None:
        self.log = folder / f"{name}.log"
        command = [sys.executable, "-m", "benchmarks.gpu.section_process", step.function, name, device]
        command += [str(clock.began), str(clock.seconds), str(record_file), str(folder)]
        # Threads that wait for each other on busy cores take longer than tiny pictures.
        settings = environment() | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=settings,
                stdin=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that all processes that it starts can be found
            )

    def go(self, due: float) -> None:
        """Its turn has come, until ``due``. The pipe stays open: its end tells the process that the check has died."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self.process.stdin.write(f"{due}\n")
            self.process.stdin.flush()

    def wait(self, due: float, keep: Callable[[], object]) -> str:
        """Waits for its end, and ends it at ``due``. Returns why it failed, or an empty string."""
        why = ""
        while True:
            try:
                code = self.process.wait(min(KEEP_EVERY, max(0.0, due - time.monotonic())))
                if code:
                    why = f"its process ended with {code}: {last_line(self.log)}"
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() >= due:
                    why = "it exceeded its time and was killed"
                    break
                keep()
        self.kill()
        return why

    def kill(self) -> None:
        """Ends the process and all that it started, which would otherwise use the GPU that the next one measures."""
        for _ in range(50):
            alive = end_session(self.process.pid)
            if self.process.poll() is not None and not alive:
                break
            time.sleep(0.02)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def end_session(leader: int) -> bool:
    """Kills all processes of a session, this one last. Returns whether any was alive."""
    alive = sorted(_session(leader), key=lambda pid: pid == os.getpid())
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(alive)


def _session(leader: int) -> Iterator[int]:
    """The living processes of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which is in brackets and may have spaces: state, parent, process group, session.
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # it has ended meanwhile
            continue
        if int(session) == leader and state not in "ZX":
            yield int(stat.parent.name)


def environment() -> dict[str, str]:
    """The environment of a process that imports the project from this checkout."""
    paths = [*(str(ROOT / name) for name in ("proto", "server", "client", "")), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def last_line(log: Path) -> str:
    """The end of a log, at most 300 characters."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
