"""Who is next: device time, shared evenly by owners, and by the jobs of each owner.

Each turn is charged to the jobs that it was for, and the next turn goes to the owner who would have had the least
device time after it. So a turn that takes long waits until the others have had as much, and afterwards they catch up.
An owner is a connection: one who sends one short job after another has one counter for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["BURST_S", "Account", "DeviceShares", "FairShare", "Member"]

# A newcomer counts as one who has had its even share so far, less this: it may overtake a long turn that is due. No
# newcomer has had less than the one who has had least.
BURST_S = 10.0


class Member(Protocol):
    """One who has a share."""

    used_s: float


M = TypeVar("M", bound=Member)


class FairShare(Generic[M]):
    """Seconds that members have used, those that compete for more, and the level: what a member would have used that
    has competed from the start, had all turns been infinitely short."""

    def __init__(self, level_s: float = 0.0) -> None:
        self.level_s = level_s
        self._members: dict[M, None] = {}  # in the order of their arrival

    def __iter__(self) -> Iterator[M]:
        return iter(self._members)

    def __contains__(self, member: M) -> bool:
        return member in self._members

    def __len__(self) -> int:
        return len(self._members)

    def arrive(self, member: M) -> None:
        """The member competes from now on. It is not owed what others used before, and still owes what it used."""
        least_s = min((other.used_s for other in self._members), default=self.level_s)
        floor_s = max(least_s, self.level_s - BURST_S)
        member.used_s = max(member.used_s, floor_s)
        self._members[member] = None

    def leave(self, member: M) -> None:
        """The member competes no more."""
        self._members.pop(member, None)
        if not self._members:
            self.level_s = max(self.level_s, member.used_s)

    def charge(self, member: M, seconds: float) -> None:
        """The member has used so much more."""
        member.used_s += seconds
        if member in self._members:
            self.level_s += seconds / len(self._members)


class Job(Member, Protocol):
    """A member of an account."""

    owner: str


T = TypeVar("T", bound=Job)


@dataclass(eq=False)
class Account(Generic[T]):
    """One owner."""

    used_s: float
    jobs: FairShare[T]


class DeviceShares(Generic[T]):
    """The shares of all owners, and of their jobs."""

    def __init__(self) -> None:
        self._competing: FairShare[Account[T]] = FairShare()
        # By owner. Without jobs that compete, one is kept until the others have had as much.
        self._accounts: dict[str, Account[T]] = {}
        # By all jobs ever. A new account starts with it, so that no job of an earlier one owes it anything.
        self._total_s = 0.0

    def __len__(self) -> int:
        """The number of owners whose use is remembered."""
        return len(self._accounts)

    @property
    def competing(self) -> int:
        """The number of owners that compete."""
        return len(self._competing)

    def arrive(self, job: T) -> None:
        """The job competes from now on."""
        account = self._account(job)
        if job in account.jobs:
            return
        if account not in self._competing:
            self._competing.arrive(account)
        account.jobs.arrive(job)

    def leave(self, job: T) -> None:
        """The job competes no more: it has ended, is paused, or waits for memory."""
        account = self._accounts.get(job.owner)
        if account is None or job not in account.jobs:
            return
        account.jobs.leave(job)
        if not account.jobs:
            self._competing.leave(account)
        if not self._competing:  # nobody has waited for what others owe
            self._competing.level_s = max(other.used_s for other in self._accounts.values())
        level_s = self._competing.level_s
        self._accounts = {
            owner: other for owner, other in self._accounts.items() if other.jobs or other.used_s > level_s
        }

    def charge(self, job: T, seconds: float) -> None:
        """The job has used so much of the device."""
        self._total_s += seconds
        account = self._account(job)
        account.jobs.charge(job, seconds)
        self._competing.charge(account, seconds)

    def next(self, turns: Mapping[T, float]) -> T | None:
        """The job whose turn is next; None without any. ``turns``: jobs that compete and can have a turn, with the
        estimated seconds that it takes of their time; more than `BURST_S` count as this, so that an estimate that is
        far too high keeps no job waiting for long."""
        first: dict[Account[T], tuple[float, float, T]] = {}  # what it would have had then, its turn, the job
        for job, turn_s in turns.items():
            account, turn_s = self._accounts[job.owner], min(turn_s, BURST_S)
            if account not in first or job.used_s + turn_s < first[account][0]:
                first[account] = job.used_s + turn_s, turn_s, job
        if not first:
            return None
        account = min(first, key=lambda account: account.used_s + first[account][1])
        return first[account][2]

    def _account(self, job: T) -> Account[T]:
        if job.owner not in self._accounts:
            self._accounts[job.owner] = Account(0.0, FairShare(self._total_s))
        return self._accounts[job.owner]
