"""The soak: `python -m tests.soak --minutes N --engine vgg|fake --seed S --out FOLDER`.

Six honest users perform random actions at once on one server, and three hostile ones, in a process of their own, play
the hostile clients of `tests.bad_input`. The server's log and its access log go to a pipe that is read slowly. Memory,
file descriptors, threads, tasks and jobs are sampled every second. The default is the real engine, at 48 and 64 px: its
caches, its allocators and the batches, which change with every shape, are what could grow. The fake engine runs many
times as many jobs and frames in the same time, which tests everything else.

After each minute of load the server rests. It must then hold no more descriptors, threads and tasks than before, and
after the warm-up its memory at rest must not grow faster than a run of that length can detect (`max_mib_per_h`). The
exit code is 1 if it does, or if this could not be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.soak import hostile
from tests.soak.users import USERS, User
from tests.support.monitoring import HealthProbe, LeakCheck, ProcessUsage, RuleViolation, open_jobs, scrape_metrics
from tests.support.processes import Server, environment
from tests.support.trend import chart, slope

FLAGS = (
    *("--metrics-port", "0", "--log-level", "info", "--access-log", "-", "--list-jobs", "--reflection"),
    *hostile.flags(),
)
ENGINES = {"vgg": ("--engine", "vgg"), "fake": ("--engine", "fake", "--iter-ms", "2")}
SAMPLE_INTERVAL_S = 1.0
PRINT_INTERVAL_S = 60.0
# Memory is judged by what an idle server has after each round, because under load it changes by hundreds of MiB.
ROUND_S, REST_S = 60.0, 3.0
LOG_BYTES, LOG_PAUSE_S = 2048, 0.5  # how slowly the log is read
# During the warm-up, caches fill, every shape and width of a batch occurs, and the allocators reach their plateau. In
# three runs of 20 minutes memory rose by 10 to 15 MiB within the first 7 minutes, and not at all after the tenth.
WARM_UP_SHARE = 0.5  # of the time, at most
MAX_WARM_UP_S = 600.0
BURST = 16  # simultaneous users before the measurement, for which the server starts all of its threads
MAX_SLOPE_MIB_PER_H = 24.0  # in a run of two hours, which can detect such a small slope
MIN_MEASURED_S = 300.0  # after the warm-up; memory is not judged in a shorter run, because caches still fill
NOISE_MIB = 40.0  # standard deviation of the memory at rest without growth: the allocators keep more or less


@dataclass(frozen=True)
class Sample:
    """The state of the server at a time in seconds since the start of the load."""

    at_s: float
    resident_mib: float
    descriptors: int
    threads: int
    tasks: int
    jobs: int


class Rest(NamedTuple):
    """The memory of the server when it has nothing to do, at a time in seconds since the start of the load."""

    at_s: float
    resident_mib: float


class Soak:
    """One server under load, and its samples."""

    def __init__(self, engine: str, seed: int, console: Console) -> None:
        self.engine, self.seed, self.console = engine, seed, console
        self.ends: Counter[tuple[str, str]] = Counter()
        self.slowest_s: dict[str, float] = {}  # by action of the honest users
        self.samples: list[Sample] = []
        self.rests: list[Rest] = []
        self.health: HealthProbe | None = None
        self.leak_check: LeakCheck
        self.after: dict[str, float] = {}

    async def run(self, seconds: float) -> None:
        """Runs the load and the checks after it. Raises `RuleViolation`."""
        with (
            tempfile.TemporaryDirectory() as folder,
            slowly_read_pipe() as log,
            Server(*ENGINES[self.engine], *FLAGS, cwd=Path(folder), stderr=log) as server,
        ):
            metrics_url = server.line("metrics on ")
            server.line("ready in ")
            self.leak_check = LeakCheck(server.pid, metrics_url)
            with HealthProbe(server.address, metrics_url) as self.health:
                await self._run_users(server, 0.0, BURST)
                await self.leak_check.measure_baseline()
                self.ends.clear()
                async with asyncio.TaskGroup() as group:  # if the sampler fails, it ends the load
                    sampler = group.create_task(self._sample(server, metrics_url))
                    await self._run_rounds(server, metrics_url, seconds)
                    sampler.cancel()
                self.health.check()
                self.after = await self.leak_check.wait_until_settled()
        self.check_memory()

    async def _run_rounds(self, server: Server, metrics_url: str, seconds: float) -> None:
        """Runs the load for this time, with a rest after each round, in which the server has nothing to do."""
        start = time.monotonic()
        while (left_s := start + seconds - time.monotonic()) > 0:
            async with self._hostile_users(server, metrics_url):
                await self._run_users(server, min(ROUND_S, left_s), USERS)
            await self.leak_check.wait_until_settled()
            await asyncio.sleep(REST_S)
            self.rests.append(Rest(time.monotonic() - start, ProcessUsage.of(server.pid).resident_mib))

    async def _run_users(self, server: Server, seconds: float, users: int) -> None:
        """Runs this number of users for this time; each uses the server at least once."""
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, stop.set)
        async with asyncio.TaskGroup() as group:
            for number in range(users):
                user = User(
                    server.address, random.Random(f"{self.seed} {len(self.rests)} {number}"), self.ends, self.slowest_s
                )
                group.create_task(user.use_server(stop))

    @contextlib.asynccontextmanager
    async def _hostile_users(self, server: Server, metrics_url: str) -> AsyncIterator[None]:
        """Hostile users for the length of the block. Raises `RuleViolation` for what they report."""
        command = (
            "-m",
            "tests.soak.hostile",
            server.address,
            str(server.pid),
            metrics_url,
            str(self.seed + len(self.rests)),
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
            start_new_session=True, limit=2**20,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        lines, started, leaving = process.stdout, asyncio.Event(), False

        async def read() -> None:
            async for line in lines:
                report = json.loads(line)
                started.set()
                self.ends[report["action"], report["end"]] += 1
                if report["violation"]:
                    raise RuleViolation(report["violation"])
            if not leaving:
                raise RuleViolation("the hostile users have ended; their standard error has the reason")

        try:
            async with asyncio.TaskGroup() as group:  # a violation ends the load
                group.create_task(read())
                await started.wait()
                yield
                leaving = True
                process.stdin.close()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _sample(self, server: Server, metrics_url: str) -> None:
        start, next_print_s = time.monotonic(), PRINT_INTERVAL_S
        with self.console.status("") as status:
            while True:
                await asyncio.sleep(SAMPLE_INTERVAL_S)
                metrics, usage = await asyncio.to_thread(scrape_metrics, metrics_url), ProcessUsage.of(server.pid)
                at_s, tasks, jobs = time.monotonic() - start, metrics["gramophone_event_loop_tasks"], open_jobs(metrics)
                self.samples.append(
                    Sample(at_s, usage.resident_mib, usage.descriptors, usage.threads, int(tasks), int(jobs))
                )
                line = (
                    f"{at_s:.0f} s: {self.ends.total()} actions, {usage.resident_mib:.0f} MiB, "
                    f"{usage.descriptors} descriptors, {usage.threads} threads, {tasks:.0f} tasks, {jobs:.0f} jobs"
                )
                status.update(line)
                if not self.console.is_terminal and at_s >= next_print_s:
                    next_print_s += PRINT_INTERVAL_S
                    self.console.print(line)

    @property
    def warm(self) -> list[Rest]:
        """The rests after the warm-up."""
        end_s = self.rests[-1].at_s if self.rests else 0.0
        return [rest for rest in self.rests if rest.at_s >= min(WARM_UP_SHARE * end_s, MAX_WARM_UP_S)]

    @property
    def is_long(self) -> bool:
        """Whether the run is long enough to detect growth."""
        return bool(self.warm) and self.warm[-1].at_s - self.warm[0].at_s >= MIN_MEASURED_S

    @property
    def mib_per_h(self) -> float:
        """The growth of memory."""
        return 3600 * slope([(rest.at_s, rest.resident_mib) for rest in self.warm])

    @property
    def max_mib_per_h(self) -> float:
        """The allowed growth of memory: three standard errors of a line through so many rests, and at least
        `MAX_SLOPE_MIB_PER_H`."""
        hours = (self.warm[-1].at_s - self.warm[0].at_s) / 3600
        return max(MAX_SLOPE_MIB_PER_H, 3 * NOISE_MIB * math.sqrt(12 / len(self.warm)) / hours)

    def check_memory(self) -> None:
        """Prints the verdict on memory, or that the run was too short. Raises `RuleViolation` if memory grew."""
        if not self.is_long:
            self.console.print(f"memory: not judged; this needs {MIN_MEASURED_S / 60:g} minutes after the warm-up")
            return
        minutes = (self.warm[-1].at_s - self.warm[0].at_s) / 60
        verdict = f"{self.mib_per_h:+.1f} MiB/h in the last {minutes:.0f} minutes; "
        verdict += f"at most {self.max_mib_per_h:.0f} are allowed"
        if self.max_mib_per_h > MAX_SLOPE_MIB_PER_H:
            verdict += ", the least that so short a run can detect"
        if self.mib_per_h > self.max_mib_per_h:
            raise RuleViolation(f"memory grows by {verdict}")
        self.console.print(f"memory: {verdict}")

    def table(self) -> Table:
        """How each action ended."""
        table = Table("action", "times", "slowest", "how they ended")
        for action in sorted({action for action, _ in self.ends}):
            ends = Counter({end: count for (name, end), count in self.ends.items() if name == action})
            slowest = f"{self.slowest_s[action]:.1f} s" if action in self.slowest_s else ""
            table.add_row(
                action, str(ends.total()), slowest, ", ".join(f"{count} {end}" for end, count in ends.most_common())
            )
        return table

    def markdown(self) -> str:
        """A row of the table in RESULTS.md."""
        before, after, warm = self.leak_check.baseline, self.after, self.warm
        latencies_ms = sorted(self.health.latencies_ms) if self.health is not None else [0.0]
        cells = (
            self.engine,
            f"{self.rests[-1].at_s / 60:.0f}",
            f"{self.ends.total()}",
            f"{median(rest.resident_mib for rest in warm):.0f}",
            f"{self.mib_per_h:+.1f}",
            *(f"{before[name]:.0f} / {after[name]:.0f}" for name in ("descriptors", "threads", "tasks")),
            f"{latencies_ms[int(0.99 * len(latencies_ms))]:.0f}",
        )
        return f"| {' | '.join(cells)} |"

    def save(self, folder: Path) -> None:
        """Writes the samples and ends as JSON, and memory over time as SVG."""
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "engine": self.engine,
            "seed": self.seed,
            "mib_per_h": self.mib_per_h,
            "most_mib_per_h": self.max_mib_per_h if self.is_long else None,
            "before": self.leak_check.baseline,
            "after": self.after,
            "ends": {f"{action}: {end}": count for (action, end), count in sorted(self.ends.items())},
            "rests": self.rests,
            "samples": [asdict(sample) for sample in self.samples],
        }
        (folder / f"soak-{self.engine}.json").write_text(json.dumps(report, indent=1))
        points = [(rest.at_s / 60, rest.resident_mib) for rest in self.rests]
        svg = chart(points, "minutes", "resident memory of the server at rest in MiB")
        (folder / f"soak-{self.engine}.svg").write_text(svg)


@contextlib.contextmanager
def slowly_read_pipe() -> Iterator[int]:
    """The writing end of a pipe that is read by 4 KiB a second, as a log that nobody drains in time."""
    reading, writing = os.pipe()
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(LOG_PAUSE_S) and os.read(reading, LOG_BYTES):
            pass

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield writing
    finally:
        ended.set()
        os.close(writing)
        thread.join()
        os.close(reading)


HEADER = (
    "| engine | minutes | actions | median RSS, MiB | slope, MiB/h | descriptors before / after | threads | tasks "
    "| health p99, ms |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. The exit code is 1 if a rule was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of load (default 20)")
    parser.add_argument(
        "--engine", choices=ENGINES, default="vgg", help="default vgg, whose memory is the one that could grow"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: random")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the chart and the samples (default out)"
    )
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    soak = Soak(args.engine, args.seed, console)
    console.print(f"seed {args.seed}")
    violation = ""
    try:
        asyncio.run(soak.run(args.minutes * 60))
    except* RuleViolation as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        violation = str(error)
    console.print(soak.table())
    if soak.samples:
        soak.save(args.out)
    if not violation:
        console.print(HEADER, soak.markdown(), sep="\n", markup=False)
    else:
        console.print(f"failed: {violation}", style="red", markup=False)
    return int(bool(violation))


if __name__ == "__main__":
    sys.exit(main())
