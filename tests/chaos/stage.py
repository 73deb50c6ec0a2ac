"""What faults are played on: a server that fails when it is told to, clients of it, and the count of how jobs ended."""

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
    Checkpoint,
    FrameOptions,
    GramophoneClient,
    GramophoneError,
    Progress,
    Result,
    Update,
)
from gramophone_client.bench.pictures import synthetic
from tests.chaos.watch import Broken, Residue
from tests.support.processes import WITHIN_S, Process, Server

DEADLINE_S = 600.0  # of calls; by less a server refuses a large job that it has only seen small ones of
BURST = 16  # jobs at once
FLAGS = (
    *("--engine", "fake", "--iter-ms", "5", "--max-blocked-s", "3", "--max-running", "32", "--max-queued", "64"),
    *("--max-kept", "256", "--max-uploads-bytes", str(2**20), "--log-level", "error"),
    *("--metrics-port", "0"),
)
SMALL = {"size": 48, "smallest_size": 0, "iterations": 20}
LONG = SMALL | {"iterations": 5000}  # 25 s
LARGE = LONG | {"size": 256}  # whose frames fill a connection in no time
LARGE_FRAMES = FrameOptions(format="png")
CONTENT, STYLE = synthetic(1, 64), synthetic(2, 64, 16)

Kinds = tuple[type[GramophoneError], ...]


class Clock:
    """The wall clock of a server, to be set as anybody sets a machine's."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "clock"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-lm"], check=True)
        self.settings = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._file)}
        self._file.write_bytes(bytes(8))

    def ahead(self, seconds: float) -> None:
        """Sets the clock of whoever was started with `settings` so far ahead of the right time; negative: behind it."""
        with self._file.open("r+b") as file, mmap.mmap(file.fileno(), 8) as page:
            page[:] = struct.pack("d", seconds)


def faulty_server(*flags: str, cwd: Path, **settings: str) -> Server:
    """See `server`; it listens, and may not be ready."""
    settings["OMP_NUM_THREADS"] = (
        "1"  # or every thread gets another one at its first large tensor, which looks like a leak
    )
    return Server(*FLAGS, *flags, cwd=cwd, module="tests.chaos.server", **settings)


class Stage:
    """One server for all faults, which it must survive."""

    def __init__(self, server: Server, metrics_url: str, clock: Clock, folder: Path, chance: random.Random) -> None:
        self.server, self.clock, self.folder, self.chance = server, clock, folder, chance
        self.residue = Residue(server.pid, metrics_url)
        self.ends: Counter[str] = Counter()  # of the jobs of the present fault

    def client(self, target: str = "", timeout_s: float = DEADLINE_S) -> GramophoneClient:
        """A client of the server, or of another target."""
        return GramophoneClient(target or self.server.address, timeout_s=timeout_s)

    @asynccontextmanager
    async def process(self, *command: str | Path) -> AsyncIterator[Process]:
        """A client that is a process of its own, in the stage's folder."""
        process = await asyncio.to_thread(lambda: Process(*command, cwd=self.folder))
        try:
            yield process
        finally:
            await asyncio.to_thread(process.__exit__, None, None, None)

    # How jobs end -----------------------------------------------------------------------------------------------------

    async def end(self, updates: AsyncGenerator[Update, None], allowed: Kinds = ()) -> Result | GramophoneError:
        """The end of a job, which must be its result or an error of the kinds that are allowed."""
        last = None
        try:
            async with contextlib.aclosing(updates):
                async for update in updates:
                    last = sane(update, last)
        except GramophoneError as error:
            return self.counted(error, allowed)
        if not isinstance(last, Result):
            raise Broken(f"a stream ended without a result, behind {last}")
        return self.counted(last)

    async def answer(self, stylized: Awaitable[Result], allowed: Kinds = ()) -> Result | GramophoneError:
        """The same of a job without a stream."""
        try:
            return self.counted(await stylized)
        except GramophoneError as error:
            return self.counted(error, allowed)

    def counted(self, end: Result | GramophoneError, allowed: Kinds = ()) -> Result | GramophoneError:
        """Counts an end, and raises `Broken` if it must not be."""
        self.ends[type(end).__name__ if isinstance(end, GramophoneError) else "result"] += 1
        if isinstance(end, GramophoneError) and not isinstance(end, allowed):
            raise Broken(f"a job ended in {type(end).__name__} ({end.code}): {end}") from end
        if isinstance(end, Result):
            end.image()  # whole, or Pillow raises
        return end

    @asynccontextmanager
    async def bystanders(self, allowed: Kinds = ()) -> AsyncIterator[None]:
        """Two clients who do nothing wrong, one job after another, while the block lasts; their jobs must end well too."""
        over = asyncio.Event()

        async def one(work: Callable[[GramophoneClient], Awaitable[Any]]) -> None:
            async with self.client() as client:
                while not over.is_set():
                    await work(client)

        async with asyncio.TaskGroup() as group:
            group.create_task(one(lambda client: self.answer(client.stylize(CONTENT, STYLE, **SMALL), allowed)))
            group.create_task(one(lambda client: self.end(client.stream(CONTENT, STYLE, **SMALL), allowed)))
            try:
                yield
            finally:
                over.set()

    async def warm_up(self) -> None:
        """A burst, for which the server starts all threads that it ever will. What it holds when that is over is the most
        that it may hold later."""
        async with self.bystanders(), self.client() as client, asyncio.TaskGroup() as group:
            for _ in range(BURST):
                stream = client.stream(CONTENT, STYLE, frames=LARGE_FRAMES, **LARGE | {"iterations": 40})
                group.create_task(self.end(stream))
        await self.residue.rest()

    # Faults in the engine ---------------------------------------------------------------------------------------------

    async def break_engine(self, fault: str) -> None:
        """Returns when it has happened; see `server`."""
        told = self.folder / fault
        told.touch()

        async def happened() -> bool:
            return not told.exists()

        await until(happened, f"{fault} to happen")


def sane(update: Update, last: Update | None) -> Update:
    """Raises `Broken` if the update cannot follow `last`."""
    times = [getattr(update, name, None) for name in ("time_left_s", "elapsed_s", "estimated_wait_s")]
    if any(time is not None and not 0 <= time < 86_400 for time in times):
        raise Broken(f"a time out of range: {update}")
    if last is not None and not isinstance(update, Accepted) and update.sequence <= last.sequence:
        raise Broken(f"out of order: {update} behind {last}")
    if isinstance(update, Progress | Checkpoint) and update.iteration < 1:
        raise Broken(f"an iteration out of range: {update}")
    return update


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Waits for something that happens by itself."""
    end = time.monotonic() + WITHIN_S
    while not await holds():
        if time.monotonic() > end:
            raise Broken(f"waited {WITHIN_S:g} s for {what}")
        await asyncio.sleep(0.02)
