"""The soak: `python -m tests.soak --minutes N --engine vgg|fake --seed S --out FOLDER`.

Six users of all habits at once, on one server, whose memory, descriptors, threads, tasks and jobs are sampled every second.
With the real engine by default, at 48 and 64 px: what could grow there is its caches, its allocators and the batches that come
and go with every shape. The fake one makes many times as many jobs and frames in the same time, for all the rest.

The server's memory must not grow faster than a run of that length can tell (`most_mib_per_h`), by a line through the samples
after the warm-up; and without load it must hold no more descriptors, threads and tasks than before. Exit code 1 tells that it
does, or that it could not be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.chaos.watch import Broken, Health, Residue, Usage, scraped
from tests.soak.load import USERS, User
from tests.soak.trend import chart, slope
from tests.support.processes import Server

FLAGS = (
    *("--metrics-port", "0", "--log-level", "error", "--max-queued", "64", "--max-kept", "64"),
    *("--max-uploads-bytes", str(2**20)),
)
ENGINES = {"vgg": ("--engine", "vgg"), "fake": ("--engine", "fake", "--iter-ms", "2")}
SAMPLE_EVERY_S = 1.0
LINE_EVERY_S = 60.0
WARM_UP = 0.5  # of the time, at most
# In which caches fill, every shape and width of a batch was seen, and the allocators have come to their plateau: in three runs
# of 20 minutes memory rose by 10 to 15 MiB within the first 7 minutes, and by nothing after the tenth.
MOST_WARM_UP_S = 600.0
BURST = 16  # users at once before anything is counted, for whom the server starts every thread that it ever will
MOST_SLOPE_MIB_PER_H = 24.0  # of a run that is long enough to tell so little
LEAST_S = 300.0  # after the warm-up; in less, memory is not judged, because caches still fill
NOISE_MIB = 6.0  # by the same line; allocators alone have made 4 of it within ten minutes


@dataclass(frozen=True)
class Sample:
    """The server at a moment, in seconds from the beginning of the load."""

    at_s: float
    resident_mib: float
    descriptors: int
    threads: int
    tasks: int
    jobs: int


class Soak:
    """One server under load, and what was seen of it."""

    def __init__(self, engine: str, seed: int, say: Console) -> None:
        self.engine, self.seed, self.say = engine, seed, say
        self.ends: Counter[tuple[str, str]] = Counter()
        self.samples: list[Sample] = []
        self.health: Health | None = None
        self.residue: Residue
        self.after: dict[str, float] = {}

    async def run(self, seconds: float) -> None:
        """The load and the rest after it. Raises `Broken`."""
        with (
            tempfile.TemporaryDirectory() as folder,
            Server(*ENGINES[self.engine], *FLAGS, cwd=Path(folder)) as server,
        ):
            metrics_url = server.line("metrics on ")
            server.line("ready in ")
            self.residue = Residue(server.pid, metrics_url)
            with Health(server.address, metrics_url) as self.health:
                await self._load(server, 0.0, BURST)
                await self.residue.rest()
                self.ends.clear()
                async with asyncio.TaskGroup() as group:  # whose load ends if the sampler does
                    sampler = group.create_task(self._sample(server, metrics_url))
                    await self._load(server, seconds, USERS)
                    sampler.cancel()
                self.health.check()
                self.after = await self.residue.settled()
        self.check_memory()

    async def _load(self, server: Server, seconds: float, users: int) -> None:
        """So many users for so long, but each uses the server once at least."""
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(seconds, over.set)
        async with asyncio.TaskGroup() as group:
            for number in range(users):
                user = User(server.address, random.Random(f"{self.seed} {number}"), self.ends)
                group.create_task(user.use(over))

    async def _sample(self, server: Server, metrics_url: str) -> None:
        began, next_line_s = time.monotonic(), LINE_EVERY_S
        with self.say.status("") as status:
            while True:
                await asyncio.sleep(SAMPLE_EVERY_S)
                metrics, usage = await asyncio.to_thread(scraped, metrics_url), Usage.of(server.pid)
                jobs = sum(metrics[f'gramophone_jobs{{state="{state}"}}'] for state in ("queued", "running", "paused"))
                at_s, tasks = time.monotonic() - began, int(metrics["gramophone_event_loop_tasks"])
                self.samples.append(
                    Sample(at_s, usage.resident_mib, usage.descriptors, usage.threads, tasks, int(jobs))
                )
                line = (
                    f"{at_s:.0f} s: {self.ends.total()} done, {usage.resident_mib:.0f} MiB, {usage.descriptors} descriptors, "
                    f"{usage.threads} threads, {tasks} tasks, {jobs:.0f} jobs"
                )
                status.update(line)
                if not self.say.is_terminal and at_s >= next_line_s:
                    next_line_s += LINE_EVERY_S
                    self.say.print(line)

    @property
    def warm(self) -> list[Sample]:
        """The samples after the warm-up."""
        end_s = self.samples[-1].at_s if self.samples else 0.0
        return [sample for sample in self.samples if sample.at_s >= min(WARM_UP * end_s, MOST_WARM_UP_S)]

    @property
    def is_long(self) -> bool:
        """Whether the samples tell a growth."""
        return bool(self.warm) and self.warm[-1].at_s - self.warm[0].at_s >= LEAST_S

    @property
    def mib_per_h(self) -> float:
        """How fast memory grows."""
        return 3600 * slope([(sample.at_s, sample.resident_mib) for sample in self.warm])

    @property
    def most_mib_per_h(self) -> float:
        """How fast memory may grow: the shorter the time, the more of a slope is made of noise alone. After a warm-up of 10
        minutes a run of 20 minutes tells 36 MiB an hour, and one of more than 25 what is allowed in the long run, 24."""
        return max(MOST_SLOPE_MIB_PER_H, 3600 * NOISE_MIB / (self.warm[-1].at_s - self.warm[0].at_s))

    def check_memory(self) -> None:
        """Says how memory was judged, and raises `Broken` if it grows. A run that is too short to tell is not judged."""
        if not self.is_long:
            self.say.print(f"too short to judge memory: that takes {LEAST_S / 60:g} minutes after the warm-up")
            return
        minutes = (self.warm[-1].at_s - self.warm[0].at_s) / 60
        judged = f"{self.mib_per_h:+.1f} MiB an hour in the last {minutes:.0f} minutes; at most {self.most_mib_per_h:.0f} are allowed"
        if self.most_mib_per_h > MOST_SLOPE_MIB_PER_H:
            judged += ", as so short a time tells no less"
        if self.mib_per_h > self.most_mib_per_h:
            raise Broken(f"memory grows by {judged}")
        self.say.print(f"memory: {judged}")

    def table(self) -> Table:
        """How it ended, habit by habit."""
        table = Table("habit", "times", "how they ended")
        for habit in sorted({habit for habit, _ in self.ends}):
            ends = Counter({end: count for (name, end), count in self.ends.items() if name == habit})
            table.add_row(habit, str(ends.total()), ", ".join(f"{count} {end}" for end, count in ends.most_common()))
        return table

    def markdown(self) -> str:
        """A line for RESULTS.md."""
        before, after, warm = self.residue.before, self.after, self.warm
        took = sorted(self.health.latencies_ms) if self.health is not None else [0.0]
        cells = (
            self.engine,
            f"{self.samples[-1].at_s / 60:.0f}",
            f"{self.ends.total()}",
            f"{median(sample.resident_mib for sample in warm):.0f}",
            f"{self.mib_per_h:+.1f}",
            *(f"{before[name]:.0f} / {after[name]:.0f}" for name in ("descriptors", "threads", "tasks")),
            f"{took[int(0.99 * len(took))]:.0f}",
        )
        return f"| {' | '.join(cells)} |"

    def save(self, folder: Path) -> None:
        """The samples and ends as JSON, and memory over time as SVG."""
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "engine": self.engine,
            "seed": self.seed,
            "mib_per_h": self.mib_per_h,
            "most_mib_per_h": self.most_mib_per_h if self.is_long else None,
            "before": self.residue.before,
            "after": self.after,
            "ends": {f"{habit}: {end}": count for (habit, end), count in sorted(self.ends.items())},
            "samples": [asdict(sample) for sample in self.samples],
        }
        (folder / f"soak-{self.engine}.json").write_text(json.dumps(told, indent=1))
        points = [(sample.at_s / 60, sample.resident_mib) for sample in self.samples]
        (folder / f"soak-{self.engine}.svg").write_text(
            chart(points, "minutes", "resident memory of the server in MiB")
        )


HEADER = """\
| engine | minutes | actions | median RSS, MiB | slope, MiB/h | descriptors before / after | threads | tasks | health p99, ms |
|---|---|---|---|---|---|---|---|---|"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 when a rule was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of load (default 20)")
    parser.add_argument("--engine", choices=ENGINES, default="vgg", help="default vgg, which has the memory")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder for the chart and the samples (default out)"
    )
    args = parser.parse_args(argv)
    say = Console(highlight=False, soft_wrap=True)
    soak = Soak(args.engine, args.seed, say)
    say.print(f"seed {args.seed}")
    broken = ""
    try:
        asyncio.run(soak.run(args.minutes * 60))
    except* Broken as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        broken = str(error)
    say.print(soak.table())
    if soak.samples:
        soak.save(args.out)
    if not broken:
        say.print(HEADER, soak.markdown(), sep="\n", markup=False)
    else:
        say.print(f"broken: {broken}", style="red", markup=False)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
