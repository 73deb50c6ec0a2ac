"""What a server does with more than it can: half to three times its capacity, at random moments, and nobody comes again.

    python -m benchmarks.overload --engine fake --json FILE --svg FILE

Capacity is what a closed loop gets done. Then the same jobs come as an open loop (Poisson), each load for `--seconds`, all
loads in turn and that `--repeats` times, at other moments each time: once with time enough for every job, and once where every second job must be done
within three quarters of the longest wait. Latency counts from the moment that a job was due. The client is this process,
on the same cores as the server, and sends every job once. Exit code 1: a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks.measure import Row, machine, print_table, write_json
from benchmarks.transport import cpu_s, serving
from gramophone.recipe import RecipeOverrides
from gramophone_client.bench.arrivals import ClosedLoop, LoadProfile, OpenLoop
from gramophone_client.bench.display import live_display
from gramophone_client.bench.histogram import Histogram
from gramophone_client.bench.html.charts import Axis, Panel, Series, line_chart, sheet
from gramophone_client.bench.measure import Tally
from gramophone_client.bench.metrics import format_number
from gramophone_client.bench.pictures import synthetic
from gramophone_client.bench.report import Step
from gramophone_client.bench.run import Bench, Pictures, Plan
from gramophone_client.bench.workload import JobKind
from gramophone_client.client import GramophoneClient

SIZE = 64  # pixels
RUNNING, QUEUED = 4, 16  # jobs that the server may work on, and that may wait
PLACES = RUNNING + QUEUED
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of the capacity
WARM_UP_S = 2.0
PATIENT_S = 60.0  # a deadline that nothing here comes near
HURRY = 0.75  # of the longest wait: the deadline of those who hurry
REFUSALS = ("QUEUE_FULL", "DEADLINE_UNATTAINABLE")
MISSED = "DEADLINE_EXCEEDED"

LEAST_GOODPUT = 0.9  # of the most, at the highest load
LONGEST_WAIT = 1.25  # times what all places take at capacity: chance, and a client on the same cores
LONGEST_OVERTAKEN = 2.0  # the same where half are in a hurry: they go first, so each place may be overtaken once
REFUSAL_MS = 50.0  # p99, at a client beside the server
REFUSAL_CPU_MS = 1.0  # of the server
MOST_MISSED = 0.01  # of the accepted jobs


class Profile(NamedTuple):
    """An engine's jobs and the flags of its server."""

    iterations: int
    flags: tuple[str, ...]


# 16 iterations of 5 ms, four jobs at a time: 50 jobs/s, of which a client on the same two cores can send three times more.
# At 64 px the real network does 40 to 60 iterations a second on those.
PROFILES = {"fake": Profile(16, ("--engine", "fake", "--iter-ms", "5")), "vgg": Profile(4, ())}


@dataclass
class Outcome:
    """What became of one load, over all of its turns."""

    factor: float  # of the capacity
    offered: float = 0.0  # jobs/s
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0  # of whole steps, to which the rest belongs
    refused: int = 0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    def add(self, step: Step, server_cpu_s: float, seconds: float) -> None:
        """One turn more."""
        self.tally.merge(step.tally)
        self.seconds += seconds
        self.refused += sum(second.get(reason, 0) for second in step.timeline for reason in REFUSALS)
        self.server_cpu_s += server_cpu_s
        self.client_cpu_s += step.client_cpu * seconds

    @property
    def sent(self) -> float:
        """Jobs/s that were sent, which chance makes more or less than those that were offered."""
        return self.tally.due / self.tally.seconds if self.tally.seconds else 0.0

    @property
    def goodput(self) -> float:
        """Jobs/s that were done."""
        return self.tally.jobs_per_s

    @property
    def missed(self) -> int:
        """Jobs that were accepted, as far as their callers know, and not done in time."""
        return self.tally.statuses[MISSED]

    @property
    def untyped(self) -> int:
        """Jobs that failed without one of the reasons that an overloaded server gives."""
        return self.tally.failed - self.missed - sum(self.tally.statuses[reason] for reason in REFUSALS)

    @property
    def refusal_s(self) -> Histogram:
        """How long it took to know of a refusal."""
        all_of_them = Histogram()
        for reason in REFUSALS:
            all_of_them.merge(self.tally.failed_s.get(reason, Histogram()))
        return all_of_them

    def result_s(self, share: float) -> float:
        """A quantile of the latency of those that were done."""
        return self.tally.result_s.quantile(share) or 0.0

    def row(self) -> Row:
        """As a line of the table."""
        refusal_s, statuses = self.refusal_s, self.tally.statuses
        return {
            "load": f"{self.factor:g}x", "sent per s": self.sent, "done per s": self.goodput,
            "p50 s": self.result_s(0.5), "p95 s": self.result_s(0.95), "p99 s": self.result_s(0.99),
            "missed": self.missed, "full": statuses[REFUSALS[0]], "too late": statuses[REFUSALS[1]],
            "refusal p50 ms": 1000 * (refusal_s.quantile(0.5) or 0.0),
            "refusal p99 ms": 1000 * (refusal_s.quantile(0.99) or 0.0),
            "server cpu %": 100 * self.server_cpu_s / self.seconds,
            "client cpu %": 100 * self.client_cpu_s / self.seconds,
        }  # fmt: skip


class Verdict(NamedTuple):
    """A goal and what was measured."""

    goal: str
    measured: str
    met: bool


def main() -> None:
    """Measures, prints, and judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=PROFILES, default="fake")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load in each turn")
    parser.add_argument("--repeats", type=int, default=2, help="turns")
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--svg", type=Path, help="where to draw the curve")
    arguments = parser.parse_args()
    profile = PROFILES[arguments.engine]
    flags = (*profile.flags, "--max-running", str(RUNNING), "--max-queued", str(QUEUED))
    gc.freeze()  # or collecting what was imported would hold up the sender for 100 ms at a time
    with serving(flags) as (address, pid):
        measuring = measured(address, pid, profile, arguments.seconds, arguments.repeats)
        capacity, patient, hurried = asyncio.run(measuring)
    title = f"overload, engine: {arguments.engine}, {SIZE} px, {profile.iterations} iterations, "
    title += f"{RUNNING} run and {QUEUED} wait, capacity {format_number(capacity)} jobs/s"
    series = {"time enough": patient, "half of them in a hurry": hurried}
    print(f"{title}\n{machine()}")
    for name, outcomes in series.items():
        print_table(name, [outcome.row() for outcome in outcomes])
    verdicts = judged(capacity, patient, hurried, sleeps=arguments.engine == "fake")
    print_table("goals", [{**verdict._asdict(), "met": "yes" if verdict.met else "NO"} for verdict in verdicts])
    rows = [{"jobs": name, **outcome.row()} for name, outcomes in series.items() for outcome in outcomes]
    write_json(arguments.json, [{"capacity": capacity}, *rows, *(verdict._asdict() for verdict in verdicts)])
    if arguments.svg:
        arguments.svg.write_text(drawn(title, capacity, patient))
    sys.exit(not all(verdict.met for verdict in verdicts))


async def measured(
    address: str, pid: int, profile: Profile, seconds: float, repeats: int
) -> tuple[float, list[Outcome], list[Outcome]]:
    """The capacity in jobs/s, and what became of each load, without and with jobs that hurry."""
    overrides = RecipeOverrides(size=SIZE, iterations=profile.iterations, smallest_size=0)
    patient = JobKind(name="patient", frames=False, deadline_s=PATIENT_S, overrides=overrides)
    async with GramophoneClient(address, retries=False) as client:
        step = partial(run_step, client, pid, seconds)
        busy = ClosedLoop(2 * RUNNING)  # as many as are never refused
        await step(busy, [patient])  # kernels are chosen, targets made, widths tried
        capacity = (await step(busy, [patient]))[0].tally.jobs_per_s
        if not capacity:
            sys.exit(f"not one job was done in {seconds:g} s; allow more --seconds")
        hurried = JobKind(name="hurried", frames=False, deadline_s=HURRY * PLACES / capacity, overrides=overrides)
        series = [([patient], of_loads(capacity)), ([patient, hurried], of_loads(capacity))]
        for turn in range(repeats):
            for mix, outcomes in series:
                for outcome in outcomes:
                    outcome.add(*await step(OpenLoop(outcome.offered), mix, seed=turn))
    return capacity, series[0][1], series[1][1]


def of_loads(capacity: float) -> list[Outcome]:
    """Nothing yet, for each load."""
    return [Outcome(factor, factor * capacity) for factor in FACTORS]


async def run_step(
    client: GramophoneClient, pid: int, seconds: float, load: LoadProfile, mix: Sequence[JobKind], seed: int = 0
) -> tuple[Step, float, float]:
    """A step of so many seconds after the warm-up, the server's CPU seconds in it, and how long it took."""
    pictures = Pictures(synthetic(0, SIZE), (synthetic(1, SIZE, cells=24),))
    duration_s = WARM_UP_S + seconds  # a window that is longer than what is left never ends
    plan = Plan(
        loads=[load],
        workload=mix,
        pictures=lambda _: pictures,
        seed=seed,
        warm_up_s=WARM_UP_S,
        window_s=duration_s,
        duration_s=duration_s,
    )
    bench, before = Bench(plan), cpu_s(pid)
    async with live_display(bench, Console(stderr=True)):
        await bench.run(client)
    return bench.steps[0], cpu_s(pid) - before, duration_s


def judged(capacity: float, patient: Sequence[Outcome], hurried: Sequence[Outcome], *, sleeps: bool) -> list[Verdict]:
    """The goals. An engine that ``sleeps`` leaves the CPU to everything else, so what a refusal costs can be seen."""
    last, peak = patient[-1], max(outcome.goodput for outcome in patient)
    all_s = PLACES / capacity
    worst_s, overtaken_s = (max(outcome.result_s(0.95) for outcome in outcomes) for outcomes in (patient, hurried))
    bound_s, overtaken_bound_s = LONGEST_WAIT * all_s, LONGEST_OVERTAKEN * all_s
    slowest_ms = 1000 * max(outcome.refusal_s.quantile(0.99) or 0.0 for outcome in (*patient, *hurried))
    untyped = sum(outcome.untyped for outcome in (*patient, *hurried))
    accepted = sum(outcome.tally.ok + outcome.missed for outcome in (*patient, *hurried))
    missed = sum(outcome.missed for outcome in (*patient, *hurried))
    share = last.goodput / peak if peak else 0.0
    verdicts = [
        Verdict(f"goodput at {last.factor:g}x at least {LEAST_GOODPUT:.0%} of the most", f"{share:.0%}", share >= LEAST_GOODPUT),
        Verdict(f"{last.factor:g}x is more than the server takes", f"{last.refused} refused", last.refused > 0),
        Verdict(f"p95 of a result at most {bound_s:.3g} s, {LONGEST_WAIT:g} times all places' work", f"{worst_s:.3g} s", worst_s <= bound_s),
        Verdict(f"p95 with half in a hurry, who go first, at most {overtaken_bound_s:.3g} s, {LONGEST_OVERTAKEN:g} times", f"{overtaken_s:.3g} s", overtaken_s <= overtaken_bound_s),
        Verdict(f"p99 of a refusal under {REFUSAL_MS:g} ms", f"{slowest_ms:.3g} ms", slowest_ms < REFUSAL_MS),
        Verdict("every refusal has its reason", f"{untyped} without", untyped == 0),
        Verdict(f"at most {MOST_MISSED:.0%} of the accepted jobs miss their deadline", f"{missed} of {accepted}", missed <= MOST_MISSED * accepted),
    ]  # fmt: skip
    if sleeps:
        cost_ms = refusal_cpu_ms(patient)
        goal, told = f"a refusal takes under {REFUSAL_CPU_MS:g} ms of the server's CPU", "no more refusals: not known"
        is_met = cost_ms is not None and cost_ms < REFUSAL_CPU_MS
        verdicts.append(Verdict(goal, told if cost_ms is None else f"{cost_ms:.2f} ms", is_met))
    return verdicts


def refusal_cpu_ms(outcomes: Sequence[Outcome]) -> float | None:
    """The server's CPU for each refusal more, between the least and the most of the loads that keep the engine busy. None
    if there are no more of them, which tells nothing."""
    low, high = next(outcome for outcome in outcomes if outcome.factor > 1), outcomes[-1]
    more = high.refused / high.seconds - low.refused / low.seconds
    return 1000 * (high.server_cpu_s / high.seconds - low.server_cpu_s / low.seconds) / more if more > 0 else None


def drawn(title: str, capacity: float, outcomes: Sequence[Outcome]) -> str:
    """Throughput and latency against the load, as SVG."""
    ends = 0.0, outcomes[-1].factor
    ticks = [(0.0, "0"), *((outcome.factor, f"{outcome.factor:g}x") for outcome in outcomes)]
    axis = Axis("offered load, of the capacity", ticks)
    done = Series("done", "c1", [(o.factor, o.goodput) for o in outcomes])
    refused = Series("refused", "c2", [(o.factor, o.refused / o.seconds) for o in outcomes])
    offered = Series("offered", "quiet", [(f, f * capacity) for f in ends], is_dashed=True, has_dots=False)
    bound_s = PLACES / capacity
    full = Series(f"all {PLACES} places, one after another", "quiet", [(f, bound_s) for f in ends], True, False)
    quantiles = [
        Series(name, colour, [(o.factor, o.result_s(share)) for o in outcomes])
        for name, colour, share in (("p50", "o2", 0.5), ("p95", "o3", 0.95), ("p99", "o5", 0.99))
    ]
    rates, times = [offered, refused, done], [full, *quantiles]
    panels = [
        Panel("Jobs per second", rates, line_chart(axis, Axis("jobs/s"), rates)),
        Panel("Seconds to the result of an accepted job", times, line_chart(axis, Axis("s"), times)),
    ]
    return sheet(title, panels)


if __name__ == "__main__":
    main()
