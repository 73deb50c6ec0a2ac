"""The environment of the faults: a server that fails on request, its clients, and the count of how jobs ended."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import random
import struct
import subprocess
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gramophone_client import (
    Accepted,
    AsyncGramophoneClient,
    AsyncJobStream,
    Checkpoint,
    FrameOptions,
    GramophoneError,
    Progress,
    Result,
    Update,
)
from gramophone_client.bench.pictures import synthetic
from tests.support.monitoring import LeakCheck, RuleViolation
from tests.support.processes import WITHIN_S, Process, Server

# Deadline of calls. With a shorter one the server refuses a large job if it has only run small jobs so far.
DEADLINE_S = 600.0
BURST = 16  # simultaneous jobs
FLAGS = (
    *("--engine", "fake", "--iter-ms", "5", "--max-blocked-s", "3", "--max-running", "32", "--max-queued", "64"),
    *("--max-kept", "256", "--log-level", "error"),
    # Small, so that uploads are evicted all the time.
    *("--max-uploads-bytes", str(2**20), "--max-image-bytes", str(2**20), "--max-checkpoint-bytes", str(2**20)),
    *("--metrics-port", "0"),
)
SMALL = {"size": 48, "smallest_size": 0, "iterations": 20}
LONG = SMALL | {"iterations": 5000}  # takes 25 s
LARGE = LONG | {"size": 256}  # its frames quickly fill the buffers of a connection
LARGE_FRAMES = FrameOptions(format="png")
CONTENT, STYLE = synthetic(1, 64), synthetic(2, 64, 16)

ErrorTypes = tuple[type[GramophoneError], ...]


class ServerClock:
    """The wall clock of a server process, which a test can set."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "clock"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-lm"], check=True)
        self.settings = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._file)}
        self._file.write_bytes(bytes(8))

    def set_offset(self, seconds: float) -> None:
        """Sets the clock of the processes started with `settings` ahead of the true time; negative: back."""
        with self._file.open("r+b") as file, mmap.mmap(file.fileno(), 8) as page:
            page[:] = struct.pack("d", seconds)


def faulty_server(*flags: str, cwd: Path, **settings: str) -> Server:
    """Starts the server of `tests.chaos.server`. It listens already, but may not be ready."""
    # With more, every thread starts another thread at its first large tensor, which looks like a leak.
    settings["OMP_NUM_THREADS"] = "1"
    return Server(*FLAGS, *flags, cwd=cwd, module="tests.chaos.server", **settings)


class ChaosEnvironment:
    """One server for all faults, which it must survive."""

    def __init__(self, server: Server, metrics_url: str, clock: ServerClock, folder: Path, rng: random.Random) -> None:
        self.server, self.clock, self.folder, self.rng = server, clock, folder, rng
        self.leak_check = LeakCheck(server.pid, metrics_url)
        self.ends: Counter[str] = Counter()  # how the jobs of the current fault ended

    def client(self, target: str = "", timeout_s: float = DEADLINE_S) -> AsyncGramophoneClient:
        """A client of the server, or of another target."""
        return AsyncGramophoneClient(target or self.server.address, timeout=timeout_s)

    @asynccontextmanager
    async def process(self, *command: str | Path) -> AsyncIterator[Process]:
        """A client in its own process, with the environment's folder as its working folder."""
        process = await asyncio.to_thread(lambda: Process(*command, cwd=self.folder))
        try:
            yield process
        finally:
            await asyncio.to_thread(process.__exit__, None, None, None)

    # How jobs end -----------------------------------------------------------------------------------------------------

    async def read_to_end(
        self, updates: AsyncJobStream | AsyncGenerator[Update, None], allowed: ErrorTypes = ()
    ) -> Result | GramophoneError:
        """Reads a job's updates to the end, which must be its result or one of the allowed errors."""
        last = None
        try:
            async with updates if isinstance(updates, AsyncJobStream) else contextlib.aclosing(updates):
                async for update in updates:
                    check_update(update, last)
                    last = update
        except GramophoneError as error:
            return self.count_end(error, allowed)
        if not isinstance(last, Result):
            raise RuleViolation(f"a stream ended without a result, after {last}")
        return self.count_end(last)

    async def await_result(self, result: Awaitable[Result], allowed: ErrorTypes = ()) -> Result | GramophoneError:
        """Awaits a unary job, which must end in its result or one of the allowed errors."""
        try:
            return self.count_end(await result)
        except GramophoneError as error:
            return self.count_end(error, allowed)

    def count_end(self, end: Result | GramophoneError, allowed: ErrorTypes = ()) -> Result | GramophoneError:
        """Counts how a job ended. Raises `RuleViolation` if that is not allowed."""
        self.ends[type(end).__name__ if isinstance(end, GramophoneError) else "result"] += 1
        if isinstance(end, GramophoneError) and not isinstance(end, allowed):
            raise RuleViolation(f"a job ended in {type(end).__name__} ({end.code}): {end}") from end
        if isinstance(end, Result):
            end.image()  # Pillow raises an exception if the picture is incomplete
        return end

    @asynccontextmanager
    async def bystanders(self, allowed: ErrorTypes = ()) -> AsyncIterator[None]:
        """Two ordinary clients that run one job after another while the block lasts. Their jobs must succeed, too."""
        stop = asyncio.Event()

        async def repeat(run_job: Callable[[AsyncGramophoneClient], Awaitable[Any]]) -> None:
            async with self.client() as client:
                while not stop.is_set():
                    await run_job(client)

        async with asyncio.TaskGroup() as group:
            group.create_task(
                repeat(lambda client: self.await_result(client.stylize(CONTENT, STYLE, **SMALL), allowed))
            )
            group.create_task(repeat(lambda client: self.read_to_end(client.stream(CONTENT, STYLE, **SMALL), allowed)))
            try:
                yield
            finally:
                stop.set()

    async def warm_up(self) -> None:
        """Runs a burst of jobs, for which the server starts all of its threads, and measures the baseline after it."""
        async with self.bystanders(), self.client() as client, asyncio.TaskGroup() as group:
            for _ in range(BURST):
                stream = client.stream(CONTENT, STYLE, frames=LARGE_FRAMES, **LARGE | {"iterations": 40})
                group.create_task(self.read_to_end(stream))
        await self.leak_check.measure_baseline()

    # Faults in the engine ---------------------------------------------------------------------------------------------

    async def inject(self, fault: str) -> None:
        """Requests a fault of the engine (see `tests.chaos.server`), and waits until it has happened."""
        request = self.folder / fault
        request.touch()

        async def has_happened() -> bool:
            return not request.exists()

        await until(has_happened, f"{fault} to happen")


def check_update(update: Update, last: Update | None) -> None:
    """Raises `RuleViolation` if the update is invalid or cannot follow `last`."""
    times = [getattr(update, name, None) for name in ("time_left_s", "elapsed_s", "estimated_wait_s")]
    if any(time is not None and not 0 <= time < 86_400 for time in times):
        raise RuleViolation(f"a time is out of range: {update}")
    if last is not None and not isinstance(update, Accepted) and update.sequence <= last.sequence:
        raise RuleViolation(f"updates are out of order: {update} after {last}")
    if isinstance(update, Progress | Checkpoint) and update.iteration < 1:
        raise RuleViolation(f"an iteration is out of range: {update}")


async def until(condition: Callable[[], Awaitable[bool]], description: str) -> None:
    """Polls until the condition holds. Raises `RuleViolation` after 60 s."""
    end = time.monotonic() + WITHIN_S
    while not await condition():
        if time.monotonic() > end:
            raise RuleViolation(f"waited {WITHIN_S:g} s for {description}")
        await asyncio.sleep(0.02)
