"""Commands of a job's controller. The compute thread executes each between two iterations; see `Scheduler.command`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gramophone_server.domain.events import Frame, Saved
from gramophone_server.domain.job_state import RecipeUpdate

__all__ = ["Command", "Done", "Finish", "Pause", "Resume", "TakeCheckpoint", "TakePicture", "UpdateRecipe"]


@dataclass(frozen=True)
class Pause:
    """Pauses the job; no effect on a paused one."""


@dataclass(frozen=True)
class Resume:
    """Ends the pause of the job; no effect on a job that is not paused."""


@dataclass(frozen=True)
class UpdateRecipe:
    """Changes weights, the step size or the number of iterations."""

    changes: RecipeUpdate


@dataclass(frozen=True)
class TakePicture:
    """Requests the current picture."""


@dataclass(frozen=True)
class TakeCheckpoint:
    """Requests the current state; a light one has the picture and no state of the optimiser."""

    light: bool


@dataclass(frozen=True)
class Finish:
    """Ends the job; the current picture is its result."""


Command = Pause | Resume | UpdateRecipe | TakePicture | TakeCheckpoint | Finish


class Done(NamedTuple):
    """The outcome of a command that was executed."""

    # The first iteration for which the command takes effect; for `Finish`, `TakePicture` and `TakeCheckpoint` the last
    # one that was completed.
    iteration: int
    output: Frame | Saved | None = None  # what the command requested, for the caller alone
