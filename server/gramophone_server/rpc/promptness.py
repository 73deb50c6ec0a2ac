"""Which connections have used the room that they got, so that others can be told from those that only hold it."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Promptness", "Standing"]

# How long a connection is slow after it has kept others waiting: it can hold its room for a second then, a tenth of the
# time, and an honest one on a slow line is not last for long.
SLOW_S = 10.0
MAX_KNOWN = 4096  # connections of each kind, a hundred bytes each; the oldest are forgotten


class Standing(IntEnum):
    """What is known of a connection; the less, the earlier it is served."""

    PROMPT = 0
    UNKNOWN = 1
    SLOW = 2


class Promptness:
    """The standing of connections. A crowd can open new connections without end, but none of them is prompt before it
    has sent or read something whole, and each loses it for a while when it keeps others waiting."""

    def __init__(self) -> None:
        self._prompt: dict[str, None] = {}
        self._slow: dict[str, float] = {}  # until when

    def was_prompt(self, owner: str) -> None:
        """A connection has used its room."""
        self._prompt.pop(owner, None)
        self._prompt[owner] = None
        if len(self._prompt) > MAX_KNOWN:
            del self._prompt[next(iter(self._prompt))]

    def was_slow(self, owner: str, now: float) -> None:
        """A connection has kept others waiting at this time, in seconds."""
        self._prompt.pop(owner, None)
        self._slow.pop(owner, None)
        self._slow[owner] = now + SLOW_S
        if len(self._slow) > MAX_KNOWN:
            del self._slow[next(iter(self._slow))]

    def of(self, owner: str, now: float) -> Standing:
        """The standing of a connection."""
        if self._slow.get(owner, 0.0) > now:
            return Standing.SLOW
        return Standing.PROMPT if owner in self._prompt else Standing.UNKNOWN
