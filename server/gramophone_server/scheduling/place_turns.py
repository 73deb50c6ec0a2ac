"""Who has a place among the jobs that run: no owner keeps the places that another one waits for.

The device is shared by those that run, so without this one client could take all places with jobs of hours. A job that
gives its place up moves to the host's memory and waits in the queue, as after a pause.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from gramophone_server.scheduling.memory_turns import JOIN_PART
from gramophone_server.scheduling.task import PATIENCE_S, Task
from gramophone_server.scheduling.urgency import URGENT_FROM

__all__ = ["PLACE_TURN_S", "Claims", "Exchange", "exchange", "in_order"]

# Device seconds in its batch for which a job keeps its place while an owner without any waits, as `MEMORY_TURN_S`.
PLACE_TURN_S = 5.0
# An owner with so many times the places of another one gives it one at once. Smaller differences hardly matter: owners
# share the device evenly anyway, and each exchange takes time.
UNEVEN = 4
# Device seconds in its batch, or those of its join if these are more, after which a job may leave for a short one: so
# joins take at most half of what one place has.
EARLY_S = 1.0
PATIENT_S = 10.0  # that an owner waits without a place before promised jobs of one with several are in question
# A job that has given its place up gets one again so long before its deadline would need more than it can get.
RETURN_S = PATIENCE_S / 2


class Exchange(NamedTuple):
    """A running job that gives its place up, and a waiting one that gets it.

    ``to_stay``: for a while in any case. ``is_early``: before that job has had its turn, because the other is short.
    """

    leaving: Task
    starting: Task
    to_stay: bool = False
    is_early: bool = False


def exchange(
    running: Sequence[Task],
    waiting: Sequence[Task],
    now: float,
    may_leave: Callable[[Task], bool] = lambda _: True,
    may_start: Callable[[Task], bool] = lambda _: True,
) -> Exchange | None:
    """The exchange that is due when all places are taken; None: none is.

    In the order of the queue: a job whose owner has none, or at most a fourth of the places of another one, gets one of
    the owner with most. Where no owner has two, one without any gets the place of a job that has had its turn, and a
    short one that of a job that has had `EARLY_S`: only one at a time, so that the others have their turns. A job that
    has given its place up gets one back when its deadline needs it, first from its own owner, and keeps that one. Who
    leaves can wait: its deadline, and those of others after it, leave a minute, and it is not short. Where none can, an
    owner with several places nevertheless gives one up for an owner that has waited for `PATIENT_S` without any, of the
    job that can wait for longest.

    ``may_leave``: whether the host has room for the state of a running job. ``may_start``: whether the device has
    memory for a waiting one; asked only of one whose turn it is.
    """
    places, spares = _places_of(running), _spares([*running, *(task for task in waiting if task.gave_place_up)], now)
    placed = [task for task in running if not task.memory_short and not task.is_short and may_leave(task)]
    able = [task for task in placed if _can_wait(task, spares)]
    most = max((places[task.owner] for task in able), default=0)
    of_most = [task for task in able if places[task.owner] == most]
    after_turn = [task for task in able if _had_its_turn(task)] or _beginnings_after_turn(able)
    early = _may_leave_early(running, able)
    of_several = [] if able else [task for task in placed if places[task.owner] > 1]
    for task in waiting:
        own, to_stay = places[task.owner], False
        if _has_claim(own, most):
            leaving = of_most
        elif not own and after_turn:
            leaving = after_turn
        elif not own and early and task.is_short:
            if may_start(task):
                return Exchange(max(early, key=_used_in_place_s), task, is_early=True)
            leaving = []
        elif not own and of_several and now - task.queued_at >= PATIENT_S:
            leaving = of_several
        else:
            to_stay = task.gave_place_up and spares.get(task, math.inf) < RETURN_S
            leaving = [other for other in able if other.owner == task.owner] if to_stay else []
            leaving = leaving or ((of_most if most > 1 else after_turn or able) if to_stay else [])
        if leaving and may_start(task):
            if not able:
                return Exchange(max(leaving, key=lambda other: spares.get(other, math.inf)), task, to_stay=True)
            return Exchange(max(leaving, key=_readiness), task, to_stay)
    return None


def in_order(waiting: Iterable[Task], running: Iterable[Task]) -> list[Task]:
    """The waiting jobs in the order in which they get places that are free: first those whose owners have a claim, so
    that none waits behind the many short jobs of another one, and then in the order of the queue."""
    places = _places_of(running)
    most = max(places.values(), default=0)
    return sorted(waiting, key=lambda task: not _has_claim(places[task.owner], most))


class Claims:
    """Foresees which jobs get a place at once though all are taken, if they come one after the other."""

    def __init__(self, running: Sequence[Task], now: float) -> None:
        self._places = _places_of(running)
        spares = _spares(running, now)
        placed = (task for task in running if not task.memory_short and not task.is_short)
        self._able = Counter(task.owner for task in placed if _can_wait(task, spares))
        self._without = 0  # jobs whose owners have no place

    def take(self, owner: str) -> bool:
        """Whether the next job, of this owner, gets a place at once."""
        if self._able:
            giving = max(self._able, key=self._places.__getitem__)
            if _has_claim(self._places[owner], self._places[giving]):
                self._places.subtract([giving])
                self._able.subtract([giving])
                self._able = +self._able
                self._places[owner] += 1
                return True
        self._without += not self._places[owner]
        return False

    def wait_s(self, owner: str) -> float:
        """At most so many seconds until the job gets a place for which `take` was called last; inf: not before others
        end."""
        places = self._places.total()
        return math.inf if self._places[owner] or not self._able else PLACE_TURN_S * max(places, self._without)


def _places_of(running: Iterable[Task]) -> Counter[str]:
    """How many places each owner has. Jobs that wait for memory have none."""
    return Counter(task.owner for task in running if not task.memory_short)


def _has_claim(own: int, most: int) -> bool:
    """Whether an owner with ``own`` places gets one at once of an owner that has ``most``."""
    return most > 1 and most >= UNEVEN * own


def _can_wait(task: Task, spares: Mapping[Task, float]) -> bool:
    if task.keeps_place and (task in spares or not _had_its_turn(task)):
        return False
    return spares.get(task, math.inf) > PATIENCE_S


def _spares(tasks: Iterable[Task], now: float) -> dict[Task, float]:
    """For how many seconds each of these jobs can wait for the sake of deadlines: its own, and those of the jobs
    after it, which run in the order of their deadlines. Without those that have none, or will miss it anyway, and those
    whose time budget ends first: it is no promise, and has a picture then."""
    promised = [task for task in tasks if _has_promise(task, now)]
    promised.sort(key=attrgetter("deadline_at"))
    spares: dict[Task, float] = {}
    counted: dict[Hashable, float] = {}  # seconds of a shape, whose jobs share batches, until its last counted job ends
    total_s = 0.0
    for task in promised:
        work = task.remaining
        own_s = 0.0 if work is None else work.alone_s * (1 + work.spread)
        before_s = counted.get(task.state.shape, 0.0)
        total_s += max(0.0, own_s - before_s)
        counted[task.state.shape] = max(own_s, before_s)
        spares[task] = task.deadline_at - now - total_s / URGENT_FROM
    least_s = math.inf
    for task in reversed(promised):
        least_s = spares[task] = min(least_s, spares[task])
    return spares


def _has_promise(task: Task, now: float) -> bool:
    left_s, work = task.deadline_at - now, task.remaining
    if left_s == math.inf or left_s <= 0 or task.is_kept_by_budget:
        return False
    return work is None or work.alone_s * (1 - 2 * work.spread) <= left_s


def _readiness(task: Task) -> tuple[int, float]:
    """How ready a job is to leave: first those that have had their turn, then beginnings, of which the most advanced
    one ends soonest, and last those that have just joined."""
    if _had_its_turn(task):
        return 2, _used_in_place_s(task)
    return (1, -task.begun_s) if task.batch is None else (0, _used_in_place_s(task))


def _beginnings_after_turn(able: Sequence[Task]) -> list[Task]:
    """Where there are only beginnings, which begin anew when they are interrupted: those that have had as much of the
    device as a turn, without the most advanced one, so that always one ends."""
    if any(task.batch is not None for task in able):
        return []
    begun = sorted(able, key=lambda task: task.begun_s)[:-1]
    return [task for task in begun if task.begun_s >= PLACE_TURN_S]


def _may_leave_early(running: Iterable[Task], able: Sequence[Task]) -> list[Task]:
    """The jobs that may leave for a short one before they have had their turn.

    None while another one has its place so. If that one was not short after all, it leaves itself, also in its
    beginning: otherwise one such job after the other would take the place of one that waits for its turn.
    """
    came_early = [task for task in running if task.came_early and not task.memory_short and not _had_its_turn(task)]
    if not all(task.had_time_of_short for task in came_early):
        return []
    return [task for task in able if task in came_early] or [
        task for task in able if task.batch is not None and _used_in_place_s(task) >= max(EARLY_S, task.join_s)
    ]


def _used_in_place_s(task: Task) -> float:
    return 0.0 if task.used_before_place_s is None else task.used_s - task.used_before_place_s


def _had_its_turn(task: Task) -> bool:
    return task.batch is not None and _used_in_place_s(task) >= max(PLACE_TURN_S, JOIN_PART * task.join_s)
