"""The mailbox of a watcher, between a job and its reader."""

import asyncio

from gramophone_server.domain.events import Accepted, Frame, Picture
from gramophone_server.jobs.mailbox import FrameRule, Mailbox


async def test_an_unread_frame_is_replaced_and_counts_as_dropped():
    mailbox, now = Mailbox(asyncio.get_running_loop(), FrameRule()), 100.0
    assert mailbox.wants_frame(1, now)
    mailbox.put(1, Frame(1, Picture(None)))
    assert not mailbox.wants_frame(2, now + 0.05)  # not due, so not dropped either
    for number, at in enumerate((0.2, 0.4, 0.6), 2):
        assert mailbox.wants_frame(number + 1, now + at)
        mailbox.put(number, Frame(number + 1, Picture(None)))
    reader = mailbox.events()
    number, frame = await anext(reader)
    assert (number, frame.iteration, frame.dropped) == (4, 5, 3)
    assert mailbox.wants_frame(6, now + 1.4)
    mailbox.put(5, Frame(6, Picture(None)))
    number, frame = await anext(reader)
    assert (number, frame.iteration, frame.dropped) == (5, 6, 0)


async def test_many_events_make_one_wake_up(monkeypatch):
    loop, calls = asyncio.get_running_loop(), []
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: calls.append(call))
    mailbox = Mailbox(loop)
    for position in range(100):
        mailbox.put(position, Accepted(position))
    assert len(calls) == 1
