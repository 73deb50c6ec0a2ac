"""Whose turn it is when all bytes are used, and whom the others replace."""

import asyncio
import itertools
import random

import pytest

from gramophone_server.errors import ServerBusy
from gramophone_server.rpc.byte_budget import ByteBudget
from gramophone_server.rpc.timeouts import PER_TURN
from tests.support.clock import ManualLoop


async def settle():
    """Lets all tasks run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def taking(budget, size, owner, served=None, *, is_urgent=False):
    """A task that takes a share and adds its owner to `served`."""

    async def take():
        share = await budget.take(size, owner, is_urgent=is_urgent)
        if served is not None:
            served.append(owner)
        return share

    return asyncio.create_task(take())


async def test_shares_add_up_and_are_given_back_once():
    budget = ByteBudget(100)
    share = budget.try_take(60)
    assert budget.used == 60
    assert budget.try_take(41) is None
    with budget.try_take(40):
        assert budget.used == 100
    share.shrink_to(10)
    share.shrink_to(20)  # changes nothing: a share does not grow
    assert budget.used == share.bytes == 10
    share.give_back()
    share.give_back()
    assert budget.used == share.bytes == 0


async def test_an_owner_that_holds_nothing_is_forgotten():
    budget = ByteBudget(100)
    with budget.try_take(0, "a"):
        assert budget.owners == 0
    with budget.try_take(1, "a"), budget.try_take(1, "b"):
        assert budget.owners == 2
    assert budget.owners == 0


async def test_more_than_the_whole_budget_is_a_mistake_of_the_caller():
    budget = ByteBudget(100)
    assert budget.try_take(101) is None
    with pytest.raises(ValueError, match="101 bytes are more than the whole budget of 100"):
        await budget.take(101)


async def test_a_share_absorbs_others():
    budget = ByteBudget(100)
    whole, part = await budget.take(10, "a"), await budget.take(5, "a")
    whole.absorb(part)
    part.give_back()
    assert (whole.bytes, part.bytes, budget.used) == (15, 0, 15)
    whole.give_back()
    assert budget.used == 0


async def test_none_gets_bytes_before_those_who_wait():
    budget = ByteBudget(100)
    share = budget.try_take(60)
    waiting = taking(budget, 50, "a")
    await settle()
    assert budget.waiting == 1 and budget.try_take(10) is None
    share.give_back()
    await settle()
    assert (await waiting).bytes == budget.used == 50
    assert budget.try_take(10) is not None


async def test_an_owner_that_holds_less_is_served_first():
    budget = ByteBudget(30)
    first = [await budget.take(10, "a"), await budget.take(10, "a"), await budget.take(10, "b")]
    served = []
    tasks = [taking(budget, 10, owner, served) for owner in ("a", "b", "c", "a", "c")]
    await settle()
    first[0].give_back()
    await settle()
    assert served == ["c"]  # a, b and c hold 10 each now, and a was served longest ago
    first[1].give_back()
    await settle()
    assert served == ["c", "a"] or served == ["c", "c"]
    for share in first[2:]:
        share.give_back()
    for _ in tasks:
        for task in tasks:
            if task.done():
                task.result().give_back()
        await settle()
    assert sorted(served) == ["a", "a", "b", "c", "c"] and budget.used == 0


async def serve_one_after_another(budget, owners, sizes=None, urgent=""):
    """The order in which these owners, which have come in this order, get the whole budget, or so much of it."""
    served, holder = [], budget.try_take(10, "x")
    sizes = sizes or [10] * len(owners)
    tasks = [
        taking(budget, size, owner, served, is_urgent=owner in urgent)
        for owner, size in zip(owners, sizes, strict=True)
    ]
    await settle()
    holder.give_back()
    for _ in tasks:
        await settle()
        for task in tasks:
            if task.done():
                task.result().give_back()
    return served


async def test_of_unknown_owners_the_last_is_next_and_sometimes_the_first():
    """So a newcomer does not wait behind all the others, and none waits for ever."""
    assert "".join(await serve_one_after_another(ByteBudget(10), "012345")) == "054312"


async def test_prompt_owners_are_next_and_slow_ones_last():
    budget = ByteBudget(10)
    for owner in "cf":
        with budget.try_take(1, owner) as share:
            share.was_prompt()
    for owner in "bh":
        with budget.try_take(1, owner) as share:
            share.was_slow()
            share.was_prompt()  # once is not enough
    assert "".join(await serve_one_after_another(budget, "abcdefgh")) == "agcfbedh"


async def test_little_does_not_wait_behind_much_and_the_longest_wait_has_its_turns():
    """Of prompt owners that hold nothing. Every fourth share goes to the longest wait: first to a, then to b."""
    budget = ByteBudget(10)
    for owner in "abcdefgh":
        with budget.try_take(1, owner) as share:
            share.was_prompt()
    order = await serve_one_after_another(budget, "abcdefgh", sizes=[10, 10, 10, 10, 9, 8, 7, 6])
    assert "".join(order) == "ahgfbecd"


async def test_what_is_urgent_comes_before_what_is_small():
    budget = ByteBudget(10)
    for owner in "abcdefgh":
        with budget.try_take(1, owner) as share:
            share.was_prompt()
    order = await serve_one_after_another(budget, "abcdefgh", sizes=[10, 6, 6, 6, 10, 6, 10, 6], urgent="eg")
    assert "".join(order) == "aegbcdfh"


async def test_a_prompt_owner_does_not_wait_behind_a_crowd_that_holds_its_shares():
    """200 idle connections want each of the four places, which they hold for a second; see `tests.bad_input`. The other
    connection also holds a message, of a job whose images are being decoded: six users of one connection once waited
    for a minute, because 200 others held nothing."""
    loop, replaced = ManualLoop(), []
    budget = ByteBudget(41, replaceable_after_s=1, timers=loop)
    budget.try_take(1, "honest").was_prompt()
    crowd = [Holder(budget, str(i), replaced) for i in range(200)]
    await settle()
    honest = taking(budget, 10, "honest")
    crowd += [Holder(budget, str(i), replaced) for i in range(200, 400)]
    for _ in range(2):
        loop.advance(1)
        await settle()
    assert honest.done()
    for task in (honest, *(holder.task for holder in crowd)):
        task.cancel()


async def test_an_owner_with_many_calls_gets_no_more_turns():
    budget, served = ByteBudget(10), []
    holder = budget.try_take(10, "x")
    tasks = [taking(budget, 10, owner, served) for owner in (*["many"] * 20, "one", "two")]
    await settle()
    holder.give_back()
    for _ in tasks:
        await settle()
        for task in tasks:
            if task.done():
                task.result().give_back()
    assert set(served[:4]) == {"many", "one", "two"} and len(served) == 22


async def test_a_wait_that_is_too_long_is_refused():
    loop = ManualLoop()
    budget = ByteBudget(10, "the room for messages is used up", max_wait_s=5, timers=loop)
    budget.try_take(10, "a")
    waiting = taking(budget, 10, "b")
    await settle()
    loop.advance(4.9)
    await settle()
    assert not waiting.done()
    loop.advance(0.2)
    with pytest.raises(ServerBusy, match="the server is busy: the room for messages is used up; retry after about 1 s"):
        await waiting
    assert budget.waiting == 0 and budget.used == 10 and budget.try_take(0) is not None


async def test_one_that_leaves_while_it_waits_holds_nothing():
    budget = ByteBudget(10)
    holder = budget.try_take(10, "a")
    large, small = taking(budget, 10, "b"), taking(budget, 5, "c")
    await settle()
    holder.shrink_to(5)
    await settle()
    assert not small.done()  # it does not overtake the large one
    large.cancel()
    await settle()
    assert (await small).bytes == 5
    assert (budget.waiting, budget.used) == (0, 10)


async def test_a_share_that_comes_together_with_a_cancellation_is_given_back():
    budget = ByteBudget(10)
    holder = budget.try_take(10, "a")
    waiting = taking(budget, 10, "b")
    await settle()
    holder.give_back()  # the task has its share, and has not run yet
    waiting.cancel()
    await settle()
    assert waiting.cancelled() and budget.used == 0


async def test_a_crowd_that_comes_or_leaves_in_one_turn_is_looked_at_once(monkeypatch):
    """500 connections with three calls each, closed at the same time, blocked the event loop for 100 ms."""
    looks = []
    for name in ("_serve", "_replace"):
        original = getattr(ByteBudget, name)
        monkeypatch.setattr(ByteBudget, name, lambda self, original=original: (looks.append(1), original(self)))
    budget = ByteBudget(10)
    holder = budget.try_take(10, "x")
    tasks = [taking(budget, 10, str(i % 50)) for i in range(150)]
    await settle()
    assert budget.waiting == 150 and len(looks) == 2
    for task in tasks[:-1]:
        task.cancel()
    await settle()
    assert budget.waiting == 1 and len(looks) == 4
    holder.give_back()
    assert (await tasks[-1]).bytes == budget.used == 10


class Holder:
    """Takes a share that others can replace."""

    def __init__(self, budget, owner, replaced):
        self.owner, self.replaced = owner, replaced
        self.task = asyncio.create_task(budget.take(10, owner, self.on_replaced))

    def on_replaced(self):
        self.replaced.append(self.owner)
        asyncio.get_running_loop().call_soon(self.task.result().give_back)


async def test_idle_shares_are_replaced_when_others_wait():
    loop, replaced = ManualLoop(), []
    budget = ByteBudget(40, replaceable_after_s=1, timers=loop)
    for owner in ("a", "b", "b", "b"):
        Holder(budget, owner, replaced)
        loop.advance(0.1)
        await settle()
    loop.advance(100)
    assert replaced == []  # none waits
    waiting = [taking(budget, 10, owner) for owner in ("c", "d")]
    await settle()
    assert replaced == ["b", "b"]
    assert [task.done() for task in waiting] == [True, True] and budget.used == 40
    third = taking(budget, 10, "e")
    await settle()
    assert third.done() and len(replaced) == 3


async def test_no_share_is_replaced_before_its_time():
    loop, replaced = ManualLoop(), []
    budget = ByteBudget(20, replaceable_after_s=1, timers=loop)
    holders = [Holder(budget, "a", replaced), Holder(budget, "b", replaced)]
    await settle()
    waiting = taking(budget, 10, "c")
    await settle()
    loop.advance(0.9)
    holders[1].task.result().touch()
    loop.advance(0.2)
    await settle()
    assert replaced == ["a"] and waiting.done()
    another = taking(budget, 10, "d")
    await settle()
    assert not another.done()
    loop.advance(1)
    await settle()
    assert replaced == ["a", "b"] and another.done()


async def test_of_one_owner_the_newest_share_is_replaced():
    """The others may be nearly done; if all were replaced in turn, none would ever be."""
    loop, replaced = ManualLoop(), []
    budget = ByteBudget(20, replaceable_after_s=1, timers=loop)
    old, new = Holder(budget, "a", replaced), None
    await settle()
    loop.advance(0.5)
    new = Holder(budget, "a", replaced)
    await settle()
    loop.advance(5)
    waiting = taking(budget, 10, "b")
    await settle()
    assert waiting.done() and new.task.result().bytes == 0 and old.task.result().bytes == 10


async def test_what_is_in_the_servers_hands_cannot_be_replaced():
    loop, replaced = ManualLoop(), []
    budget = ByteBudget(10, replaceable_after_s=1, max_wait_s=5, timers=loop)
    holder = Holder(budget, "a", replaced)
    await settle()
    budget.forget(holder.task.result())
    waiting = taking(budget, 10, "b")
    await settle()
    loop.advance(6)
    with pytest.raises(ServerBusy):
        await waiting
    assert replaced == []


async def test_one_owner_leaves_a_part_for_newcomers():
    budget = ByteBudget(100, of_one=0.75)
    while (share := budget.try_take(5, "many")) is not None:
        assert share.bytes == 5
    assert budget.used == 75
    newcomer = budget.try_take(25, "one")  # one that holds nothing gets all that is free
    assert newcomer is not None and budget.try_take(1, "many") is None
    newcomer.shrink_to(5)
    assert budget.try_take(1, "many") is None  # three quarters of the 95 that the other leaves are 71
    assert budget.try_take(10, "one") is not None


async def test_a_prompt_owner_at_its_part_is_not_in_the_way_of_newcomers():
    budget, served = ByteBudget(40, of_one=0.75), []
    for _ in range(3):
        budget.try_take(10, "busy").was_prompt()
    for owner in ("busy", "busy", "newcomer"):
        taking(budget, 10, owner, served)
        await settle()
    assert served == ["newcomer"]


async def test_of_an_owner_at_its_part_only_its_own_shares_are_replaced():
    """The shares of others are not in its way."""
    loop, replaced = ManualLoop(), []
    budget = ByteBudget(40, of_one=0.75, replaceable_after_s=1, timers=loop)
    for owner in ("many", "many", "one"):
        Holder(budget, owner, replaced)
        await settle()
    loop.advance(5)
    waiting = taking(budget, 10, "many")
    await settle()
    assert waiting.done() and replaced == ["many"]


async def test_a_crowd_of_idle_shares_is_replaced_a_few_in_each_turn_of_the_loop():
    loop, replaced, turns = ManualLoop(), [], []
    budget = ByteBudget(1000, replaceable_after_s=1, timers=loop)
    for i in range(100):
        Holder(budget, str(i), replaced)
    await settle()
    loop.advance(5)
    waiting = taking(budget, 1000, "large")
    while not waiting.done():
        await asyncio.sleep(0)
        turns.append(len(replaced))
    assert len(replaced) == 100
    assert max(after - before for before, after in itertools.pairwise(turns)) == PER_TURN


class Collector:
    """Holds a share and waits for another one."""

    def __init__(self, budget, owner, share):
        self.owner, self.share = owner, share
        self.more = taking(budget, 10, owner)
        share.replaceable_at_last(self.on_replaced)
        self.replaced = False

    def on_replaced(self):
        self.replaced = True
        self.more.cancel()
        self.share.give_back()


async def test_one_that_waits_for_more_is_replaced_only_if_all_others_wait_too():
    """It is the server that lets it wait."""
    loop = ManualLoop()
    budget = ByteBudget(40, replaceable_after_s=1, max_wait_s=100, timers=loop)
    shares = [budget.try_take(10, owner) for owner in ("a", "b", "c")]
    busy = budget.try_take(10, "busy")
    collectors = [Collector(budget, share.owner, share) for share in shares]
    await settle()
    loop.advance(50)
    await settle()
    assert [collector.replaced for collector in collectors] == [False] * 3
    busy.give_back()  # its room goes to one of them, which gives it back when it is done
    await settle()
    served = next(collector for collector in collectors if collector.more.done())
    loop.advance(5)
    await settle()
    assert [collector.replaced for collector in collectors] == [False] * 3
    budget.forget(served.share)
    served.share.absorb(served.more.result())
    last = Collector(budget, served.owner, served.share)  # all wait now
    await settle()
    waiting = [collector for collector in (*collectors, last) if collector is not served]
    assert sum(collector.replaced for collector in waiting) == 1
    assert any(collector.more.done() and not collector.more.cancelled() for collector in waiting)


@pytest.mark.parametrize("seed", range(20))
async def test_at_any_time_the_shares_are_within_the_budget(seed):
    """Against a count of our own, with holders that leave, wait, shrink and give back at random."""
    rng, loop = random.Random(seed), ManualLoop()
    budget = ByteBudget(100, of_one=rng.choice([1, 0.75]), replaceable_after_s=1, max_wait_s=5, timers=loop)
    tasks, replaced = [], []
    for _ in range(400):
        match rng.randrange(5):
            case 0 | 1:
                owner, size = rng.choice("abc"), rng.randint(1, 60)
                tasks.append(asyncio.create_task(budget.take(size, owner, lambda: replaced.append(1))))
            case 2 if tasks:
                rng.choice(tasks).cancel()
            case 3:
                for task in rng.sample(tasks, len(tasks) // 2):
                    if task.done() and not task.cancelled() and task.exception() is None:
                        rng.choice([lambda s: s.shrink_to(rng.randint(0, 60)), lambda s: s.give_back()])(task.result())
            case _:
                loop.advance(rng.random())
        await settle()
        shares = [task.result() for task in tasks if task.done() and not task.cancelled() and task.exception() is None]
        assert budget.used == sum(share.bytes for share in shares) <= 100
    for share in shares:
        share.give_back()
    for task in tasks:
        task.cancel()
    await settle()
    for task in tasks:
        if not task.cancelled() and task.exception() is None:
            task.result().give_back()
    assert (budget.used, budget.waiting) == (0, 0)
