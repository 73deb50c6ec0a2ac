"""Who has a place among the jobs that run: no owner keeps the places that another one waits for.

The device is shared by those that run, so without this one client could take all places with jobs of hours. A job that
gives its place up moves to the host's memory and waits in the queue, as after a pause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gramophone_server.scheduling.memory_turns import JOIN_PART
from gramophone_server.scheduling.task import PATIENCE_S, Task

__all__ = ["PLACE_TURN_S", "Exchange", "exchange", "has_claim", "places_of"]

# Device seconds for which a job keeps its place while an owner without any waits, as `MEMORY_TURN_S`.
PLACE_TURN_S = 5.0
CLAIM = 2  # so many places fewer give an owner a claim to one
# A job that has given its place up gets one again so long before it must run for its deadline.
RETURN_S = PATIENCE_S / 2


class Exchange(NamedTuple):
    """A running job that gives its place up, and a waiting one that gets it."""

    leaving: Task
    starting: Task


def places_of(running: Iterable[Task]) -> Counter[str]:
    """How many places each owner has. Jobs that wait for memory have none."""
    return Counter(task.owner for task in running if not task.memory_short)


def has_claim(owner: str, places: Counter[str]) -> bool:
    """Whether a job of this owner gets a place at once: another one has two more, so that it still has more or as many
    afterwards."""
    return max(places.values(), default=0) >= places[owner] + CLAIM


def exchange(
    running: Sequence[Task], waiting: Iterable[Task], now: float, may_start: Callable[[Task], bool] = lambda _: True
) -> Exchange | None:
    """The exchange that is due when all places are taken; None: none is. ``may_start``: whether there is memory for a
    waiting job.

    The first waiting job that has a claim gets the place of a job of the owner that has most. An owner without a place,
    where no one has two, gets that of a job that has had its turn. And a job that has given its place up gets one back
    when its deadline needs it.

    The job that leaves can wait: its own deadline leaves it a minute. If possible it is in a batch, because a beginning
    that is interrupted begins anew, and of those the one that has used most of the device since it got its place.
    """
    places = places_of(running)
    most = max(places.values(), default=0)
    able = [task for task in running if not task.memory_short and task.must_start_at - now > PATIENCE_S]
    if not able:
        return None
    for task in waiting:
        if most >= places[task.owner] + CLAIM:
            leaving = [other for other in able if places[other.owner] == most]
        elif task.gave_place_up and task.must_start_at - now < RETURN_S:
            leaving = able
        elif not places[task.owner]:
            leaving = [other for other in able if _had_its_turn(other)]
        else:
            continue
        if leaving and not task.memory_short and may_start(task):
            return Exchange(max(leaving, key=lambda other: (other.batch is not None, _used_in_place_s(other))), task)
    return None


def _used_in_place_s(task: Task) -> float:
    return 0.0 if task.used_before_place_s is None else task.used_s - task.used_before_place_s


def _had_its_turn(task: Task) -> bool:
    return task.batch is not None and _used_in_place_s(task) >= max(PLACE_TURN_S, JOIN_PART * task.join_s)
