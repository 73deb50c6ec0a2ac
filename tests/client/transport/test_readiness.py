"""`wait_until_ready`: it ends when the server serves, and its error names the problem."""

import asyncio

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from gramophone_client import AsyncGramophoneClient, errors
from tests.support.fake_service import NOWHERE


async def test_waiting_ends_when_the_health_status_is_serving(client, service):
    service.set_health(HealthCheckResponse.NOT_SERVING)
    waiting = asyncio.create_task(client.wait_until_ready(5))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.05)
    service.set_health(HealthCheckResponse.SERVING)
    await waiting


async def test_the_error_of_waiting_names_the_problem(client, service):
    service.set_health(HealthCheckResponse.NOT_SERVING)
    with pytest.raises(errors.NotReadyError, match=r"after 2 s: its health status is NOT_SERVING"):
        await client.wait_until_ready(2.0)
    async with AsyncGramophoneClient(NOWHERE) as lonely:
        with pytest.raises(errors.NotReadyError, match="no connection"):
            await lonely.wait_until_ready(0.1)
