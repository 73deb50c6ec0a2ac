"""A server that times its own event loop: `python -m tests.support.watched_server`, with flags of `gramophone-server`.

The server is the product's; beside its own tasks one more sleeps for 5 ms at a time and measures how late it wakes. The
working folder gets two files: "stall", with the longest stall since the test last read it, and "stacks", with the
stack of its thread at 40 ms of each stall. A stall is counted without the time in which the loop's thread was ready
to run and had no processor, because machines are shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import mmap
import os
import signal
import struct
import threading
import time
from pathlib import Path

STALL, STACKS = "stall", "stacks"  # files in the working folder
TICK_S = 0.005
MAX_STACKS = 3
DUMP = "Stack (most recent call first):\n"  # how faulthandler begins one
STACK_S = 0.040  # below the 50 ms that are allowed


class StallWatch:
    """The test's side: what the event loop of a server with this working folder has measured."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / STALL).write_bytes(bytes(8))
        self._stacks_read = 0

    def take_s(self) -> float:
        """The longest stall in seconds since the last call."""
        with (self._folder / STALL).open("r+b") as file, mmap.mmap(file.fileno(), 8) as page:
            (stall_s,) = struct.unpack("d", page[:])
            page[:] = bytes(8)
        return stall_s

    def take_stacks(self) -> str:
        """The innermost frames of the loop's thread in the first stalls since the last call, one stall in a line."""
        with contextlib.suppress(FileNotFoundError), (self._folder / STACKS).open() as file:
            file.seek(self._stacks_read)
            text = file.read()
            self._stacks_read = file.tell()
            return "\n".join(_main_thread(dump) for dump in text.split(DUMP)[1:][:MAX_STACKS])
        return ""


def _main_thread(dump: str) -> str:
    """The innermost frames of a dump."""
    frames = dump.strip().splitlines()
    return " < ".join(frame.strip().removeprefix("File ") for frame in frames[:6])


async def watch_loop(folder: Path) -> None:
    """The server's side: measures until it is cancelled."""
    thread = threading.get_native_id()
    with (
        (folder / STALL).open("r+b") as file,
        mmap.mmap(file.fileno(), 8) as page,
        (folder / STACKS).open("w") as stacks,
        Path(f"/proc/self/task/{thread}/schedstat").open("rb") as schedule,  # noqa: ASYNC230 - a file of /proc
    ):

        def waited_s() -> float:
            """How long this thread has been ready to run without a processor."""
            return int(os.pread(schedule.fileno(), 64, 0).split()[1]) / 1e9

        # In the loop's thread, by a signal. `dump_traceback_later` reads the frames of a thread that runs meanwhile,
        # which crashed servers under load.
        faulthandler.register(signal.SIGALRM, stacks, all_threads=False)
        try:
            while True:
                signal.setitimer(signal.ITIMER_REAL, TICK_S + STACK_S)
                start, waited = time.monotonic(), waited_s()
                await asyncio.sleep(TICK_S)
                stall_s = time.monotonic() - start - TICK_S - (waited_s() - waited)
                if stall_s > struct.unpack("d", page[:])[0]:
                    page[:] = struct.pack("d", stall_s)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)


if __name__ == "__main__":
    from gramophone_server import command_line, main

    serve = main.serve

    async def watched(*arguments: object) -> bool:
        """Serves as the product does, with one task more."""
        watching = asyncio.create_task(watch_loop(Path.cwd()))
        try:
            return await serve(*arguments)  # type: ignore[arg-type]
        finally:
            watching.cancel()

    main.serve = watched
    main.run(command_line.from_command_line())
