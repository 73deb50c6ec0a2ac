"""The events of a job that later watchers receive."""

from __future__ import annotations

from collections import deque

from gramophone_server.domain.events import Accepted, Changed, Event, Finished, Frame, Saved

__all__ = ["LOG_LENGTH", "EventLog"]

# Small events of about 1.2 KB each: 0.3 MB for a job, which is at least the last five seconds of a fast one.
LOG_LENGTH = 256


class EventLog:
    """Numbered events: the newest `LOG_LENGTH` small ones and, however old they are, the acceptance, the newest change,
    the newest frame and the result. Checkpoints are too large to be kept."""

    def __init__(self) -> None:
        self._last_number = 0
        self._recent: deque[tuple[int, Event]] = deque(maxlen=LOG_LENGTH)
        self._kept: dict[type[Event], tuple[int, Event]] = {}

    @property
    def has_picture(self) -> bool:
        """Whether the log keeps the pixels of a frame or of the result."""
        return Frame in self._kept or Finished in self._kept

    def next_number(self) -> int:
        """The number of the next event, for one that is not added to the log."""
        self._last_number += 1
        return self._last_number

    def add(self, event: Event) -> tuple[int, Event]:
        """Numbers an event and keeps it; returns (number, event)."""
        item = (self.next_number(), event)
        match event:
            case Accepted() | Changed() | Frame() | Finished():
                self._kept[type(event)] = item
            case Saved():
                pass
            case _:
                self._recent.append(item)
        return item

    def forget_frame(self) -> None:
        """Releases the pixels of the newest frame."""
        self._kept.pop(Frame, None)

    def after(self, number: int) -> list[tuple[int, Event]]:
        """The kept events with larger numbers, in order."""
        items = sorted((*self._recent, *self._kept.values()), key=lambda item: item[0])
        return [item for item in items if item[0] > number]
