"""A server under overload: half to three times its capacity, at random times, from clients that do not retry.

    python -m benchmarks.overload --engine fake --json FILE --svg FILE

Capacity is the throughput of a closed loop. Then the same jobs arrive as an open loop (Poisson): each load for
`--seconds`, all loads in turn, and that `--repeats` times with other arrival times. This is done once with deadlines
that are long enough for every job, and once where every second job has a deadline of three quarters of the longest
wait. Latency counts from the time at which a job was due. The client is this process, on the same cores as the server.
Exit code 1: a goal was missed.
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
from gramophone_client.async_client import AsyncGramophoneClient
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

SIZE = 64  # pixels
RUNNING, QUEUED = 4, 16  # limits of the server: running and waiting jobs
PLACES = RUNNING + QUEUED
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # of the capacity
WARM_UP_S = 2.0
PATIENT_S = 60.0  # a deadline that no job here can miss
HURRY = 0.75  # the deadline of hurried jobs, as a part of the longest wait
REFUSALS = ("QUEUE_FULL", "DEADLINE_UNATTAINABLE")
MISSED = "DEADLINE_EXCEEDED"

MIN_GOODPUT = 0.9  # at the highest load, as a part of the best
# p95 of a result, in units of the time of RUNNING + QUEUED jobs at capacity; the slack is for chance and for the client
# on the same cores.
MAX_WAIT = 1.25
MAX_OVERTAKEN_WAIT = 2.0  # the same if half of the jobs are hurried: they run first, so each job may be overtaken once
REFUSAL_MS = 50.0  # p99, at a client on the server's machine
REFUSAL_CPU_MS = 1.0  # CPU time of the server per refusal
MAX_MISSED = 0.01  # of the accepted jobs


class Profile(NamedTuple):
    """An engine's jobs and the flags of its server."""

    iterations: int
    flags: tuple[str, ...]


# 16 iterations of 5 ms, four jobs at a time: 50 jobs/s; a client on the same two cores can send three times as many. At
# 64 px the real network does 40 to 60 iterations a second on these cores.
PROFILES = {"fake": Profile(16, ("--engine", "fake", "--iter-ms", "5")), "vgg": Profile(4, ())}


@dataclass
class Outcome:
    """The results of one load, over all turns."""

    factor: float  # of the capacity
    offered: float = 0.0  # jobs/s
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0  # of whole steps, including the warm-up, as are the fields below
    refused: int = 0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    def add(self, step: Step, server_cpu_s: float, seconds: float) -> None:
        """Adds one turn."""
        self.tally.merge(step.tally)
        self.seconds += seconds
        self.refused += sum(second.get(reason, 0) for second in step.timeline for reason in REFUSALS)
        self.server_cpu_s += server_cpu_s
        self.client_cpu_s += step.client_cpu * seconds

    @property
    def sent(self) -> float:
        """Jobs/s that were sent; by chance more or fewer than `offered`."""
        return self.tally.due / self.tally.seconds if self.tally.seconds else 0.0

    @property
    def goodput(self) -> float:
        """Jobs/s that had a result."""
        return self.tally.jobs_per_s

    @property
    def missed(self) -> int:
        """Jobs that were not refused and missed their deadline."""
        return self.tally.statuses[MISSED]

    @property
    def untyped(self) -> int:
        """Jobs that failed with another status than those of an overloaded server."""
        return self.tally.failed - self.missed - sum(self.tally.statuses[reason] for reason in REFUSALS)

    @property
    def refusal_s(self) -> Histogram:
        """The latencies of refusals."""
        merged = Histogram()
        for reason in REFUSALS:
            merged.merge(self.tally.failed_s.get(reason, Histogram()))
        return merged

    def result_s(self, share: float) -> float:
        """A quantile of the latencies of results, in seconds."""
        return self.tally.result_s.quantile(share) or 0.0

    def row(self) -> Row:
        """The row of the table."""
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
    """A goal and its measurement."""

    goal: str
    measured: str
    met: bool


def main() -> None:
    """Measures, prints, and checks the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=PROFILES, default="fake")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each load in each turn")
    parser.add_argument("--repeats", type=int, default=2, help="turns")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--svg", type=Path, help="file for the curves")
    arguments = parser.parse_args()
    profile = PROFILES[arguments.engine]
    flags = (*profile.flags, "--max-running", str(RUNNING), "--max-queued", str(QUEUED))
    gc.freeze()  # otherwise each collection of the imported objects would delay the client by 100 ms
    with serving(flags) as (address, pid):
        measuring = measured(address, pid, profile, arguments.seconds, arguments.repeats)
        capacity, patient, hurried = asyncio.run(measuring)
    title = f"overload, engine: {arguments.engine}, {SIZE} px, {profile.iterations} iterations, "
    title += f"{RUNNING} run and {QUEUED} wait, capacity {format_number(capacity)} jobs/s"
    series = {"long deadlines": patient, "half with short deadlines": hurried}
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
    """The capacity in jobs/s, and the results of each load, without and with hurried jobs."""
    overrides = RecipeOverrides(size=SIZE, iterations=profile.iterations, smallest_size=0)
    patient = JobKind(name="patient", frames=False, deadline_s=PATIENT_S, overrides=overrides)
    async with AsyncGramophoneClient(address, max_retries=0) as client:
        step = partial(run_step, client, pid, seconds)
        busy = ClosedLoop(2 * RUNNING)  # fewer than RUNNING + QUEUED, so none is refused
        await step(busy, [patient])  # warm-up: style targets are cached, batch widths measured
        capacity = (await step(busy, [patient]))[0].tally.jobs_per_s
        if not capacity:
            sys.exit(f"no job was done in {seconds:g} s; allow more --seconds")
        hurried = JobKind(name="hurried", frames=False, deadline_s=HURRY * PLACES / capacity, overrides=overrides)
        series = [([patient], of_loads(capacity)), ([patient, hurried], of_loads(capacity))]
        for turn in range(repeats):
            for mix, outcomes in series:
                for outcome in outcomes:
                    outcome.add(*await step(OpenLoop(outcome.offered), mix, seed=turn))
    return capacity, series[0][1], series[1][1]


def of_loads(capacity: float) -> list[Outcome]:
    """Empty results for each load."""
    return [Outcome(factor, factor * capacity) for factor in FACTORS]


async def run_step(
    client: AsyncGramophoneClient, pid: int, seconds: float, load: LoadProfile, mix: Sequence[JobKind], seed: int = 0
) -> tuple[Step, float, float]:
    """Runs a step: a warm-up, then ``seconds``. Returns it, the server's CPU seconds, and its duration in seconds."""
    pictures = Pictures(synthetic(0, SIZE), (synthetic(1, SIZE, cells=24),))
    duration_s = WARM_UP_S + seconds
    plan = Plan(
        loads=[load],
        workload=mix,
        pictures=lambda _: pictures,
        seed=seed,
        warm_up_s=WARM_UP_S,
        window_s=duration_s,  # longer than the time after the warm-up, so no window ends
        duration_s=duration_s,
    )
    bench, before = Bench(plan), cpu_s(pid)
    async with live_display(bench, Console(stderr=True)):
        await bench.run(client)
    return bench.steps[0], cpu_s(pid) - before, duration_s


def judged(capacity: float, patient: Sequence[Outcome], hurried: Sequence[Outcome], *, sleeps: bool) -> list[Verdict]:
    """The goals and their measurements. With an engine that ``sleeps``, the CPU time of a refusal can be measured,
    too."""
    last, peak = patient[-1], max(outcome.goodput for outcome in patient)
    all_s = PLACES / capacity
    worst_s, overtaken_s = (max(outcome.result_s(0.95) for outcome in outcomes) for outcomes in (patient, hurried))
    bound_s, overtaken_bound_s = MAX_WAIT * all_s, MAX_OVERTAKEN_WAIT * all_s
    slowest_ms = 1000 * max(outcome.refusal_s.quantile(0.99) or 0.0 for outcome in (*patient, *hurried))
    untyped = sum(outcome.untyped for outcome in (*patient, *hurried))
    accepted = sum(outcome.tally.ok + outcome.missed for outcome in (*patient, *hurried))
    missed = sum(outcome.missed for outcome in (*patient, *hurried))
    share = last.goodput / peak if peak else 0.0
    in_time = missed <= MAX_MISSED * accepted
    verdicts = [
        Verdict(
            f"goodput at {last.factor:g}x at least {MIN_GOODPUT:.0%} of the best",
            f"{share:.0%}",
            share >= MIN_GOODPUT,
        ),
        Verdict(f"{last.factor:g}x is more than the server accepts", f"{last.refused} refused", last.refused > 0),
        Verdict(
            f"p95 of a result at most {bound_s:.3g} s, {MAX_WAIT:g} times the time of {PLACES} jobs",
            f"{worst_s:.3g} s",
            worst_s <= bound_s,
        ),
        Verdict(
            f"p95 with half of the jobs in a hurry, which run first, at most {overtaken_bound_s:.3g} s, "
            f"{MAX_OVERTAKEN_WAIT:g} times",
            f"{overtaken_s:.3g} s",
            overtaken_s <= overtaken_bound_s,
        ),
        Verdict(f"p99 of a refusal under {REFUSAL_MS:g} ms", f"{slowest_ms:.3g} ms", slowest_ms < REFUSAL_MS),
        Verdict("every refusal has its reason", f"{untyped} without", untyped == 0),
        Verdict(
            f"at most {MAX_MISSED:.0%} of the accepted jobs miss their deadline", f"{missed} of {accepted}", in_time
        ),
    ]
    if sleeps:
        cost_ms = refusal_cpu_ms(patient)
        goal = f"a refusal takes under {REFUSAL_CPU_MS:g} ms of the server's CPU"
        measured = "unknown: no more refusals at a higher load" if cost_ms is None else f"{cost_ms:.2f} ms"
        verdicts.append(Verdict(goal, measured, cost_ms is not None and cost_ms < REFUSAL_CPU_MS))
    return verdicts


def refusal_cpu_ms(outcomes: Sequence[Outcome]) -> float | None:
    """Milliseconds of the server's CPU for each additional refusal, from the least to the highest load that keeps the
    engine busy. None if the higher load has no more refusals."""
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
    full = Series(f"{PLACES} jobs at capacity", "quiet", [(f, bound_s) for f in ends], True, False)
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
