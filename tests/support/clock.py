"""Time in tests: waits for a condition instead of a guessed duration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WITHIN_S = 5.0  # the longest wait; only a broken program or a very busy machine reaches it


async def until(condition: Callable[[], object]) -> None:
    """Waits until the condition holds. Raises TimeoutError after 5 s."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.001)
