"""Which jobs share a batch: lanes, each a batch of the engine with the tasks in its slots.

Jobs of one shape share lanes. A lane is as wide as pays by what was measured, and lanes of a shape are laid anew when
jobs come and go. Belongs to the compute thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.domain.job import Report
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.scheduling.throughput import ThroughputModel

__all__ = ["BatchPool", "Iterated", "PooledBatch", "Seat", "widths"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """A job among those that are worked on."""

    work: JobState
    lane: PooledBatch | None = None  # None: it waits for one
    slot: int = -1
    used_s: float = 0.0  # of the device: its beginnings, and its part of what its batches took
    apart: bool = (
        True  # it has not competed with the others lately, so it has neither an advantage over them nor a debt
    )


@dataclass(eq=False)
class PooledBatch:
    """A batch and the jobs in it, by slot."""

    batch: Batch
    seats: dict[int, Seat] = field(default_factory=dict)
    stands_since: float = field(default_factory=lambda: time.monotonic())

    @property
    def shape(self) -> Shape:
        """Of everybody in it."""
        return self.batch.shape

    @property
    def slots(self) -> int:
        """Its width."""
        return self.batch.slots

    @property
    def has_room(self) -> bool:
        """A slot is free."""
        return len(self.seats) < self.slots


# Reports iterations of a batch: its shape, its width in slots, its jobs, iterations of each job, seconds in total.
Iterated = Callable[[Shape, int, int, int, float], None]


class BatchPool:
    """The lanes of one engine. `iterated` hears of what was done in them, on the compute thread."""

    def __init__(self, engine: BatchEngine, pace: ThroughputModel, iterated: Iterated = lambda *_: None) -> None:
        self._engine, self._pace, self._hear = engine, pace, iterated
        self._lanes: list[PooledBatch] = []
        self._most: dict[Shape, int] = {}  # that memory allowed; forgotten when nobody is left
        self._full = False  # memory ended in a lane of one: until a lane is closed, none is opened beside others
        self._failed: dict[Seat, Exception] = {}
        self._beside = 0  # bytes of jobs that are in no lane
        self._until = math.inf  # seats are given
        self.short = False  # somebody waits for memory

    def __iter__(self) -> Iterator[PooledBatch]:
        return iter(self._lanes)

    @property
    def bytes(self) -> int:
        """That their batches, and jobs between two of them, take on the device, as estimated. For any thread."""
        return self._beside + sum(self._engine.batch_bytes(lane.shape, lane.slots) for lane in list(self._lanes))

    def fits(self, shape: Shape, slots: int) -> bool:
        """Whether a lane more has room on the device."""
        return not self._full and self.bytes + self._engine.batch_bytes(shape, slots) <= self._engine.memory_bytes

    def arrange(self, seats: Sequence[Seat], beside_bytes: int = 0, until: float = math.inf) -> dict[Seat, Exception]:
        """Gives every seat a lane, as long as memory lasts; who has none then waits until somebody has gone, and so does who
        has none by ``until`` of the monotonic clock, for the next time: taking a seat may take as long as an iteration, or
        that of its paintings' targets. Somebody always takes one. Returns those whose jobs are lost, and why:
        `OutOfDeviceMemory` of one that does not even fit alone.

        ``beside_bytes``: on the device, of jobs that stand still.
        """
        self._beside = beside_bytes + sum(seat.work.bytes for seat in seats if seat.lane is None)
        was_short, self.short = self.short, False
        self._until = math.inf  # for the first
        by_shape: dict[Shape, list[Seat]] = defaultdict(list)
        for seat in seats:
            by_shape[seat.work.shape if seat.lane is None else seat.lane.shape].append(seat)
        for shape, those in by_shape.items():
            self._arrange(shape, those, until)
        for seat in seats:
            seat.apart |= seat.lane is None
        self.short |= was_short and time.monotonic() >= until  # perhaps, nobody has looked
        if not self._lanes:
            self._most.clear()
        failed, self._failed = self._failed, {}
        return failed

    def advance(self, lane: PooledBatch, iterations: int) -> dict[Seat, Report]:
        """Some iterations of everybody in a lane; see `work.Batch.advance`. Where memory ends there are no reports and nobody
        is in a lane any more: the next one will be half as wide, or waits for others to go. Any exception loses all who
        are in the lane; see `lose`."""
        before, done = time.monotonic(), {slot: seat.work.done for slot, seat in lane.seats.items()}
        try:
            reports = lane.batch.advance(iterations)
        except OutOfDeviceMemory as error:
            if lane.slots > 1:
                self._most[lane.shape] = lane.slots // 2
            elif len(self._lanes) == 1:
                self._failed |= dict.fromkeys(lane.seats.values(), error)
            alone = lane.slots == 1
            self._dissolve(lane)
            self._full = alone
            return {}
        took_s = time.monotonic() - before
        slot = next(iter(reports))
        did = lane.seats[slot].work.done - done[slot]
        self._pace.note(lane.shape, lane.slots, did, took_s)
        self._hear(lane.shape, lane.slots, len(lane.seats), did, took_s)
        lane.stands_since = before + took_s
        for seat in lane.seats.values():
            seat.used_s += took_s / len(lane.seats)
        return {lane.seats[slot]: report for slot, report in reports.items()}

    def leave(self, seat: Seat) -> None:
        """The job goes on elsewhere, or later. May raise `OutOfDeviceMemory`; the seat is as it was then."""
        if seat.lane is not None:
            seat.lane.batch.leave(seat.slot)
            self._vacate(seat)

    def drop(self, seat: Seat) -> None:
        """The job is over; what it held is given back."""
        if seat.lane is not None:
            try:
                seat.lane.batch.drop(seat.slot)
            except Exception:
                log.exception("a job could not be taken out of its batch")
            self._vacate(seat)

    def lose(self, lane: PooledBatch) -> None:
        """Closes a lane whose batch is broken; who was in it has none then."""
        for seat in lane.seats.values():
            seat.lane = None
        lane.seats.clear()
        self._close(lane)

    def _arrange(self, shape: Shape, seats: list[Seat], until: float) -> None:
        wanted = widths(len(seats), self._widest(shape, len(seats)))
        lanes = [lane for lane in self._lanes if lane.shape == shape]
        if all(seat.lane for seat in seats) and sorted((lane.slots for lane in lanes), reverse=True) == wanted:
            return
        missing = Counter(wanted)
        for lane in sorted(lanes, key=lambda lane: -len(lane.seats)):
            if missing[lane.slots]:
                missing[lane.slots] -= 1
            else:
                self._dissolve(lane)
        for seat in seats:
            if seat.lane is not None or seat in self._failed:
                continue
            if time.monotonic() >= self._until:
                return
            try:
                self._sit(self._room(shape, missing), seat)
                self._until = until
            except OutOfDeviceMemory as error:
                if wanted[0] > 1:
                    self._most[shape] = wanted[0] // 2
                    self._arrange(shape, seats, until)
                elif not self._lanes:
                    self._failed[seat] = error
                else:
                    self.short = True
                    self._full |= not isinstance(error, _NoRoom)
                return  # who has no lane waits until somebody has gone
            except Exception as error:  # noqa: BLE001 - of this job alone; whoever asked for the arrangement tells it
                self._failed[seat] = error

    def _widest(self, shape: Shape, jobs: int) -> int:
        """What pays and can be had; a power of two."""
        pays, counted = self._pace.width(shape, jobs), self._engine.most_slots(shape)
        width = min(pays, self._most.get(shape, pays), 1 << (counted.bit_length() - 1))
        while width > 1 and self._engine.batch_bytes(shape, width) > self._engine.memory_bytes:
            width //= 2
        return width

    def _room(self, shape: Shape, missing: Counter[int]) -> PooledBatch:
        """A lane with a free slot, opened if there is none. Raises `OutOfDeviceMemory`."""
        lane = next((lane for lane in self._lanes if lane.shape == shape and lane.has_room), None)
        if lane is not None:
            return lane
        slots = max(missing.elements(), default=1)
        missing[slots] -= 1
        if self._lanes and not self.fits(shape, slots):
            raise _NoRoom(shape.width, shape.height)
        lane = PooledBatch(self._engine.batch(shape, slots))
        self._lanes.append(lane)
        return lane

    def _sit(self, lane: PooledBatch, seat: Seat) -> None:
        before = time.monotonic()
        try:
            seat.slot = lane.batch.join(seat.work)
        except BaseException:
            if not lane.seats:
                self._close(lane)
            raise
        if seat.apart:
            competing = [other.used_s for other_lane in self._lanes for other in other_lane.seats.values()]
            seat.used_s, seat.apart = min(competing, default=seat.used_s), False
        seat.used_s += time.monotonic() - before
        seat.lane = lane
        lane.seats[seat.slot] = seat

    def _dissolve(self, lane: PooledBatch) -> None:
        for seat in list(lane.seats.values()):
            try:
                self.leave(seat)
            except Exception as error:  # noqa: BLE001 - of this job alone
                self._failed[seat] = error
                self.drop(seat)

    def _vacate(self, seat: Seat) -> None:
        lane = seat.lane
        assert lane is not None, "only who has a seat can vacate it"
        del lane.seats[seat.slot]
        seat.lane = None
        if not lane.seats:
            self._close(lane)

    def _close(self, lane: PooledBatch) -> None:
        self._full = False
        self._lanes.remove(lane)
        try:
            lane.batch.close()
        except Exception:  # of a broken device, whose other lanes are to be closed, too
            log.exception("a batch could not be closed")


class _NoRoom(OutOfDeviceMemory):
    """By the estimate; the device was not asked."""


def widths(jobs: int, widest: int) -> list[int]:
    """Widths of the lanes for so many jobs, widest first: powers of two, of which at most a quarter of the slots is empty."""
    made = []
    while jobs > 0:
        width = min(widest, 1 << (jobs - 1).bit_length())
        if 4 * (width - jobs) > width:
            width //= 2
        made.append(width)
        jobs -= width
    return made
