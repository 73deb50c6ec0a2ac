"""How long a client may take to read."""

import asyncio
import socket
import time

from gramophone_server.rpc.send_timeout import SendTimeout
from tests.support.clock import until


async def test_a_client_that_reads_while_the_server_is_late_is_not_slow():
    """The timer comes before the handler learns that gRPC has taken the message."""
    loop, expired = asyncio.get_running_loop(), []
    timeout = SendTimeout(0.1, lambda: expired.append(True))
    here, there = socket.socketpair()
    with here, there:
        loop.add_reader(here, lambda: (here.recv(1), loop.call_soon(timeout.end)))
        timeout.begin(0)
        there.send(b"x")
        time.sleep(0.5)  # noqa: ASYNC251 - the event loop stands still
        await asyncio.sleep(0.1)
        assert not expired
        timeout.begin(0)  # nobody reads this one
        await until(lambda: expired)
        timeout.close()
        loop.remove_reader(here)
