"""Many waits that end after the same time have one timer, and end a few at a time."""

import asyncio
from collections import Counter

from gramophone_server.rpc.timeouts import PER_TURN, Timeouts
from tests.support.clock import ManualLoop, until


def test_each_wait_ends_at_its_own_time():
    loop, ended = ManualLoop(), []
    timeouts = Timeouts(5, lambda wait: ended.append((wait, loop.time())), loop)
    for wait in ("first", "second", "stopped", "third"):
        timeouts.start(wait)
        loop.advance(1)
    timeouts.stop("stopped")
    timeouts.stop("unknown")
    assert len(loop.timers) == 1
    start = loop.time() - 4
    loop.advance(20)
    assert ended == [("first", start + 5), ("second", start + 6), ("third", start + 8)]
    assert loop.timers == []


async def test_a_crowd_ends_a_few_in_each_turn_of_the_loop():
    loop, ended = asyncio.get_running_loop(), []
    turn = 0

    def next_turn():
        nonlocal turn
        turn += 1
        loop.call_soon(next_turn)

    next_turn()
    timeouts = Timeouts(0.001, lambda _: ended.append(turn))
    for wait in range(3 * PER_TURN + 1):
        timeouts.start(wait)
    await until(lambda: len(ended) == 3 * PER_TURN + 1)
    assert max(Counter(ended).values()) == PER_TURN


def test_one_that_starts_anew_after_its_end_ends_again():
    loop, ended = ManualLoop(), []
    timeouts = Timeouts(5, ended.append, loop)
    for _ in range(2):
        timeouts.start("wait")
        loop.advance(6)
    assert ended == ["wait", "wait"]


def test_nothing_ends_after_close():
    loop, ended = ManualLoop(), []
    timeouts = Timeouts(5, ended.append, loop)
    timeouts.start("wait")
    timeouts.close()
    loop.advance(10)
    assert ended == [] and loop.timers == []
