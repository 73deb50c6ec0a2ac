"""Which jobs will come while another one runs, by those that came in the last minute."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gramophone_server.scheduling.forecast import TURN_S, interruptions_s
from gramophone_server.scheduling.task import Task

__all__ = ["ARRIVALS_S", "Arrivals"]

ARRIVALS_S = 60.0  # over which arrivals are counted


class Arrivals:
    """How many jobs came, and what they took of the device, older ones counting less. Not thread-safe."""

    def __init__(self) -> None:
        self._jobs, self._ended_s = 0.0, 0.0  # device seconds of those that have ended
        self._at = 0.0

    def came(self, now: float) -> None:
        """A job has come."""
        self._age(now)
        self._jobs += 1

    def ended(self, task: Task, now: float) -> None:
        """A job has ended. It counts as what it took, and not as what it asked for."""
        self._age(now)
        self._ended_s += _present_s(task, now)

    def interruptions_s(self, run_s: float, credit_s: float, present: Iterable[Task], now: float) -> float:
        """For how long newcomers will have the device while an urgent job needs it for ``run_s``, if as many come as
        lately, and take as much. ``present``: the jobs that have come and not ended. ``credit_s``: see `Urgency`.

        Less than the mean: a job is refused only if it is more likely late than not, and during most jobs none comes.
        """
        self._age(now)
        taken_s = self._ended_s + sum(_present_s(task, now) for task in present)
        each_s = taken_s / self._jobs if self._jobs else 0.0
        arrivals = max(self._jobs * run_s / ARRIVALS_S, 1e-6)
        after_first = max(0.0, 1 - math.log(2) / arrivals)  # the part of the run after the first of them, by its median
        running_s = min(interruptions_s(run_s, credit_s), arrivals * each_s)
        return running_s * after_first + arrivals / 2 * min(TURN_S, each_s)  # each has a turn to join, however urgent

    def _age(self, now: float) -> None:
        weight = math.exp((self._at - now) / ARRIVALS_S)
        self._jobs, self._ended_s, self._at = self._jobs * weight, self._ended_s * weight, now


def _present_s(task: Task, now: float) -> float:
    """What a job has taken, as it counts now: by its arrival, so that one of hours is not an arrival of this minute."""
    return task.device_s * math.exp((task.came_at - now) / ARRIVALS_S)
