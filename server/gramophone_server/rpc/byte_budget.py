"""Bytes that many calls share, and whose turn it is to get some. Used only on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from gramophone_server.errors import ServerBusy
from gramophone_server.rpc.promptness import Promptness, Standing
from gramophone_server.rpc.timeouts import PER_TURN, Timeouts, Timers

__all__ = ["MAX_WAIT_S", "OF_ONE_CONNECTION", "ByteBudget", "Share"]

MAX_WAIT_S = 10.0  # for a share; a call that waits longer is better sent again, perhaps to another server
OF_ONE_CONNECTION = 0.75  # most of what one connection gets of what the others leave, where it has a bound
# Of so many shares one goes to the longest wait, so that none waits for ever, and one to the newest unknown owner, so
# that prompt ones do not keep newcomers out.
ROUND = 4
RETRY_S = 0.01  # shortest wait for the next share that can be replaced; a timer may be early by a rounding error


class Share:
    """Bytes of a budget that a call or a job holds, until `give_back` or the end of a `with` block.

    `bytes` are those that it holds, `owner` is whom they count for. `on_replaced` is called, once, if others wait and
    the share is replaceable; it must see to it that the share is given back soon. None: it cannot be replaced.
    """

    def __init__(self, budget: ByteBudget, size: int, owner: str) -> None:
        self.bytes, self.owner = size, owner
        self.on_replaced: Callable[[], object] | None = None
        self.since = budget.now()  # when it was taken, or its holder last made progress
        self._budget = budget

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_back()

    def touch(self) -> None:
        """Its holder has made progress, so that the share cannot be replaced for a while."""
        self.since = self._budget.now()

    def was_prompt(self) -> None:
        """Its owner has sent, or read, all that the bytes were for."""
        self._budget.promptness.was_prompt(self.owner)

    def was_slow(self) -> None:
        """Its owner has kept others waiting."""
        self._budget.promptness.was_slow(self.owner, self._budget.now())

    def keep(self) -> None:
        """From now on it cannot be replaced."""
        self._budget.forget(self)

    def absorb(self, other: Share) -> None:
        """Takes over the bytes of another share of the same budget and owner, which then has none."""
        self.bytes += other.bytes
        self.touch()
        other.bytes = 0
        self._budget.forget(other)

    def split(self, size: int) -> Share:
        """A share of its own for ``size`` of the bytes."""
        self.bytes -= size
        return Share(self._budget, size, self.owner)

    def replaceable(self, on_replaced: Callable[[], object]) -> None:
        """From now on others may replace it, if its holder makes no progress."""
        self.on_replaced = on_replaced
        self.touch()
        self._budget.add_replaceable(self)

    def replaceable_at_last(self, on_replaced: Callable[[], object]) -> None:
        """From now on others may replace it, if all bytes of the budget are held in this way: its holder waits for
        more of them."""
        self.on_replaced = on_replaced
        self._budget.add_holder_that_waits(self)

    def shrink_to(self, size: int) -> None:
        """Gives back what is more than ``size`` bytes."""
        if size < self.bytes:
            surplus, self.bytes = self.bytes - size, size
            self._budget.put_back(self.owner, surplus)

    def give_back(self) -> None:
        """Gives back all bytes. Further calls change nothing."""
        self.shrink_to(0)
        self._budget.forget(self)


class ByteBudget:
    """At most `max_bytes` at a time, shared by owners, which are connections.

    If all are used, those who want some wait. Owners that have been prompt are served first, so that they do not wait
    behind hundreds of clients that hold their shares and do nothing; among these the one that would then hold least,
    where what is urgent does not count, and among equals the one that waits longest. Of owners that nothing is known
    of, the one that came last is next, for the same reason, and they get one share in `ROUND` in any case, as does the
    longest wait of all owners that hold least.

    Meanwhile, shares that nothing was done with for `replaceable_after_s` are replaced: of the owner that holds most,
    of slow ones first, and the newest ones, because the others may be nearly done.

    One owner gets at most the part `of_one` of what the others leave, so that something is free for a newcomer: with
    3/4, one busy owner leaves a quarter, and ten leave 1/31. Switches share their buffers so (dynamic thresholds).
    """

    def __init__(
        self,
        max_bytes: int,
        what: str = "",
        *,
        of_one: float = 1.0,
        replaceable_after_s: float = 1.0,
        max_wait_s: float = MAX_WAIT_S,
        timers: Timers | None = None,
    ) -> None:
        """``what``: the clause of `ServerBusy`, with the setting of the limit. ``timers``: for tests to replace."""
        self.max_bytes = max_bytes
        self.used = 0
        self.now: Callable[[], float] = time.monotonic if timers is None else timers.time  # seconds
        self._what, self._of_one = what, of_one
        self._replaceable_after_s = replaceable_after_s
        self._timers = timers
        self._held: dict[str, int] = {}  # bytes by owner
        # By owner and arrival, the one that waits longest first.
        self._waiting: dict[str, dict[int, _Waiting]] = {}
        self._waiting_bytes = 0
        self._timeouts: Timeouts[_Waiting] = Timeouts(max_wait_s, self._give_up, timers)
        self._replaceable: dict[Share, None] = {}
        self._replaced: set[Share] = set()  # those that are not given back yet
        self._at_last: dict[Share, None] = {}  # of holders that wait for more
        self.promptness = Promptness()
        self._arrivals = 0
        self._served = 0
        self._next_replacement: asyncio.TimerHandle | None = None
        self._update_is_due = False

    @property
    def owners(self) -> int:
        """How many owners hold bytes."""
        return len(self._held)

    @property
    def waiting(self) -> int:
        """How many wait for a share."""
        return sum(map(len, self._waiting.values()))

    def held(self, owner: str) -> int:
        """The bytes that an owner holds."""
        return self._held.get(owner, 0)

    def try_take(self, size: int, owner: str = "") -> Share | None:
        """A share of so many bytes; None if there are not as many, or others wait."""
        if self._waiting or size > self._free(owner):
            return None
        return self._share(size, owner)

    async def take(
        self, size: int, owner: str = "", on_replaced: Callable[[], object] | None = None, *, is_urgent: bool = False
    ) -> Share:
        """A share of so many bytes, at most `max_bytes`, as soon as it is this owner's turn. ``is_urgent``: it comes
        before what others want, however large it is. Raises `ServerBusy` if that takes too long."""
        if size > self.max_bytes:
            raise ValueError(f"{size} bytes are more than the whole budget of {self.max_bytes}")
        share = self.try_take(size, owner) or await self._wait_for_share(size, owner, is_urgent)
        if on_replaced is not None:
            share.replaceable(on_replaced)
        return share

    # For shares -------------------------------------------------------------------------------------------------------

    def put_back(self, owner: str, size: int) -> None:
        """Counts bytes as free, and serves those who wait."""
        self.used -= size
        self._held[owner] -= size
        if not self._held[owner]:
            del self._held[owner]
        if self._waiting:
            self._update_soon()

    def add_replaceable(self, share: Share) -> None:
        """The share can be replaced when it is idle."""
        self._replaceable[share] = None
        self._replaced.discard(share)
        if self._waiting:
            self._update_soon()

    def add_holder_that_waits(self, share: Share) -> None:
        """The share can be replaced if all others are of holders that wait, too."""
        self._at_last[share] = None

    def forget(self, share: Share) -> None:
        """The share is not to be replaced any more."""
        share.on_replaced = None
        self._replaceable.pop(share, None)
        self._at_last.pop(share, None)
        self._replaced.discard(share)

    # The queue --------------------------------------------------------------------------------------------------------

    def _free(self, owner: str) -> int:
        """The bytes that this owner can get now. One that holds none can have all that are free."""
        free = self.max_bytes - self.used
        held = self._held.get(owner)
        return min(free, int(self._of_one * (free + held)) - held) if held and self._of_one < 1 else free

    def _share(self, size: int, owner: str) -> Share:
        self.used += size
        if size:  # an owner of nothing would stay for ever
            self._held[owner] = self._held.get(owner, 0) + size
        return Share(self, size, owner)

    async def _wait_for_share(self, size: int, owner: str, is_urgent: bool) -> Share:
        self._arrivals += 1
        waiting = _Waiting(size, owner, self._arrivals, is_urgent, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(owner, {})[waiting.arrival] = waiting
        self._waiting_bytes += size
        self._timeouts.start(waiting)
        self._update_soon()
        try:
            return await waiting.share
        except asyncio.CancelledError:
            if waiting.share.done() and not waiting.share.cancelled() and waiting.share.exception() is None:
                waiting.share.result().give_back()  # it came together with the cancellation
            raise
        finally:
            self._timeouts.stop(waiting)
            if waiting.arrival in self._waiting.get(owner, ()):
                self._leave(waiting)
                self._update_soon()  # the next one may need less

    def _update_soon(self) -> None:
        """Serves and replaces once, however many come or leave in this turn of the event loop: 1500 that left with
        their connections blocked it for 100 ms."""
        if not self._update_is_due:
            self._update_is_due = True
            asyncio.get_running_loop().call_soon(self._update)

    def _update(self) -> None:
        self._update_is_due = False
        self._serve()
        self._replace()

    def _next(self) -> _Waiting:
        """The one whose turn it is."""
        firsts = [next(iter(queue.values())) for queue in self._waiting.values()]
        free = self.max_bytes - self.used
        # One that would fit but for its owner's part is not in the way of others.
        firsts = [each for each in firsts if each.size > free or each.size <= self._free(each.owner)] or firsts
        held = [self._held.get(waiting.owner, 0) for waiting in firsts]
        if self._served % ROUND == 0:
            return firsts[held.index(min(held))]
        now = self.now()
        ranks = [
            (self.promptness.of(waiting.owner, now), size + (0 if waiting.is_urgent else waiting.size))
            for waiting, size in zip(firsts, held, strict=True)
        ]
        unknown = [rank for rank in ranks if rank[0] is Standing.UNKNOWN]
        best = min(unknown) if unknown and self._served % ROUND == 1 else min(ranks)
        if best[0] is Standing.PROMPT:
            return firsts[ranks.index(best)]
        ranked = (waiting for waiting, rank in zip(firsts, ranks, strict=True) if rank == best)
        return max(ranked, key=lambda waiting: waiting.arrival)

    def _serve(self) -> None:
        """Gives shares to those whose turn it is, as long as the first of them fits, and `PER_TURN` at a time."""
        for _ in range(PER_TURN):
            if not self._waiting:
                return
            waiting = self._next()
            if waiting.size > self._free(waiting.owner):
                return
            self._leave(waiting)
            self._served += 1
            if not waiting.share.done():  # it is done if its wait was too long or has been cancelled
                waiting.share.set_result(self._share(waiting.size, waiting.owner))
        self._update_soon()

    def _leave(self, waiting: _Waiting) -> None:
        """Removes one that waits. Its owner goes behind the others."""
        queue = self._waiting.pop(waiting.owner)
        del queue[waiting.arrival]
        self._waiting_bytes -= waiting.size
        if queue:
            self._waiting[waiting.owner] = queue

    def _give_up(self, waiting: _Waiting) -> None:
        if not waiting.share.done():
            waiting.share.set_exception(self._busy())

    def _busy(self) -> ServerBusy:
        return ServerBusy(self._what, retry_after_s=self._replaceable_after_s)

    # Replacements -----------------------------------------------------------------------------------------------------

    def _replace(self) -> None:
        """Replaces as many shares as those who wait need, or as can be replaced now, and the rest later."""
        if self._next_replacement is not None:
            self._next_replacement.cancel()
            self._next_replacement = None
        if not self._waiting:
            return
        first = self._next()
        missing = self._waiting_bytes - self._free(first.owner) - sum(share.bytes for share in self._replaced)
        if missing <= 0:
            return
        # If the first would fit but for its owner's part, the shares of others are not in its way.
        idle = self._idle_shares(of=first.owner if self.used + first.size <= self.max_bytes else None)
        for share in itertools.islice(idle, PER_TURN):
            if missing <= 0:
                return
            missing -= share.bytes
            self._replaceable.pop(share, None)
            self._at_last.pop(share, None)
            self._replaced.add(share)
            assert share.on_replaced is not None, "a share that cannot be replaced is not among them"
            share.on_replaced()
        if missing <= 0:
            return
        if len(idle) > PER_TURN:
            self._update_soon()
        elif self._replaceable:
            next_at = min(share.since for share in self._replaceable) + self._replaceable_after_s
            timers = self._timers or asyncio.get_running_loop()
            self._next_replacement = timers.call_later(max(RETRY_S, next_at - self.now()), self._replace)

    def _idle_shares(self, of: str | None) -> list[Share]:
        """The shares that can be replaced now, in the order in which they should be; ``of``: those of one owner."""
        if not self._replaceable and self._at_last and self.used == sum(share.bytes for share in self._at_last):
            return [next(reversed(self._at_last))]  # one, so that the others go on
        idle_since = self.now() - self._replaceable_after_s
        held, now = dict(self._held), self.now()
        ranked = []
        for share in sorted(self._replaceable, key=lambda share: share.since, reverse=True):
            if share.bytes and share.since <= idle_since and of in (None, share.owner):
                ranked.append((held[share.owner], self.promptness.of(share.owner, now), share.since, share))
                held[share.owner] -= share.bytes
        return [share for *_, share in sorted(ranked, key=lambda rank: rank[:3], reverse=True)]


class _Waiting(NamedTuple):
    """One that waits for a share."""

    size: int
    owner: str
    arrival: int
    is_urgent: bool
    share: asyncio.Future[Share]
