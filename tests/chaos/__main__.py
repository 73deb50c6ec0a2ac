"""The chaos campaign: `python -m tests.chaos --seed N --minutes M --only NAME`.

Injects every fault in turn, round after round in random order, while other clients use the server and its health is
checked every 50 ms. After each fault the server must be back at its baseline, and over all rounds its memory must not
grow.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.environment import ChaosEnvironment, ServerClock, faulty_server
from tests.chaos.faults import FAULTS
from tests.support.monitoring import HealthProbe, ProcessUsage, RuleViolation
from tests.support.trend import slope

FAULT_TIMEOUT_S = 240.0  # the longest fault takes 10 s on an idle machine
MAX_GROWTH_MIB = 16.0  # of the server over all rounds, by a line through them; the noise of its allocators is 5 MiB
MIN_ROUNDS = 4  # to judge growth


@dataclass
class Summary:
    """The rounds of one fault, and how its jobs ended."""

    rounds: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Rounds of faults on one server."""

    def __init__(self, names: Sequence[str], seed: int, console: Console, *, together: bool = False) -> None:
        """``together``: faults that do not affect bystanders are injected at the same time."""
        self.seed, self.console = seed, console
        harmless = [name for name in names if together and not FAULTS[name].bystander_errors]
        self.groups = [[name] for name in names if name not in harmless] + ([harmless] if harmless else [])
        self.summaries = {" + ".join(group): Summary() for group in self.groups}
        self.usages: list[ProcessUsage] = []  # of the server, after each round
        self.health: HealthProbe | None = None

    async def run(self, seconds: float) -> None:
        """Runs at least one round, and further rounds until the time is over. Raises `RuleViolation`."""
        end = time.monotonic() + seconds
        async with self._environment() as env:
            while not self.usages or time.monotonic() < end:
                for group in env.rng.sample(self.groups, len(self.groups)):
                    await self._inject(env, group)
                self.usages.append(usage := ProcessUsage.of(env.server.pid))
                self.console.print(f"round {len(self.usages)}: {usage.resident_mib:.0f} MiB")
        self.check_memory()

    def check_memory(self) -> None:
        """Raises `RuleViolation` if the server's memory grew. Prints the verdict, or that there were too few rounds."""
        rounds = [(float(number), usage.resident_mib) for number, usage in enumerate(self.usages)]
        if len(rounds) < MIN_ROUNDS:
            self.console.print(f"memory: not judged, because {MIN_ROUNDS} rounds are needed and {len(rounds)} were run")
            return
        growth = slope(rounds) * len(rounds)
        if growth > MAX_GROWTH_MIB:
            raise RuleViolation(
                f"the server grew by {growth:.0f} MiB in {len(rounds)} rounds: {[m for _, m in rounds]}"
            )
        self.console.print(
            f"memory: {growth:+.0f} MiB in {len(rounds)} rounds (slope of a line); "
            f"at most {MAX_GROWTH_MIB:g} are allowed"
        )

    @asynccontextmanager
    async def _environment(self) -> AsyncIterator[ChaosEnvironment]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            clock = ServerClock(folder)
            with faulty_server("--list-jobs", cwd=folder, **clock.settings) as server:
                metrics_url = server.line("metrics on ")
                server.line("ready in ")
                with HealthProbe(server.address, metrics_url) as self.health:
                    env = ChaosEnvironment(server, metrics_url, clock, folder, random.Random(self.seed))
                    await env.warm_up()
                    yield env

    async def _inject(self, env: ChaosEnvironment, group: Sequence[str]) -> None:
        name, start = " + ".join(group), time.monotonic()
        summary = self.summaries[name]
        allowed = tuple(error for each in group for error in FAULTS[each].bystander_errors)
        env.ends.clear()
        try:
            async with asyncio.timeout(FAULT_TIMEOUT_S):
                async with env.bystanders(allowed), asyncio.TaskGroup() as tasks:
                    for each in group:
                        tasks.create_task(FAULTS[each].inject(env))
                await env.leak_check.wait_until_settled()
            assert self.health is not None
            self.health.check()
        except Exception as error:
            raise RuleViolation(f"{name}: {reason(error)}") from error
        took_s = time.monotonic() - start
        summary.rounds, summary.seconds = summary.rounds + 1, summary.seconds + took_s
        summary.ends += env.ends
        self.console.print(f"  {name}: {took_s:.1f} s, {format_ends(env.ends)}")

    def table(self) -> Table:
        """The faults, and how their jobs ended."""
        table = Table("fault", "rounds", "s", "jobs", "how they ended")
        for name, summary in self.summaries.items():
            cells = (str(summary.rounds), f"{summary.seconds:.0f}", str(summary.ends.total()))
            table.add_row(name, *cells, format_ends(summary.ends))
        return table


def format_ends(ends: Counter[str]) -> str:
    """How jobs ended, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in ends.most_common())


def reason(error: BaseException) -> str:
    """The message of an error, or of the first cause in an exception group."""
    while isinstance(error, BaseExceptionGroup):
        error = next((e for e in error.exceptions if isinstance(e, RuleViolation)), error.exceptions[0])
    if isinstance(error, TimeoutError):
        return f"it took more than {FAULT_TIMEOUT_S:g} s"
    return str(error) if isinstance(error, RuleViolation) else f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. The exit code is 1 if a rule was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: random")
    parser.add_argument("--minutes", type=float, default=5.0, help="of whole rounds; 0: one round (default 5)")
    parser.add_argument("--only", action="append", choices=FAULTS, help="run only this fault; may be repeated")
    parser.add_argument(
        "--together", action="store_true", help="inject faults that do not affect bystanders at the same time"
    )
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    campaign = Campaign(args.only or list(FAULTS), args.seed, console, together=args.together)
    console.print(f"seed {args.seed}")
    violation = ""
    try:
        asyncio.run(campaign.run(args.minutes * 60))
    except (RuleViolation, ExceptionGroup) as error:
        violation = reason(error)
    console.print(campaign.table())
    if campaign.health is not None and (ms := sorted(campaign.health.latencies_ms)):
        console.print(f"health: {len(ms)} answers, p99 {ms[int(0.99 * len(ms))]:.0f} ms, longest {ms[-1]:.0f} ms")
    if violation:
        command = " ".join(["python -m tests.chaos", f"--seed {args.seed}", *(f"--only {n}" for n in args.only or ())])
        command += " --together" if args.together else ""
        console.print(f"failed: {violation}\nrepeat with: {command}", style="red", markup=False)
    return int(bool(violation))


if __name__ == "__main__":
    sys.exit(main())
