"""Fixtures for the tests of the client: a fake service, and a client that is connected to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from gramophone_client import GramophoneClient
from tests.support.fake_service import FakeService, serving


@pytest.fixture
def service() -> Iterator[FakeService]:
    """A fake service on the loopback."""
    with serving() as fake:
        yield fake


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[GramophoneClient]:
    """A client of the fake service."""
    async with GramophoneClient(service.target, timeout_s=10) as connected:
        yield connected
