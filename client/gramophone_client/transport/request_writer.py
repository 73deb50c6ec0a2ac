"""What this side writes to a call, without a write that comes too late hiding how the call has ended."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

__all__ = ["send"]


def send(call: Any, requests: AsyncGenerator[Any, None]) -> None:
    """Writes all of `requests` to a call that was made without any, then closes this side. The end of the call is the end
    of that; whoever reads from the call hears of it.

    gRPC would take the iterator too, but whenever a write fails, it puts INTERNAL "Internal error from Core" in the place
    of what the server has said, and every write that races the server's end of the call fails
    (https://github.com/grpc/grpc/issues/36066; of uploads that were refused half-way, one in three to eight).
    """
    sender = asyncio.create_task(_sent(call, requests))
    call.add_done_callback(lambda _: sender.cancel())


async def _sent(call: Any, requests: AsyncGenerator[Any, None]) -> None:
    try:
        async with aclosing(requests):
            async for request in requests:
                if call.done() or not await _succeeds(call.write(request)):
                    return
        await _succeeds(call.done_writing())
    except grpc.aio.AioRpcError:
        pass  # the call had ended before there was a connection to write to; its reader hears of that
    except Exception:
        call.cancel()  # or the server would wait for the rest
        raise


@types.coroutine
def _succeeds(operation: Coroutine[Any, Any, None]) -> Generator[Any, Any, bool]:
    """Awaits an operation of a call. One that fails is left where it stands, at its wait for the transport: what gRPC
    would do next is to overwrite the status of the call."""
    step: Callable[[], Any] = partial(operation.send, None)
    while True:
        try:
            waits_for = step()
        except StopIteration:
            return True
        try:
            step = partial(operation.send, (yield waits_for))
        except grpc.aio.InternalError:
            operation.close()
            return False
        except BaseException as error:  # noqa: BLE001 - the operation decides what to do about it
            step = partial(operation.throw, error)
