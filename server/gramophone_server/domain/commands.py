"""What the controller of a job can have done to it. The scheduler does each between two iterations; see `Scheduler.command`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gramophone_server.domain.events import Frame, Saved
from gramophone_server.domain.job_state import RecipeUpdate

__all__ = ["Command", "Done", "Finish", "Pause", "Resume", "Retune", "TakeCheckpoint", "TakePicture"]


@dataclass(frozen=True)
class Pause:
    """Stand still; done to a job that is paused already, nothing happens."""


@dataclass(frozen=True)
class Resume:
    """Go on; done to a job that is not paused, nothing happens."""


@dataclass(frozen=True)
class Retune:
    """Other weights, another step, another number of iterations."""

    changes: RecipeUpdate


@dataclass(frozen=True)
class TakePicture:
    """The present picture."""


@dataclass(frozen=True)
class TakeCheckpoint:
    """The present state."""

    light: bool


@dataclass(frozen=True)
class Finish:
    """End with the present picture as the result."""


Command = Pause | Resume | Retune | TakePicture | TakeCheckpoint | Finish


class Done(NamedTuple):
    """A command was carried out."""

    iteration: int  # the first one for which it holds; of the end and of what was taken, the one that it is of
    taken: Frame | Saved | None = None  # what was asked for, for whoever asked
