"""Commands that are not executed yet: which is next, and how much of the device's time they may take."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from gramophone_server.domain.commands import Command, Done
from gramophone_server.scheduling.task import JobObserver
from gramophone_server.scheduling.turn_order import SLICE_S

__all__ = ["COMMANDS_PART", "CommandQueue", "PendingCommand"]

# While jobs run, commands take one part in so many of the time, however many come. They do not wait for the turns of
# their owners, so that a pause does not wait for the long iterations of others; charges alone would not bound them.
COMMANDS_PART = 10


class PendingCommand(NamedTuple):
    """A command that the compute thread has not executed yet."""

    owner: str  # of the job
    observer: JobObserver  # of the job that the command is for
    command: Command
    done: asyncio.Future[Done]


class CommandQueue:
    """The pending commands, and their credit: seconds that they may take now. Owners take turns, each with its oldest
    command, so that one with commands for many jobs delays another's by one.

    All but `charge` and `earn`, which belong to the compute thread, is called under the lock of the `TaskTable`.
    """

    def __init__(self) -> None:
        # By owner, the one whose turn is next first, and by future.
        self._pending: dict[str, dict[asyncio.Future[Done], PendingCommand]] = {}
        self._credit_s = SLICE_S

    def __len__(self) -> int:
        return sum(len(of_owner) for of_owner in self._pending.values())

    def add(self, pending: PendingCommand) -> None:
        """Adds a command, behind those of its owner."""
        self._pending.setdefault(pending.owner, {})[pending.done] = pending

    def remove(self, pending: PendingCommand) -> None:
        """Removes a command; does nothing if it was taken or removed before."""
        of_owner = self._pending.get(pending.owner, {})
        if of_owner.pop(pending.done, None) is not None and not of_owner:
            del self._pending[pending.owner]

    def take(self, *, jobs_run: bool) -> PendingCommand | None:
        """Removes the next command and returns it; None if there is none, or if it must wait because ``jobs_run`` and
        the credit is used up."""
        if not self._pending or (jobs_run and self._credit_s <= 0):
            return None
        owner, of_owner = next(iter(self._pending.items()))
        pending = of_owner.pop(next(iter(of_owner)))
        del self._pending[owner]
        if of_owner:
            self._pending[owner] = of_owner  # behind all others
        return pending

    def charge(self, seconds: float) -> None:
        """Counts a command that was executed while jobs ran. It may take more than the credit, which is then owed."""
        self._credit_s -= seconds

    def earn(self, seconds: float) -> None:
        """Counts a turn of jobs. Unused credit is kept up to that of this turn, or to one slice."""
        earned_s = seconds / (COMMANDS_PART - 1)
        self._credit_s = min(self._credit_s + earned_s, max(SLICE_S, earned_s))
