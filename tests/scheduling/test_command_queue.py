"""Pending commands: turns of their owners, and the part of the device's time that they may take."""

import asyncio

import pytest

from gramophone_server.domain.commands import TakePicture
from gramophone_server.scheduling.command_queue import COMMANDS_PART, CommandQueue, PendingCommand
from tests.support.clock import ManualClock
from tests.support.observers import Recorder


def pending(owner="one"):
    return PendingCommand(owner, Recorder(ManualClock()), TakePicture(), asyncio.Future())


def queue_of(*commands):
    queue = CommandQueue()
    for command in commands:
        queue.add(command)
    return queue


def taken(queue):
    """All commands, in the order in which they are taken while no job runs."""
    return list(iter(lambda: queue.take(jobs_run=False), None))


async def test_owners_take_turns_and_the_commands_of_one_are_in_order():
    many, few = [pending("many") for _ in range(3)], [pending("few") for _ in range(2)]
    assert taken(queue_of(*many, *few)) == [many[0], few[0], many[1], few[1], many[2]]


async def test_an_owner_who_sends_again_waits_for_the_turns_of_others():
    first, again, other = pending("one"), pending("one"), pending("other")
    queue = queue_of(first, other)
    assert queue.take(jobs_run=False) is first
    queue.add(again)
    assert taken(queue) == [other, again]


async def test_a_removed_command_is_not_taken_and_one_that_was_taken_is_not_removed():
    first, second, third = pending(), pending(), pending("other")
    queue = queue_of(first, second, third)
    queue.remove(first)
    assert len(queue) == 2 and taken(queue) == [second, third] and len(queue) == 0
    queue.remove(second)
    queue.add(first)
    queue.remove(second)
    assert taken(queue) == [first]


@pytest.mark.parametrize(("command_s", "turn_s"), [(0.025, 0.02), (0.001, 0.02), (0.5, 0.02), (0.025, 30.0)])
async def test_beside_jobs_commands_take_their_part_of_the_time_and_no_more(command_s, turn_s):
    queue, commands_s, turns_s = queue_of(*(pending() for _ in range(6000))), 0.0, 0.0
    for _ in range(2000 if turn_s < 1 else 20):
        while queue.take(jobs_run=True) is not None:
            queue.charge(command_s)
            commands_s += command_s
        queue.earn(turn_s)
        turns_s += turn_s
    assert commands_s / (commands_s + turns_s) == pytest.approx(1 / COMMANDS_PART, rel=0.1)


async def test_an_hour_without_commands_allows_no_more_at_once_than_a_moment_without():
    def at_once(turns):
        queue, executed = queue_of(*(pending() for _ in range(1000))), 0
        for _ in range(turns):
            queue.earn(0.02)
        while queue.take(jobs_run=True) is not None:
            queue.charge(0.001)
            executed += 1
        return executed

    assert at_once(turns=180_000) == at_once(turns=1) > 1


async def test_while_no_job_runs_commands_wait_for_nothing():
    queue = queue_of(pending(), pending())
    queue.charge(1.0)
    assert queue.take(jobs_run=True) is None
    assert len(taken(queue)) == 2
