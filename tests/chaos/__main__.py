"""The campaign: `python -m tests.chaos --seed N --minutes M --only NAME`.

Plays every fault in turn, round after round in an order of the seed's, while others use the server and its health is asked
every 50 ms. After each fault nothing may be left of it, and from round to round the server's memory stays flat.
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

from tests.chaos.faults import FAULTS
from tests.chaos.stage import Clock, Stage, faulty_server
from tests.chaos.watch import Broken, Health, Usage
from tests.soak.trend import slope

ACT_WITHIN_S = 240.0  # the longest takes 10 on a machine that has nothing else to do
MOST_GROWTH_MIB = 16.0  # of the server over all rounds, by a line through them; its allocators' noise is 5
FEWEST_ROUNDS = 4  # that tell a growth


@dataclass
class Row:
    """What became of one fault's jobs."""

    rounds: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Rounds of faults on one server."""

    def __init__(self, names: Sequence[str], seed: int, say: Console, *, together: bool = False) -> None:
        """``together``: those that spare bystanders are played at the same time."""
        self.seed, self.say = seed, say
        calm = [name for name in names if together and not FAULTS[name].bystanders]
        self.acts = [[name] for name in names if name not in calm] + ([calm] if calm else [])
        self.rows = {" + ".join(act): Row() for act in self.acts}
        self.usages: list[Usage] = []  # of the server, after each round
        self.health: Health | None = None

    async def run(self, seconds: float) -> None:
        """Whole rounds until the time is over, one at least. Raises `Broken`."""
        end = time.monotonic() + seconds
        async with self._stage() as stage:
            while not self.usages or time.monotonic() < end:
                for act in stage.chance.sample(self.acts, len(self.acts)):
                    await self._play(stage, act)
                self.usages.append(now := Usage.of(stage.server.pid))
                self.say.print(f"round {len(self.usages)}: {now.resident_mib:.0f} MiB")
        self.check_memory()

    def check_memory(self) -> None:
        """Raises `Broken` if the server grew. Rounds that are too few to tell are not judged, and that is said."""
        rounds = [(float(at), usage.resident_mib) for at, usage in enumerate(self.usages)]
        if len(rounds) < FEWEST_ROUNDS:
            self.say.print(f"{len(rounds)} rounds are too few to judge memory: that takes {FEWEST_ROUNDS}")
            return
        growth = slope(rounds) * len(rounds)
        if growth > MOST_GROWTH_MIB:
            raise Broken(f"the server grew by {growth:.0f} MiB in {len(rounds)} rounds: {[m for _, m in rounds]}")
        self.say.print(
            f"memory: {growth:+.0f} MiB in {len(rounds)} rounds, by a line; at most {MOST_GROWTH_MIB:g} are allowed"
        )

    @asynccontextmanager
    async def _stage(self) -> AsyncIterator[Stage]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            clock = Clock(folder)
            with faulty_server("--list-jobs", cwd=folder, **clock.settings) as server:
                metrics_url = server.line("metrics on ")
                server.line("ready in ")
                with Health(server.address, metrics_url) as self.health:
                    stage = Stage(server, metrics_url, clock, folder, random.Random(self.seed))
                    await stage.warm_up()
                    yield stage

    async def _play(self, stage: Stage, act: Sequence[str]) -> None:
        name, began = " + ".join(act), time.monotonic()
        row, allowed = self.rows[name], tuple(kind for each in act for kind in FAULTS[each].bystanders)
        stage.ends.clear()
        try:
            async with asyncio.timeout(ACT_WITHIN_S):
                async with stage.bystanders(allowed), asyncio.TaskGroup() as group:
                    for each in act:
                        group.create_task(FAULTS[each].play(stage))
                await stage.residue.settled()
            assert self.health is not None
            self.health.check()
        except Exception as error:
            raise Broken(f"{name}: {reason(error)}") from error
        took_s = time.monotonic() - began
        row.rounds, row.seconds = row.rounds + 1, row.seconds + took_s
        row.ends += stage.ends
        self.say.print(f"  {name}: {took_s:.1f} s, {told(stage.ends)}")

    def table(self) -> Table:
        """What was played, and how its jobs ended."""
        table = Table("fault", "rounds", "s", "jobs", "how they ended")
        for name, row in self.rows.items():
            table.add_row(name, str(row.rounds), f"{row.seconds:.0f}", str(row.ends.total()), told(row.ends))
        return table


def told(ends: Counter[str]) -> str:
    """How jobs ended, the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in ends.most_common())


def reason(error: BaseException) -> str:
    """The first cause, of a group too."""
    while isinstance(error, BaseExceptionGroup):
        error = next((e for e in error.exceptions if isinstance(e, Broken)), error.exceptions[0])
    if isinstance(error, TimeoutError):
        return f"it took more than {ACT_WITHIN_S:g} s"
    return str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit code is 1 when a rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=5.0, help="of whole rounds; 0: one round (default 5)")
    parser.add_argument("--only", action="append", choices=FAULTS, help="this fault; may be given several times")
    parser.add_argument("--together", action="store_true", help="play what spares bystanders at the same time")
    args = parser.parse_args(argv)
    say = Console(highlight=False, soft_wrap=True)
    campaign = Campaign(args.only or list(FAULTS), args.seed, say, together=args.together)
    say.print(f"seed {args.seed}")
    broken = ""
    try:
        asyncio.run(campaign.run(args.minutes * 60))
    except (Broken, ExceptionGroup) as error:
        broken = reason(error)
    say.print(campaign.table())
    if campaign.health is not None and (took := sorted(campaign.health.latencies_ms)):
        say.print(f"health: {len(took)} answers, p99 {took[int(0.99 * len(took))]:.0f} ms, longest {took[-1]:.0f} ms")
    if broken:
        again = " ".join(["python -m tests.chaos", f"--seed {args.seed}", *(f"--only {n}" for n in args.only or ())])
        again += " --together" if args.together else ""
        say.print(f"broken: {broken}\nagain: {again}", style="red", markup=False)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
