"""Updates of a job in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from gramophone_client.types.updates import Update


async def collected(updates: AsyncIterator[Update]) -> list[Update]:
    """All updates of an iteration."""
    return [update async for update in updates]


def kinds(updates: Iterable[Update]) -> list[str]:
    """The names of the updates' types."""
    return [type(update).__name__ for update in updates]
