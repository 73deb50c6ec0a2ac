"""Work that calls share, and the turns of connections."""

import asyncio
import threading

import pytest

from gramophone_server.config import ENCODERS
from gramophone_server.rpc.encoders import QUICK_AHEAD, Encoders
from tests.support.clock import until


class Work:
    """Work whose pieces wait until the test lets them go on. `done` has their names, in the order of their starts."""

    def __init__(self):
        self.go = threading.Event()
        self.done = []

    def piece(self, name):
        def make():
            assert self.go.wait(10), "the test did not set `go`"
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


async def use(encoders, users, key, make, connection, **options):
    with encoders.sharing(users, key, make, connection, **options) as shared:
        return await shared.result()


async def test_equal_work_is_done_once_and_forgotten(encoders, work):
    users = {}
    calls = [asyncio.create_task(use(encoders, users, "a", work.piece("a"), f"connection {i % 3}")) for i in range(9)]
    await until(lambda: users and users["a"].users == 9)
    work.go.set()
    assert await asyncio.gather(*calls) == ["a"] * 9
    assert work.done == ["a"] and users == {} and encoders.waiting == 0


async def test_work_may_be_kept(encoders, work):
    users = {}
    work.go.set()
    for _ in range(3):
        assert await use(encoders, users, "a", work.piece("a"), "connection", keep=True) == "a"
    assert work.done == ["a"] and len(users) == 1


async def test_an_error_reaches_all_and_is_not_kept(encoders):
    users = {}

    def fail():
        raise MemoryError("no memory")

    calls = [use(encoders, users, "a", fail, "connection", keep=True) for _ in range(3)]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, MemoryError)
    assert users == {}


async def test_connections_take_turns(encoders, work):
    many = [asyncio.create_task(use(encoders, {}, i, work.piece(f"many {i}"), "many")) for i in range(100)]
    await until(lambda: encoders.waiting == 100 - ENCODERS)
    others = [asyncio.create_task(use(encoders, {}, 0, work.piece(f"other {i}"), f"other {i}")) for i in range(3)]
    await until(lambda: encoders.waiting == 103 - ENCODERS)
    work.go.set()
    await asyncio.gather(*others)
    # All that were being done, and one more of the connection that came first.
    assert max(work.done.index(f"other {i}") for i in range(3)) <= ENCODERS + 1 + 2 + 1
    await asyncio.gather(*many)


async def test_a_few_quick_pieces_wait_behind_each_thread_and_slow_ones_do_not(encoders, work):
    given = ENCODERS * (1 + QUICK_AHEAD)
    calls = [use(encoders, {}, i, work.piece(f"quick {i}"), "many", quick=True) for i in range(100)]
    many = [asyncio.create_task(call) for call in calls]
    await until(lambda: encoders.waiting == 100 - given)
    others = [asyncio.create_task(use(encoders, {}, i, work.piece(f"slow {i}"), f"other {i}")) for i in range(2)]
    await until(lambda: encoders.waiting == 102 - given)
    work.go.set()
    await asyncio.gather(*others)
    assert max(work.done.index(f"slow {i}") for i in range(2)) <= given + 1 + 1 + given
    await asyncio.gather(*many)


async def test_shared_work_is_done_in_the_first_turn_of_those_who_wait_for_it(encoders, work):
    users = {}
    many = [asyncio.create_task(use(encoders, users, i, work.piece(i), "many")) for i in range(100)]
    await until(lambda: encoders.waiting == 100 - ENCODERS)
    joined = asyncio.create_task(use(encoders, users, 99, work.piece("not done"), "other"))
    await until(lambda: users[99].users == 2)
    work.go.set()
    await joined
    assert work.done.index(99) <= ENCODERS + 1
    await asyncio.gather(*many)
    assert sorted(work.done) == list(range(100))


async def test_the_work_of_a_connection_that_has_left_is_not_done(encoders, work):
    users = {}
    calls = [asyncio.create_task(use(encoders, users, i, work.piece(i), "connection")) for i in range(50)]
    stays = asyncio.create_task(use(encoders, users, 49, work.piece(49), "other"))
    await until(lambda: len(users) == 50 and users[49].users == 2)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert encoders.waiting == 1 and users.keys() == {49}
    work.go.set()
    assert await stays == 49
    await until(lambda: len(work.done) == ENCODERS + 1)
    assert sorted(work.done) == [*range(ENCODERS), 49] and users == {}
