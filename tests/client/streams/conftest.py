"""The clock of recoveries."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gramophone_client.streams import recovery


@pytest.fixture
def clock_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, Callable[[], bool]], None]:
    """Puts the clock of recoveries ahead by some seconds, from when a condition holds on: so the time of a search ends
    after a number of tries, and not when a slow machine has made fewer."""

    def put_ahead(seconds: float, condition: Callable[[], bool]) -> None:
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds * condition())
        monkeypatch.setattr(recovery, "time", clock)

    return put_ahead
