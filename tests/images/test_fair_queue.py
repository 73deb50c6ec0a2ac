"""Callers take turns."""

import asyncio
import contextlib
import gc
import random

import pytest

from gramophone_server.images.fair_queue import FairQueue


async def pieces(queue, *wanted):
    """Starts a task for each (owner, work); returns the tasks, and the list to which each adds its owner and number
    when it begins. A piece ends with the next pass of the loop."""
    begun, numbers = [], {}

    async def one(owner, number, work):
        async with queue.place(owner, work):
            begun.append(f"{owner}{number}")
            await asyncio.sleep(0)

    tasks = []
    for owner, work in wanted:
        numbers[owner] = number = numbers.get(owner, 0) + 1
        tasks.append(asyncio.create_task(one(owner, number, work)))
        await asyncio.sleep(0)  # so that they arrive in this order
    return tasks, begun


@contextlib.asynccontextmanager
async def occupied(queue):
    """All places of the queue are taken within the block."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(queue.free):
            await stack.enter_async_context(queue.place("first", 0))
        yield


async def order(queue, *wanted):
    async with occupied(queue):
        tasks, begun = await pieces(queue, *wanted)
        assert begun == [] and queue.waiting == len(wanted)
    await asyncio.gather(*tasks)
    assert queue.waiting == 0
    return begun


async def test_owners_take_turns():
    many, few = [("a", 32)] * 5, [("b", 32)] * 2
    assert await order(FairQueue(1), *many, *few) == ["a1", "b1", "a2", "b2", "a3", "a4", "a5"]


async def test_a_small_piece_does_not_wait_behind_the_large_ones_of_others():
    large = [(owner, 32) for owner in "abcdefgh" for _ in range(5)]
    assert (await order(FairQueue(1), *large, ("z", 1)))[0] == "z1"
    assert (await order(FairQueue(2), *large, ("z", 1)))[:2] == ["z1", "a1"]


async def test_within_one_owner_pieces_keep_their_order():
    assert await order(FairQueue(1), ("a", 32), ("a", 1), ("a", 5)) == ["a1", "a2", "a3"]


async def test_a_stream_of_small_pieces_of_new_owners_does_not_delay_a_large_one_for_ever():
    queue, served = FairQueue(1), 0

    async def small(number):
        nonlocal served
        async with queue.place(f"s{number}", 2):
            served += 1
            if not large.done():
                tasks.append(asyncio.create_task(small(number + 10)))  # the next one, so that ten always wait
                await asyncio.sleep(0)

    async with occupied(queue):
        (large,), _ = await pieces(queue, ("a", 32))
        tasks = [asyncio.create_task(small(number)) for number in range(10)]
        await asyncio.sleep(0)
    await large
    assert 100 < served < 300  # the fair share of 12 owners: each of them has had 32
    await asyncio.gather(*tasks)


async def test_whoever_leaves_while_it_waits_never_begins():
    queue = FairQueue(1)
    async with occupied(queue):
        tasks, begun = await pieces(queue, ("a", 1), ("b", 1), ("c", 1))
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert queue.waiting == 2
    await asyncio.gather(*tasks, return_exceptions=True)
    assert begun == ["a1", "c1"] and queue.free == 1


async def test_a_place_that_is_granted_to_one_who_leaves_goes_to_the_next():
    queue = FairQueue(1)
    holding = queue.place("x", 1)
    await holding.__aenter__()
    tasks, begun = await pieces(queue, ("a", 1), ("b", 1))
    tasks[0].cancel()
    await holding.__aexit__(None, None, None)  # in the same pass of the loop
    await asyncio.gather(*tasks, return_exceptions=True)
    assert begun == ["b1"] and queue.free == 1


@pytest.mark.parametrize("places", [1, 3])
async def test_places_are_never_lost_whatever_happens(places):
    chance, queue, most = random.Random(1), FairQueue(places), 0
    busy = 0

    async def one():
        nonlocal busy, most
        async with queue.place(chance.choice("abc"), chance.randrange(1, 9)):
            busy += 1
            most = max(most, busy)
            try:
                await asyncio.sleep(chance.random() / 1000)
                assert chance.random() < 0.9, "it fails"
            finally:
                busy -= 1

    tasks = [asyncio.create_task(one()) for _ in range(300)]
    while not all(task.done() for task in tasks):
        chance.choice(tasks).cancel()
        await asyncio.sleep(0)
    assert most == places == queue.free and busy == queue.waiting == 0
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_pieces_that_have_left_are_not_kept():
    def futures():
        return sum(type(kept) is type(asyncio.get_running_loop().create_future()) for kept in gc.get_objects())

    queue, before = FairQueue(1), futures()
    async with queue.place("other", 1):
        waits = asyncio.create_task(queue.place("owner", 1).__aenter__())
        await asyncio.sleep(0)
        for _ in range(100):
            leaving = asyncio.create_task(queue.place("owner", 1).__aenter__())
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
        assert queue.waiting == 1 and futures() < before + 20
        waits.cancel()
