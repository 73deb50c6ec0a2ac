"""Writes the requests of a call so that a write after the end of the call does not hide its status."""

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
    """Writes all of `requests` to a call that was made without any, in a task, then closes the client's side. The task
    ends with the call; errors are raised where the call is read.

    gRPC accepts an iterator of requests itself. But if a write fails, it replaces the server's status by INTERNAL
    "Internal error from Core", and every write that races the server's end of the call fails
    (https://github.com/grpc/grpc/issues/36066; one in three to eight of the uploads that were refused half-way).
    """
    writer = asyncio.create_task(_write_all(call, requests))
    call.add_done_callback(lambda _: writer.cancel())


async def _write_all(call: Any, requests: AsyncGenerator[Any, None]) -> None:
    try:
        async with aclosing(requests):
            async for request in requests:
                if call.done() or not await _succeeds(call.write(request)):
                    return
        await _succeeds(call.done_writing())
    except grpc.aio.AioRpcError:
        pass  # the call ended before there was a connection to write to; its reader gets the error
    except Exception:
        call.cancel()  # otherwise the server would wait for the remaining requests
        raise


@types.coroutine
def _succeeds(operation: Coroutine[Any, Any, None]) -> Generator[Any, Any, bool]:
    """Awaits an operation of a call, and returns whether it succeeded. A failed operation is closed at its wait for the
    transport: if it continued, gRPC would overwrite the status of the call."""
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
        except BaseException as error:  # noqa: BLE001 - the operation handles it
            step = partial(operation.throw, error)
