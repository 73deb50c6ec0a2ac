"""The mailbox of a watcher, between a job and its reader."""

import asyncio
import random
from collections import Counter

import pytest

from gramophone.recipe import Recipe
from gramophone_server.domain.events import (
    Accepted,
    Changed,
    Frame,
    Paused,
    Picture,
    Resumed,
    Saved,
    SavedState,
    Waiting,
)
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule, Mailbox
from tests.support.jobs import finished, progress, unread


async def test_an_unread_frame_is_replaced_and_counts_as_dropped():
    mailbox, now = Mailbox(asyncio.get_running_loop(), FrameRule()), 100.0
    assert mailbox.wants_frame(1, now)
    mailbox.put(1, Frame(1, Picture(None, 1, 1)))
    assert not mailbox.wants_frame(2, now + 0.05)  # not due, so not dropped either
    for number, at in enumerate((0.2, 0.4, 0.6), 2):
        assert mailbox.wants_frame(number + 1, now + at)
        mailbox.put(number, Frame(number + 1, Picture(None, 1, 1)))
    number, frame = await mailbox.read()
    assert (number, frame.iteration, frame.dropped) == (4, 5, 3)
    assert mailbox.wants_frame(6, now + 1.4)
    mailbox.put(5, Frame(6, Picture(None, 1, 1)))
    number, frame = await mailbox.read()
    assert (number, frame.iteration, frame.dropped) == (5, 6, 0)


async def test_many_events_make_one_wake_up(monkeypatch):
    loop, calls = asyncio.get_running_loop(), []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: calls.append(call))
    mailbox = Mailbox(loop)
    for position in range(100):
        mailbox.put(position, Accepted(position))
    assert len(calls) == 1


# Slow readers ---------------------------------------------------------------------------------------------------------


class Publisher:
    """Puts events into mailboxes, under common numbers."""

    def __init__(self, *mailboxes):
        self.mailboxes = mailboxes
        self.number = 0

    def put(self, *events):
        for event in events:
            self.number += 1
            for mailbox in self.mailboxes:
                mailbox.put(self.number, event)


def frame(iteration):
    return Frame(iteration, Picture(None, 1, 1))


def saved(iteration):
    return Saved(iteration, SavedState(False, bytes, 0))


def changed(iteration):
    return Changed(iteration, Recipe(beta=float(iteration)), 10)


def take(mailbox):
    number, event = mailbox.read_nowait()
    return number, type(event).__name__, event


async def test_unread_events_are_bounded_and_of_each_kind_the_newest_waits():
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule(), CheckpointRule())
    publisher = Publisher(mailbox)
    publisher.put(Accepted(0))
    for i in range(1, 500):
        publisher.put(Waiting(i), progress(i), frame(i), saved(i), Paused(i), changed(i), Resumed(i))
        assert mailbox.unread <= 7
    assert take(mailbox)[1] == "Accepted"
    for i in range(500, 1000):
        publisher.put(Waiting(i), progress(i), frame(i), saved(i), Paused(i), changed(i), Resumed(i))
    publisher.put(finished())
    items = unread(mailbox)
    numbers = [number for number, _ in items]
    assert numbers == sorted(set(numbers))
    newest = {type(event).__name__: event for _, event in items}
    assert newest["Changed"].recipe.beta == newest["Frame"].iteration == newest["Saved"].iteration == 999
    assert newest["Resumed"] == Resumed(999) and "Paused" not in newest  # the last of the two is what holds
    assert list(newest)[-1] == "Finished"


@pytest.mark.parametrize("seed", range(20))
async def test_numbers_grow_and_the_newest_of_each_kind_arrives_whatever_happens(seed):
    chance = random.Random(seed)
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule(), CheckpointRule())
    publisher = Publisher(mailbox)
    kinds = {Waiting: "wait", frame: "frame", saved: "saved", Paused: "pause", Resumed: "pause", changed: "changed"}
    names = {Waiting: "wait", Frame: "frame", Saved: "saved", Paused: "pause", Resumed: "pause", Changed: "changed"}
    sent, received = [], []
    for i in range(1, 400):
        make = chance.choice([*kinds, progress])
        event = make(i)
        publisher.put(event)
        sent.append((kinds.get(make, "progress"), i))
        assert mailbox.unread <= 12
        while chance.random() < 0.3 and (item := mailbox.read_nowait()):
            if chance.random() < 0.3 and isinstance(item[1], Frame | Saved):
                mailbox.put_back(*item)
            else:
                received.append(item)
    received += unread(mailbox)
    numbers = [number for number, _ in received]
    assert numbers == sorted(set(numbers))
    by_number = dict(enumerate(sent, 1))
    arrived = {by_number[number] for number in numbers}
    for name in names.values():
        assert [one for one in sent if one[0] == name][-1] in arrived, name
    frames = [event for _, event in received if isinstance(event, Frame)]
    assert len(frames) + sum(event.dropped for event in frames) == sum(name == "frame" for name, _ in sent)


@pytest.mark.parametrize("every", [2, 7, 30])
async def test_a_slow_reader_gets_every_kind_in_turn_and_frames_are_new(every):
    """In each step, progress and a frame are published, in every tenth step a checkpoint; the reader takes one event in
    ``every`` steps."""
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule(), CheckpointRule())
    publisher = Publisher(mailbox)
    received = []
    for step in range(1, 40 * every):
        publisher.put(progress(step), frame(step))
        if step % 10 == 0:
            publisher.put(saved(step), changed(step))
        if step % every == 0:
            _, kind, event = take(mailbox)
            received.append(kind)
            if kind == "Frame":
                assert step - event.iteration <= 3 * every  # the newest before the rest of its round
    counts = Counter(received)
    assert all(counts[kind] >= len(received) // 5 for kind in ("Progress", "Frame", "Saved", "Changed")), counts


async def test_a_reader_of_frames_that_takes_two_a_second_gets_the_newest_of_ten():
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule())
    publisher = Publisher(mailbox)
    received = []
    for step in range(1, 200):
        publisher.put(progress(step), frame(step))
        if step % 5 == 0:
            _, kind, event = take(mailbox)
            received.append(kind)
            assert kind == "Progress" or event.iteration == step
    assert received.count("Frame") >= len(received) // 2 - 1


async def test_an_event_that_is_put_back_is_read_again_unless_a_newer_one_came():
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule(max_in_flight=1))
    publisher = Publisher(mailbox)
    publisher.put(frame(1), frame(2), changed(1))
    first = mailbox.read_nowait()
    mailbox.put_back(*first)
    again = mailbox.read_nowait()
    assert (again[0], again[1].iteration, again[1].dropped) == (2, 2, 1)
    mailbox.put_back(*again)
    publisher.put(frame(3))
    assert [(number, getattr(event, "dropped", None)) for number, event in unread(mailbox)] == [(3, None), (4, 2)]
    mailbox.acknowledge(4)
    assert mailbox.wants_frame(5, 1e9), "none that was put back is in flight"


# The lag of a reader --------------------------------------------------------------------------------------------------


class Reader:
    """A reader whose clock the test moves."""

    def __init__(self, mailbox):
        self.blocked_s = 0.0
        mailbox.reader_clock = lambda: self.blocked_s


async def test_lag_is_what_the_oldest_kind_has_waited_and_is_not_reset_by_newer_events():
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule())
    reader, publisher = Reader(mailbox), Publisher(mailbox)
    publisher.put(progress(1))
    take(mailbox)
    assert mailbox.lag_s() == 0
    for step in range(1, 101):
        publisher.put(progress(step), frame(step))
        reader.blocked_s = step / 10
    assert mailbox.lag_s() == pytest.approx(10.0)
    assert take(mailbox)[1] == "Progress"
    assert mailbox.lag_s() == pytest.approx(10.0)  # of the report that is being sent now, and of the frame
    assert take(mailbox)[1] == "Frame"
    publisher.put(progress(101))
    assert mailbox.lag_s() == pytest.approx(10.0)
    assert take(mailbox)[1] == "Progress"
    assert mailbox.lag_s() == 0


@pytest.mark.parametrize(("seconds", "is_cut"), [(0.5, False), (5.0, False), (20.0, True)])
async def test_a_reader_of_one_event_in_20_s_lags_by_more_than_30(seconds, is_cut):
    mailbox = Mailbox(asyncio.get_running_loop(), FrameRule())
    reader, publisher = Reader(mailbox), Publisher(mailbox)
    most = 0.0
    for step in range(1, 4000):
        publisher.put(progress(step), frame(step))
        reader.blocked_s = step / 10
        if step % round(10 * seconds) == 0:
            take(mailbox)
        most = max(most, mailbox.lag_s()) if step > 1 else 0.0
    assert (most >= 30) is is_cut
    assert most <= 3 * seconds + 0.2


async def test_a_missed_event_waits_since_its_reader_came():
    missed = [(1, Accepted(0)), (2, progress(1)), (3, progress(2))]
    mailbox = Mailbox(asyncio.get_running_loop(), missed=missed)
    reader = Reader(mailbox)
    take(mailbox)
    reader.blocked_s = 31.0
    assert mailbox.lag_s() == 31.0
    assert [number for number, _ in unread(mailbox)] == [2, 3], "none that was missed replaces another"
