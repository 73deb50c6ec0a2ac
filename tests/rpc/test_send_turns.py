"""Messages of streams take turns with everything else on the event loop."""

import asyncio

from gramophone_server.rpc.send_turns import SENDS_PER_TURN, SendTurns

SENDERS = 40


async def test_a_burst_leaves_each_turn_of_the_loop_to_others():
    turns, sent, seen = SendTurns(), [], []

    async def send(number):
        await turns.wait()
        sent.append(number)

    senders = [asyncio.create_task(send(number)) for number in range(SENDERS)]
    while len(sent) < SENDERS:  # what a health check sees of it
        await asyncio.sleep(0)
        seen.append(len(sent))
    assert sent == list(range(SENDERS))
    assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) <= SENDS_PER_TURN
    await asyncio.gather(*senders)


async def test_a_sender_without_others_does_not_wait():
    turns = SendTurns()
    for _ in range(3):
        async with asyncio.timeout(0):  # expires at the first turn of the loop
            await turns.wait()
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_cancelled_sender_takes_no_turn():
    turns, sent = SendTurns(), []

    async def send(number):
        await turns.wait()
        sent.append(number)

    senders = [asyncio.create_task(send(number)) for number in range(6 * SENDS_PER_TURN)]
    await asyncio.sleep(0)
    for sender in senders[SENDS_PER_TURN : 5 * SENDS_PER_TURN]:
        sender.cancel()
    for _ in range(4):
        await asyncio.sleep(0)
    assert sent == [*range(SENDS_PER_TURN), *range(5 * SENDS_PER_TURN, 6 * SENDS_PER_TURN)]
