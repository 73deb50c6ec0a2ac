"""An hour of mixed jobs with deadlines, in simulated time: the real scheduler on its real compute thread, with an
engine that only moves a clock.

Jobs arrive by chance from several clients, in sizes from 16 to 1024 px, some with a time budget, some cancelled. The
engine's iteration has a fixed cost, a cost for each pixel and noise, and takes twice as long in a slow phase. First all
jobs run without deadlines: when each ends then is the truth. Then they run again, half of them with a deadline that is
0.5 to 2 times as long as that, and the scheduler accepts or refuses each. Whoever is refused although its deadline is
not before the truth is accepted in another run: if it is in time then, and no deadline that was accepted before it is
broken, the refusal was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server.config import Limits
from gramophone_server.domain.events import Event, Finished
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import Cancelled, DeadlineUnattainable, GramophoneError, QueueFull
from gramophone_server.scheduling.scheduler import Scheduler
from tests.support.clock import ManualClock
from tests.support.engines import FakeBatch, FakeBeginning, FakeEngine

SQUARE = torch.zeros((3, 64, 64), dtype=torch.uint8)
# From a job's end to its client: encoding and sending.
DELIVERY_S, DELIVERY_PIXEL_S = 0.005, 2e-8
TRANSIT_S = 0.003  # not measured by the server
PICTURE = torch.zeros((1, 1, 3), dtype=torch.uint8)
BORDER = 0.05  # iterations are noisy: of 100, 1.5 %
SIDES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Device:
    """What an engine costs, in seconds."""

    fixed_s: float = 0.002  # an iteration
    pixel_s: float = 2e-8  # each pixel of it
    noise: float = 0.15  # standard deviation of the logarithm, of one iteration
    first_s: float = 0.1  # the first iteration of each shape and width, in addition
    join_s: float = 0.01
    slow_from_s: float = math.inf
    slow_until_s: float = math.inf
    slowness: float = 2.0

    def speed(self, now: float) -> float:
        """By how much everything takes longer."""
        return self.slowness if self.slow_from_s <= now < self.slow_until_s else 1.0


@dataclass
class Visit:
    """A job of a client, and what became of it."""

    at: float
    side: int
    iterations: int
    scales: bool
    time_budget: float
    cancelled_after: float  # seconds
    factor: float  # of the truth; inf: no deadline
    client: str
    truth_s: float = math.nan  # seconds to its end without any deadlines
    deadline_s: float = math.inf
    is_forced: bool = False  # it is accepted without being asked for its deadline
    outcome: str = ""  # done, refused, full, cancelled
    took_s: float = math.nan
    is_probe: bool = False  # it was let through although it should be late
    for_promise: bool = False  # it was refused because of the deadline of another job

    @property
    def counts(self) -> bool:
        """Whether it had a deadline."""
        return self.deadline_s < math.inf

    @property
    def in_time(self) -> bool:
        """Whether it ended before its deadline."""
        return self.outcome == "done" and self.took_s <= self.deadline_s

    def cause(self, device: Device) -> str:
        """What was special about one that was judged wrongly."""
        took_s = self.took_s if self.outcome == "done" else self.truth_s
        if self.is_probe:
            return "let through, to see"
        if any(self.at - 5 <= at <= self.at + took_s for at in (device.slow_from_s, device.slow_until_s)):
            return "the device's speed changed"
        if self.for_promise:
            return "promises to others"
        if self.time_budget:
            return "time budget"
        if abs(took_s / self.deadline_s - 1) <= BORDER:
            return f"within {BORDER:.0%} of the truth"
        return "several scales" if self.scales else "other jobs came, or one size was new"


@dataclass(frozen=True)
class Hour:
    """A plan of visits."""

    seconds: float = 3600.0
    warm_up_s: float = 60.0  # in which nothing was measured yet
    load: float = 0.4  # of the device
    with_deadline: float = 0.5
    with_budget: float = 0.1
    cancelled: float = 0.05
    clients: int = 6
    max_running: int = 16
    device: Device = field(default_factory=Device)

    def visits(self, seed: int) -> list[Visit]:
        """The jobs of an hour, by arrival."""
        chance = random.Random(seed)
        mean_s = sum(self._work_s(side, 110.0) for side in SIDES) / len(SIDES)
        visits = []
        at = 0.0
        while (at := at + chance.expovariate(self.load / mean_s)) < self.seconds:
            side = chance.choice(SIDES)
            iterations = round(math.exp(chance.uniform(math.log(30), math.log(300))))
            own_s = self._work_s(side, iterations)
            visits.append(
                Visit(
                    at,
                    side,
                    iterations,
                    scales=chance.random() < 0.3 and side >= 64,
                    time_budget=own_s * chance.uniform(0.3, 3) if chance.random() < self.with_budget else 0.0,
                    cancelled_after=own_s * chance.uniform(0.1, 3) if chance.random() < self.cancelled else math.inf,
                    factor=2 ** chance.uniform(-1, 1) if chance.random() < self.with_deadline else math.inf,
                    client=f"client {chance.randrange(self.clients)}",
                )
            )
        return visits

    def _work_s(self, side: int, iterations: float) -> float:
        return self.device.join_s + iterations * (self.device.fixed_s + self.device.pixel_s * side * side)


class Observer:
    """The job of a visit, as the scheduler sees it."""

    accepts_light_checkpoint = True

    def __init__(self, visit: Visit, clock: ManualClock, on_delivery: Callable[[str, int, float], None]) -> None:
        self.visit, self._clock, self._on_delivery = visit, clock, on_delivery
        self.cancelled = False

    @property
    def ended(self) -> bool:
        return bool(self.visit.outcome)

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        return None

    def collect_frame_requests(self, iteration: int, now: float) -> set[object]:
        return set()

    def collect_checkpoint_requests(self, now: float, *, light: bool) -> set[object]:
        return set()

    def started(self) -> None:
        pass

    def publish(self, event: Event, watchers: set[object] | None = None) -> None:
        if isinstance(event, Finished) and not self.ended:
            self.end("done")
            self._on_delivery("", self.visit.side**2, DELIVERY_S + DELIVERY_PIXEL_S * self.visit.side**2)

    def fail(self, error: GramophoneError) -> None:
        if not self.ended:
            self.end("cancelled" if isinstance(error, Cancelled) else type(error).__name__)

    def end(self, outcome: str) -> None:
        visit = self.visit
        delivery_s = DELIVERY_S + DELIVERY_PIXEL_S * visit.side**2 + TRANSIT_S if outcome == "done" else 0.0
        visit.outcome, visit.took_s = outcome, self._clock.now + delivery_s - visit.at


class SimulatedEngine(FakeEngine):
    """Moves the clock by the cost of what it does, and calls `on_time` after that, on the compute thread."""

    def __init__(self, device: Device, seed: int, clock: ManualClock, on_time: Callable[[], None]) -> None:
        super().__init__(clock=clock)
        self.device, self.on_time = device, on_time
        self._chance = random.Random(seed)
        self._seen: set[tuple[Shape, int]] = set()

    def spend(self, seconds: float) -> None:
        self.clock.advance(seconds * self.device.speed(self.clock.now))
        self.on_time()

    def batch(self, shape: Shape, slots: int) -> SimulatedBatch:
        return SimulatedBatch(self, shape, slots)

    def iterate(self, shape: Shape, slots: int, iterations: int) -> None:
        device = self.device
        seconds = device.fixed_s + device.pixel_s * shape.width * shape.height * slots
        spent = sum(seconds * math.exp(self._chance.gauss(0, device.noise)) for _ in range(iterations))
        if (shape, slots) not in self._seen:
            self._seen.add((shape, slots))
            spent += device.first_s
        self.spend(spent)


class SimulatedBatch(FakeBatch):
    engine: SimulatedEngine

    def join(self, state: JobState, beginning: FakeBeginning | None = None) -> int:
        slot = super().join(state, beginning)
        self.engine.spend(self.engine.device.join_s)
        return slot

    def snapshot(self, slot: int) -> Callable[[], Tensor]:
        return lambda: PICTURE

    def _tensors(self, state: JobState) -> dict[str, Tensor]:
        return {}

    def advance(self, iterations: int = 1) -> Mapping[int, Report]:
        n = min(iterations, *(state.iterations_left for state in self.states.values()))
        self.engine.iterate(self.shape, self.slots, n)
        self.engine.under_way.set()
        return super().advance(iterations)


def run(hour: Hour, visits: list[Visit], seed: int) -> Scheduler:
    """Runs all visits, and fills in their outcomes. Visits with a `deadline_s` have one."""
    return asyncio.run(_run(hour, visits, seed))


async def _run(hour: Hour, visits: list[Visit], seed: int) -> Scheduler:
    clock = ManualClock()
    coming = sorted(visits, key=lambda visit: visit.at)
    cancelling: list[tuple[float, Observer]] = []
    busy = threading.Lock()

    def arrive() -> None:
        """All that is due by now. Called on the compute thread, or on this one while that has nothing to do."""
        with busy:
            while coming and coming[0].at <= clock.now:
                admit(coming.pop(0))
            while cancelling and cancelling[0][0] <= clock.now:
                _, observer = cancelling.pop(0)
                if not observer.ended:
                    observer.cancelled = True
                    observer.end("cancelled")
                    scheduler.withdraw(observer)

    def admit(visit: Visit) -> None:
        recipe = Recipe(
            size=visit.side,
            smallest_size=max(16, visit.side // 4) if visit.scales else 0,
            iterations=visit.iterations,
            coarse_iterations=max(1, visit.iterations // 3),
            time_budget=visit.time_budget,
        )
        job = StyleJob(recipe=recipe, content=SQUARE, styles=(), style_weights=(), start=None, seed=1)
        state = JobState(job)
        observer = Observer(visit, clock, scheduler.record_delivery)
        try:
            reservation = scheduler.reserve(visit.client)
        except QueueFull:
            return observer.end("full")
        left_s, probes = visit.at + visit.deadline_s - clock.now, scheduler.deadline_probes
        try:
            scheduler.require_time(reservation, state, math.inf if visit.is_forced else left_s, owner=visit.client)
        except DeadlineUnattainable as error:
            visit.for_promise = "promised" in str(error)
            observer.end("refused")
        else:
            visit.is_probe = scheduler.deadline_probes > probes
            scheduler.submit(
                reservation, state, observer, visit.at + visit.deadline_s if visit.counts else None, visit.client
            )
            if visit.cancelled_after < math.inf:
                cancelling.append((visit.at + visit.cancelled_after, observer))
                cancelling.sort(key=lambda pair: pair[0])
        scheduler.release(reservation)

    engine = SimulatedEngine(hour.device, seed, clock, arrive)
    limits = Limits(max_running=hour.max_running, max_queued=64)
    scheduler = Scheduler(lambda: engine, limits, clock=clock)
    scheduler.start()
    await scheduler.ready()
    while coming or scheduler.running or scheduler.waiting or scheduler.step_s:
        if not (scheduler.running or scheduler.waiting or scheduler.step_s):  # idle until the next one comes
            clock.now = max(clock.now, coming[0].at)
            arrive()
        await asyncio.sleep(0.0002)
    scheduler.stop()
    await scheduler.ended()
    return scheduler


@dataclass
class Verdict:
    """How the deadlines of some hours were judged."""

    deadlines: int = 0
    possible: int = 0  # not before the truth
    refused: int = 0  # of those
    wrongly_refused: int = 0  # of those
    accepted: int = 0
    late: int = 0  # of those
    probes: int = 0
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)  # of what was judged wrongly: how, and why

    def __str__(self) -> str:
        wrong, late = self.wrongly_refused / max(1, self.possible), self.late / max(1, self.accepted)
        return (
            f"{self.deadlines} deadlines: {self.wrongly_refused} of {self.possible} that could be kept were refused, "
            f"{wrong:.1%} (and {self.refused - self.wrongly_refused} that would have broken another); "
            f"{self.late} of {self.accepted} accepted ones were late, {late:.1%}; {self.probes} probes"
        )

    def add(self, hour: Hour, seed: int) -> None:
        """Runs an hour without and then with deadlines. Those of the first `hour.warm_up_s` are not judged."""
        visits = hour.visits(seed)
        run(hour, visits, seed)
        for visit in visits:
            if visit.outcome == "done":
                visit.truth_s, visit.deadline_s = visit.took_s, visit.took_s * visit.factor
        judged = _again(visits)
        self.probes += run(hour, judged, seed).deadline_probes
        for index, visit in enumerate(judged):
            if visit.counts and visit.at >= hour.warm_up_s:
                self.deadlines += 1
                self.possible += visit.factor >= 1
                self.accepted += visit.outcome == "done"
                if visit.outcome == "done" and not visit.in_time:
                    self.late += 1
                    self.causes["late", visit.cause(hour.device)] += 1
                if visit.factor >= 1 and visit.outcome == "refused":
                    self.refused += 1
                    if _was_wrong(hour, seed, judged, index):
                        self.wrongly_refused += 1
                        self.causes["refused wrongly", visit.cause(hour.device)] += 1


def _again(visits: list[Visit]) -> list[Visit]:
    return [replace(visit, outcome="", took_s=math.nan) for visit in visits]


def _was_wrong(hour: Hour, seed: int, judged: list[Visit], index: int) -> bool:
    """Whether a refused visit could have been accepted."""
    refused = judged[index]
    promised = {
        other: visit
        for other, visit in enumerate(judged)
        if visit.counts and visit.in_time and visit.at <= refused.at < visit.at + visit.took_s
    }
    ends_at = max([refused.at + refused.deadline_s, *(visit.at + visit.deadline_s for visit in promised.values())])
    trial = _again([visit for visit in judged if visit.at <= ends_at])
    trial[index].is_forced = True
    run(hour, trial, seed)
    return trial[index].in_time and all(trial[other].in_time for other in promised)


def main() -> None:
    """Simulates some hours, and prints what was judged wrongly, by cause."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.mixed_hour", description=__doc__)
    parser.add_argument("--hours", type=int, default=1)
    parser.add_argument("--load", type=float, default=Hour.load, help="part of the device that the jobs need")
    arguments = parser.parse_args()
    total = Verdict()
    for seed in range(arguments.hours):
        device = Device(slow_from_s=1200.0, slow_until_s=1440.0)
        total.add(Hour(load=arguments.load, device=device), seed)
        print(total, flush=True)
    for (how, why), number in sorted(total.causes.items()):
        print(f"{number:4d} {how}: {why}")


if __name__ == "__main__":
    main()
