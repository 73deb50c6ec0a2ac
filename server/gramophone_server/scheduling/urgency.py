"""Which jobs need more than an even share of the device to keep their deadlines, and how much they may have."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import attrgetter

from gramophone_server.scheduling.forecast import LONGEST_TURN_S, MAX_URGENT_SHARE
from gramophone_server.scheduling.task import PooledBatch, Task

__all__ = ["URGENT_FROM", "Urgency"]

# A job is urgent as soon as it needs this share of the device until its deadline: less than it can get, because batches
# change, iterations are noisy, and more jobs come.
URGENT_FROM = 0.65
# Seconds in reserve, because a batch may be rebuilt: its jobs join again, and its first iteration takes longer.
RESERVE_S = 0.15


class Urgency:
    """Decides whose deadline needs the next slice. Belongs to the compute thread.

    Jobs with deadlines are urgent in the order of these, and from the moment on at which the last one of them would be
    late otherwise. A job that would be late even alone is not urgent, nor is one whose time budget ends it before its
    deadline, nor one in its beginning, however dear: that is done in turn, so that dear beginnings with deadlines leave
    each other owner its even share. While others have work, slices out of turn take at most `MAX_URGENT_SHARE` of the
    device: a slice in turn gives credit for them, and each of them uses it up.
    """

    def __init__(self) -> None:
        self.credit_s = LONGEST_TURN_S  # of turns out of turn; any thread may read it
        self._out_of_turn = False  # whether the next slice is

    def first(self, ready: Iterable[Task], in_turn: Task, now: float, turn_s: float) -> Task:
        """The job of ``ready`` that is next: that whose deadline needs it, or the one that is ``in_turn``, whose turn
        would take ``turn_s`` seconds."""
        # A join is short, and a wider batch serves all in it: kept out, the others would halve the throughput.
        joins = in_turn.batch is None and not _is_beginning(in_turn)
        urgent = self._urgent(ready, now, turn_s) if self.credit_s > 0 and not joins else None
        self._out_of_turn = urgent is not None and urgent is not in_turn and not _share_a_batch(urgent, in_turn)
        return urgent if urgent is not None and self._out_of_turn else in_turn

    def charge(self, seconds: float) -> None:
        """Counts the slice after `first`."""
        if self._out_of_turn:
            self.credit_s -= seconds
        else:
            earned_s = seconds * MAX_URGENT_SHARE / (1 - MAX_URGENT_SHARE)
            self.credit_s = min(self.credit_s + earned_s, max(LONGEST_TURN_S, earned_s))

    def _urgent(self, ready: Iterable[Task], now: float, turn_s: float) -> Task | None:
        promised = [
            task
            for task in ready
            if now < task.deadline_at < math.inf and not task.is_kept_by_budget and not _is_beginning(task)
        ]
        counted: dict[PooledBatch, float] = {}  # seconds of the slices of a batch until its last counted job ends
        first = None
        total_s = 0.0
        for task in sorted(promised, key=attrgetter("deadline_at")):
            remaining = task.remaining
            if remaining is None or now + remaining.alone_s * (1 - 2 * remaining.spread) > task.deadline_at + turn_s:
                continue
            first = first or task
            own_s = remaining.alone_s * (1 + remaining.spread)
            if task.batch is None:
                total_s += own_s
            else:
                total_s += max(0.0, own_s - counted.get(task.batch, 0.0))
                counted[task.batch] = max(own_s, counted.get(task.batch, 0.0))
            if now + RESERVE_S + turn_s + total_s / URGENT_FROM > task.deadline_at:
                return first
        return None


def _is_beginning(task: Task) -> bool:
    """Whether its next turn is a step of its beginning."""
    return task.batch is None and task.beginning is not None and task.beginning.next_pixels > 0


def _share_a_batch(a: Task, b: Task) -> bool:
    return a.batch is not None and a.batch is b.batch
