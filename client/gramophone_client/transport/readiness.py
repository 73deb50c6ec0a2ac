"""Waits until a server is ready for jobs, by the standard health service."""

from __future__ import annotations

import asyncio
import time

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from gramophone_client.errors import ConnectionFailedError, DeadlineExceededError, NotReadyError
from gramophone_client.transport.connection import Connection

__all__ = ["wait_until_serving"]


async def wait_until_serving(connection: Connection, timeout_s: float) -> None:
    """Returns as soon as the server's health status is SERVING. Raises `NotReadyError` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    problem = "no connection"
    while (left_s := end - time.monotonic()) > 0:
        call = connection.watch_health(left_s)
        try:
            with connection.errors_rebuilt(left_s):
                async for response in call:
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                    status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
                    problem = f"its health status is {status}"
        except DeadlineExceededError:
            break
        except ConnectionFailedError:
            problem = "the connection was lost"
        finally:
            call.cancel()
        await asyncio.sleep(0.1)  # a server that shuts down ends every watch at once
    raise NotReadyError(
        f"the server at {connection.target} is not ready after {timeout_s:g} s: {problem}; start it, or wait for longer"
    )
