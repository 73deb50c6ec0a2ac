"""Work that calls share, and the turns of connections."""

import asyncio
import contextlib
import functools
import random
import threading
import time
from collections import Counter

import pytest

from gramophone_server.config import ENCODERS, QUICK_ENCODERS
from gramophone_server.rpc.encoders import QUICK_S, RESULTS_PART, Encoders
from tests.support.clock import WITHIN_S, until


class Work:
    """Work whose pieces wait until the test lets them go on. `begun` and `done` have their names."""

    def __init__(self):
        self.go = threading.Event()
        self.begun, self.done = [], []

    def piece(self, name):
        def make():
            self.begun.append(name)
            assert self.go.wait(WITHIN_S), "the test did not set `go`"
            self.done.append(name)
            return name

        return make


@pytest.fixture
async def encoders():
    encoders = Encoders()
    yield encoders
    encoders.close()


@pytest.fixture
def work():
    work = Work()
    yield work
    work.go.set()


@pytest.fixture
async def one_thread(encoders):
    """All but one of the threads that do long work are busy. So the order of this is that of the turns."""
    busy = Work()
    async with contextlib.AsyncExitStack() as stack:
        tasks = [asyncio.create_task(use(encoders, {}, i, busy.piece(i), f"busy {i}")) for i in range(ENCODERS - 1)]
        stack.callback(busy.go.set)
        await until(lambda: len(busy.begun) == ENCODERS - 1)
        yield
    await asyncio.gather(*tasks)


async def use(encoders, users, key, make, connection, *, seconds=1.0, **options):
    with encoders.sharing(users, key, make, connection, seconds=seconds, **options) as shared:
        return await shared.result()


def start(encoders, work, name, connection, **options):
    return asyncio.create_task(use(encoders, {}, name, work.piece(name), connection, **options))


async def first(encoders, work, connection="first"):
    """A piece that has been begun, so that all others wait."""
    task = start(encoders, work, "first", connection)
    await until(lambda: work.begun == ["first"])
    return task


# What is shared -------------------------------------------------------------------------------------------------------


async def test_equal_work_is_done_once_and_forgotten(encoders, work):
    users = {}
    calls = [asyncio.create_task(use(encoders, users, "a", work.piece("a"), f"connection {i % 3}")) for i in range(9)]
    await until(lambda: users and users["a"].users == 9)
    work.go.set()
    assert await asyncio.gather(*calls) == ["a"] * 9
    assert work.done == ["a"] and users == {} and encoders.waiting == 0


async def test_the_outcome_of_a_result_is_kept(encoders, work):
    users = {}
    work.go.set()
    for _ in range(3):
        assert await use(encoders, users, "a", work.piece("a"), "connection", is_result=True) == "a"
    assert work.done == ["a"] and len(users) == 1


async def test_an_error_reaches_all_and_is_not_kept(encoders):
    users = {}

    def fail():
        raise MemoryError("no memory")

    calls = [use(encoders, users, "a", fail, "connection", is_result=True) for _ in range(3)]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, MemoryError)
    assert users == {}


async def test_the_work_of_a_connection_that_has_left_is_not_done(encoders, work, one_thread):
    begun, users = await first(encoders, work, "connection"), {}
    calls = [asyncio.create_task(use(encoders, users, i, work.piece(i), "connection")) for i in range(50)]
    stays = asyncio.create_task(use(encoders, users, 49, work.piece(49), "other"))
    await until(lambda: len(users) == 50 and users[49].users == 2)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert encoders.waiting == 1 and users.keys() == {49}
    work.go.set()
    assert await stays == 49 and await begun == "first"
    assert work.done == ["first", 49] and users == {}


# Turns ----------------------------------------------------------------------------------------------------------------


async def test_connections_take_turns(encoders, work, one_thread):
    tasks = [await first(encoders, work, "many")]
    tasks += [start(encoders, work, f"many {i}", "many") for i in range(100)]
    await until(lambda: encoders.waiting == 100)
    tasks += [start(encoders, work, f"other {i}", f"other {i}") for i in range(3)]
    await until(lambda: encoders.waiting == 103)
    work.go.set()
    await asyncio.gather(*tasks)
    assert {f"other {i}" for i in range(3)} < set(work.done[1:5])
    assert [name for name in work.done if "many" in name] == [f"many {i}" for i in range(100)]


async def test_little_work_does_not_wait_behind_the_large_work_of_many_connections(encoders, work, one_thread):
    tasks = [await first(encoders, work)]
    tasks += [start(encoders, work, f"large {i}", f"watcher {i}", seconds=0.5) for i in range(30)]
    await until(lambda: encoders.waiting == 30)
    tasks += [start(encoders, work, "small", "other", seconds=0.06)]
    await until(lambda: encoders.waiting == 31)
    work.go.set()
    await asyncio.gather(*tasks)
    assert work.done[:2] == ["first", "small"]


async def test_connections_have_equal_parts_of_the_time(encoders, work, one_thread):
    tasks = [await first(encoders, work)]
    tasks += [start(encoders, work, "large", "a", seconds=1.0) for _ in range(10)]
    tasks += [start(encoders, work, "small", "b", seconds=0.1) for _ in range(100)]
    await until(lambda: encoders.waiting == 110)
    work.go.set()
    await asyncio.gather(*tasks)
    assert 9 <= work.done[: work.done.index("large")].count("small") <= 10
    for turns in range(11, 111, 11):
        assert abs(work.done[1 : 1 + turns].count("large") - turns // 11) <= 1


async def test_large_work_has_its_turn_in_a_stream_of_little_work_of_new_connections(encoders, work, one_thread):
    async def stream(name):
        for i in range(20):
            await use(encoders, {}, i, work.piece("small"), f"{name} {i}", seconds=0.1)

    begun = await first(encoders, work)
    streams = [asyncio.create_task(stream(name)) for name in "abc"]
    large = start(encoders, work, "large", "other", seconds=0.5)
    await until(lambda: encoders.waiting == 4)
    work.go.set()
    await asyncio.gather(begun, large, *streams)
    # Each stream has as much as the large work, five pieces, and one more at equal ends; fewer where the next ones come
    # after the thread has looked for them.
    assert work.done.index("large") <= 1 + 3 * 5 + 3


async def test_a_thread_is_free_for_quick_work(encoders, work):
    long = [start(encoders, work, f"long {i}", f"connection {i}", seconds=1.01 * QUICK_S) for i in range(50)]
    await until(lambda: encoders.waiting == 50 - ENCODERS)
    for i in range(3):  # all in turn, while nothing else goes on; also behind the long work of the same connection
        assert await use(encoders, {}, i, lambda: "quick", f"connection {i}", seconds=QUICK_S) == "quick"
    assert encoders.waiting == 50 - ENCODERS and not work.done
    work.go.set()
    await asyncio.gather(*long)


async def test_shared_work_is_done_in_the_first_turn_of_those_that_wait_for_it(encoders, work, one_thread):
    users = {}
    tasks = [await first(encoders, work, "many")]
    tasks += [asyncio.create_task(use(encoders, users, i, work.piece(i), "many")) for i in range(100)]
    await until(lambda: encoders.waiting == 100)
    joined = asyncio.create_task(use(encoders, users, 99, work.piece("not done"), "other"))
    await until(lambda: users[99].users == 2)
    work.go.set()
    await joined
    assert work.done.index(99) <= 2
    await asyncio.gather(*tasks)
    assert sorted(work.done[1:], key=str) == sorted(range(100), key=str)


async def test_shared_work_counts_only_for_the_connection_whose_turn_it_was(encoders, work, one_thread):
    """One that joined others in all of their work has its own turns undiminished."""
    tasks, users = [await first(encoders, work)], {}
    for i in range(5):
        tasks += [asyncio.create_task(use(encoders, users, i, work.piece("shared"), "a", seconds=0.2))]
    await until(lambda: encoders.waiting == 5)
    tasks += [start(encoders, work, "of its own", "b", seconds=0.3)]
    for i in range(5):
        tasks += [asyncio.create_task(use(encoders, users, i, work.piece("not done"), "b", seconds=0.2))]
    await until(lambda: len(users) == 5 and all(shared.users == 2 for shared in users.values()))
    work.go.set()
    await asyncio.gather(*tasks)
    assert work.done == ["first", "shared", "of its own", *["shared"] * 4]


async def test_results_come_first_and_leave_the_rest_a_fifth(encoders, work, one_thread):
    tasks = [await first(encoders, work)]
    tasks += [start(encoders, work, "frame", f"watcher {i}") for i in range(40)]
    await until(lambda: encoders.waiting == 40)
    tasks += [start(encoders, work, "result", f"job {i}", is_result=True) for i in range(40)]
    await until(lambda: encoders.waiting == 80)
    work.go.set()
    await asyncio.gather(*tasks)
    assert work.done[1:5] == ["result"] * 4
    for turns in range(5, 50, 5):
        assert abs(work.done[1 : 1 + turns].count("result") - RESULTS_PART * turns) <= 1


# Threads --------------------------------------------------------------------------------------------------------------


async def test_the_quick_thread_waits_while_others_do_quick_work(encoders, work):
    """It would only take Python's lock from the event loop."""
    tasks = [start(encoders, work, i, f"connection {i}", seconds=QUICK_S) for i in range(10)]
    await until(lambda: len(work.begun) >= ENCODERS)
    await asyncio.sleep(0.05)
    assert len(work.begun) == ENCODERS and encoders.waiting == 10 - ENCODERS
    work.go.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("seed", range(5))
async def test_all_work_is_done_within_the_numbers_of_threads(encoders, seed):
    """Of any length, of any connections, whoever leaves meanwhile."""
    chance, lock, running, most, users = random.Random(seed), threading.Lock(), Counter(), Counter(), {}

    def make(is_long, naps):
        with lock:
            running.update(["all", "long"] if is_long else ["all"])
            most.update({name: count - most[name] for name, count in running.items() if count > most[name]})
        for _ in range(naps):
            time.sleep(0.0001)  # lets other threads run
        with lock:
            running.subtract(["all", "long"] if is_long else ["all"])

    async def call(i):
        seconds = chance.choice([0.3, 0.1, 0.01])
        await asyncio.sleep(chance.random() / 50)
        work = functools.partial(make, seconds > QUICK_S, chance.randrange(5))
        await use(
            encoders,
            users,
            (i % 150, seconds),
            work,
            f"connection {chance.randrange(9)}",
            seconds=seconds,
            is_result=seconds == 0.1,
        )

    calls = [asyncio.create_task(call(i)) for i in range(300)]
    for task in chance.sample(calls, 60):
        await asyncio.sleep(0)
        task.cancel()
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
    assert encoders.waiting == 0 and all(shared.users == 0 for shared in users.values())
    await until(lambda: running["all"] == 0)
    assert most["long"] <= ENCODERS and most["all"] <= ENCODERS + QUICK_ENCODERS
