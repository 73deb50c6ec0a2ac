"""Observers of jobs, as the scheduler has them, that record what they are told."""

from __future__ import annotations

import math
from collections.abc import Callable

from gramophone_server.domain.events import Event, Finished
from gramophone_server.errors import GramophoneError


class Recorder:
    """An observer that records events, and when they came on `clock`. Watchers want what the test sets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._cancel_at = clock, math.inf
        self.events: list[Event] = []
        self.at: list[float] = []
        self.error: GramophoneError | None = None
        self.starts = 0
        self.frames: list[int] = []
        self.every: int | None = None
        self.frame_watchers: set[object] = set()
        self.checkpoint_watchers: dict[bool, set[object]] = {True: set(), False: set()}
        self.watchers: list[set[object] | None] = []
        self.accepts_light_checkpoint = False

    @property
    def cancelled(self) -> bool:
        return self._clock() >= self._cancel_at

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self._cancel_at = -math.inf if value else math.inf

    def cancel_at(self, at: float) -> None:
        self._cancel_at = at

    def iterations_until_next_frame(self, iteration: int) -> int | None:
        return self.every

    def started(self) -> None:
        self.starts += 1

    def publish(self, event: Event, watchers: set[object] | None = None) -> None:
        self.events.append(event)
        self.watchers.append(watchers)
        self.at.append(self._clock())

    def collect_frame_requests(self, iteration: int, now: float) -> set[object]:
        self.frames.append(iteration)
        return self.frame_watchers

    def collect_checkpoint_requests(self, now: float, *, light: bool) -> set[object]:
        return self.checkpoint_watchers[light]

    def fail(self, error: GramophoneError) -> None:
        assert self.error is None, "a job ends once"
        self.error = error

    @property
    def end(self) -> Finished | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Finished) else None
