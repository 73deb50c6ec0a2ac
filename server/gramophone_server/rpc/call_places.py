"""The places of calls: so many at the same time, of one connection and of all together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Self

from gramophone_server.config import Limits, env_variable
from gramophone_server.errors import ServerBusy

__all__ = ["CallPlaces"]

BUSY_S = 1.0  # before a client tries a call again for which there was no place


class CallPlaces:
    """The places of calls of one kind, of which so many are `taken`. A connection without calls always gets one, so
    that the many calls of others do not shut it out."""

    def __init__(
        self,
        max_calls: int,
        max_per_connection: int,
        kind: str,
        settings: tuple[str, str] = ("", ""),
        on_full: Callable[[], None] = lambda: None,
    ) -> None:
        """``kind``: what errors call the calls. ``settings``: clauses with the settings of both limits. ``on_full`` is
        called if there is no place in all; a later call may find one."""
        self.max_calls, self._max_per_connection = max_calls, max_per_connection
        self._kind, self._settings, self._on_full = kind, settings, on_full
        self.taken = 0
        self._by_connection: Counter[str] = Counter()

    @classmethod
    def of_service(cls, limits: Limits, on_full: Callable[[], None]) -> Self:
        """Those of the service's own calls."""
        total, of_one = (
            f" (server setting {env_variable(name)})" for name in ("max_calls", "max_calls_per_connection")
        )
        return cls(limits.max_calls, limits.max_calls_per_connection, "calls", (total, of_one), on_full)

    def take(self, connection: str) -> None:
        """Takes a place. Raises `ServerBusy` if there is none."""
        own = self._by_connection[connection]
        if own >= self._max_per_connection:
            raise self._too_many("this connection has", own, self._settings[1])
        if own and self.taken >= self.max_calls:
            self._on_full()
            raise self._too_many("it has", self.taken, self._settings[0])
        self._by_connection[connection] = own + 1
        self.taken += 1

    def give_back(self, connection: str) -> None:
        """Gives a place back."""
        self._by_connection[connection] -= 1
        self.taken -= 1
        if not self._by_connection[connection]:
            del self._by_connection[connection]

    def _too_many(self, who: str, number: int, setting: str) -> ServerBusy:
        return ServerBusy(f"{who} {number} {self._kind}, which is the most{setting}", BUSY_S)
