"""Events of a job, as values. The scheduler publishes them, watchers receive them."""

from __future__ import annotations

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
    """One picture, shared by all watchers that receive it, and those of its encodings that are in use."""

    # Blocks until the copy from the device has ended; returns uint8 [height, width, 3]. None: the pixels were released,
    # because every encoding that can still be requested exists.
    wait: Callable[[], Tensor] | None
    width: int  # in pixels
    height: int
    encodings: dict[Any, Any] = field(default_factory=dict)  # of `rpc.encoders`, on the event loop


@dataclass(frozen=True)
class Accepted:
    """The job is in the queue, at ``position``; at position 0 it starts at once."""

    position: int
    wait_s: float | None = None  # estimated seconds until the start; None: no speed was measured yet


@dataclass(frozen=True)
class Waiting:
    """The job has another position in the queue, counted from 1."""

    position: int
    wait_s: float | None = None  # as in `Accepted`


@dataclass(frozen=True)
class Progress:
    """One or more iterations were completed; ``report`` is that of the last one."""

    report: Report
    iterations_per_second: float  # at the current scale, since its start or the last pause
    time_left_s: float


@dataclass(frozen=True, eq=False)
class Frame:
    """The picture after ``iteration``. ``dropped``: how many frames this watcher has missed since the last one."""

    iteration: int
    picture: Picture
    dropped: int = 0


@dataclass(eq=False)
class SavedState:
    """The state of a job, shared by all watchers that receive it, and its checkpoint while that is in use."""

    light: bool
    write: Callable[[], bytes]
    most_bytes: int  # of the checkpoint
    written: dict[Any, Any] = field(default_factory=dict)  # of `rpc.encoders`, on the event loop


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint: the state of the job after ``iteration``, from which it can continue."""

    iteration: int
    state: SavedState


@dataclass(frozen=True)
class Paused:
    """The job is paused. ``iteration`` is the last one that was completed."""

    iteration: int


@dataclass(frozen=True)
class Resumed:
    """The pause has ended, and the job is in the queue again. ``iteration`` is the last one that was completed."""

    iteration: int


@dataclass(frozen=True)
class Changed:
    """The job has a changed recipe, from ``iteration`` on."""

    iteration: int
    recipe: Recipe
    iterations: int  # of the job, over all scales


class StopReason(Enum):
    """Why a job ended with a result; the names are the proto's."""

    ITERATIONS_DONE = 1
    TIME_BUDGET = 2
    FINISHED = 3


@dataclass(frozen=True, eq=False)
class Finished:
    """The job has ended with a result: the last picture, and the losses of the last iteration."""

    picture: Picture
    losses: Losses
    iterations: int  # completed
    elapsed_s: float  # from the first iteration to the last, pauses included
    reason: StopReason = StopReason.ITERATIONS_DONE


Event = Accepted | Waiting | Progress | Frame | Saved | Paused | Resumed | Changed | Finished


@dataclass(frozen=True, eq=False)
class Answer:
    """The outcome of a command, for the watcher that sent it and for no other. ``output``: what the command
    requested."""

    command_id: int
    iteration: int = 0  # as in `commands.Done`
    violations: tuple[Violation, ...] = ()  # why the command was refused
    output: Frame | Saved | None = None
