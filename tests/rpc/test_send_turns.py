"""Messages of streams take turns with everything else on the event loop."""

import asyncio

import pytest

from gramophone_server.rpc.send_turns import MESSAGE_BYTES, TURN_BYTES, SendTurns

SENDERS = 40
LARGE = TURN_BYTES // 2  # two of them use up a turn


def send_all(turns, sizes):
    """Tasks that each send one message, and the list of those that were sent."""
    sent = []

    async def send(number, size):
        await turns.wait(size)
        sent.append(number)

    return [asyncio.create_task(send(*item)) for item in enumerate(sizes)], sent


@pytest.mark.parametrize(("size", "most"), [(LARGE, 2), (10 * TURN_BYTES, 1), (0, TURN_BYTES // MESSAGE_BYTES)])
async def test_a_burst_leaves_each_turn_of_the_loop_to_others(size, most):
    senders, sent = send_all(SendTurns(), [size] * SENDERS)
    seen = []
    while len(sent) < SENDERS:  # what a health check sees of it
        await asyncio.sleep(0)
        seen.append(len(sent))
    assert sent == list(range(SENDERS))
    assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) == most
    await asyncio.gather(*senders)


async def test_a_sender_without_others_does_not_wait():
    turns = SendTurns()
    for _ in range(3):
        async with asyncio.timeout(0):  # expires at the first turn of the loop
            await turns.wait(10 * TURN_BYTES)
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_cancelled_sender_takes_no_turn():
    senders, sent = send_all(SendTurns(), [LARGE] * 12)
    await asyncio.sleep(0)
    for sender in senders[2:10]:
        sender.cancel()
    for _ in range(4):
        await asyncio.sleep(0)
    assert sent == [0, 1, 10, 11]
