"""What happens to a job, as values."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from gramophone.recipe import Recipe, Violation
from gramophone_server.domain.job import Losses, Report

__all__ = [
    "Accepted",
    "Answer",
    "Changed",
    "Event",
    "Finished",
    "Frame",
    "Paused",
    "Picture",
    "Progress",
    "Resumed",
    "Saved",
    "SavedState",
    "StopReason",
    "Waiting",
]


@dataclass(eq=False)
class Picture:
    """One picture for all who want it: a call that waits for uint8 [height, width, 3], and what was encoded of it."""

    wait: Callable[[], Tensor] | None  # None: dropped, because all that anybody will want of it is encoded
    encodings: dict[Any, asyncio.Future[Any]] = field(default_factory=dict)  # belongs to the event loop


@dataclass(frozen=True)
class Accepted:
    """The job is at this place in the queue; at 0 it begins at once."""

    position: int
    wait_s: float | None = None  # by the speed measured so far; None: nothing was measured yet


@dataclass(frozen=True)
class Waiting:
    """The job still waits, now at this place, from 1."""

    position: int
    wait_s: float | None = None


@dataclass(frozen=True)
class Progress:
    """An iteration was done."""

    report: Report
    iterations_per_second: float  # over the present scale, from the last pause on
    time_left_s: float


@dataclass(frozen=True, eq=False)
class Frame:
    """The picture after `iteration`. `dropped` frames were due to this watcher since the last one."""

    iteration: int
    picture: Picture
    dropped: int = 0


@dataclass(eq=False)
class SavedState:
    """The job's state for all who want it: a call that makes the bytes of a checkpoint, and these once they are made."""

    light: bool
    write: Callable[[], bytes]
    written: asyncio.Future[bytes] | None = None  # belongs to the event loop


@dataclass(frozen=True, eq=False)
class Saved:
    """The job as it was after `iteration`, to go on from."""

    iteration: int
    state: SavedState


@dataclass(frozen=True)
class Paused:
    """The job stands still behind `iteration`."""

    iteration: int


@dataclass(frozen=True)
class Resumed:
    """It goes on."""

    iteration: int


@dataclass(frozen=True)
class Changed:
    """From `iteration` on the job has another recipe."""

    iteration: int
    recipe: Recipe
    iterations: int  # of the whole job


class StopReason(Enum):
    """Why a job ended with a result; the names are the proto's."""

    ITERATIONS_DONE = 1
    TIME_BUDGET = 2
    FINISHED = 3


@dataclass(frozen=True, eq=False)
class Finished:
    """The last picture and the losses of the last iteration."""

    picture: Picture
    losses: Losses
    iterations: int  # done
    elapsed_s: float  # from the first iteration to the last, with pauses
    reason: StopReason = StopReason.ITERATIONS_DONE


Event = Accepted | Waiting | Progress | Frame | Saved | Paused | Resumed | Changed | Finished


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of a command, for the watcher alone who gave it. `taken` is what it asked for."""

    command_id: int
    iteration: int = 0  # as in `commands.Done`
    violations: tuple[Violation, ...] = ()  # why it was not done
    taken: Frame | Saved | None = None
