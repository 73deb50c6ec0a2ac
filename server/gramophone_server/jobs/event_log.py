"""What a job remembers of its events, for watchers to come."""

from __future__ import annotations

from collections import deque

from gramophone_server.domain.events import Accepted, Changed, Event, Finished, Frame, Saved

__all__ = ["LOG_LENGTH", "EventLog"]

LOG_LENGTH = 256  # small events, some 1.2 KB each: 0.3 MB a job, the last five seconds or more of a quick one


class EventLog:
    """Numbered events: the newest `LOG_LENGTH` small ones, and however long ago it was what whoever comes needs, the
    acceptance, the newest change, frame and the result. Checkpoints are too large to be remembered."""

    def __init__(self) -> None:
        self._number = 0
        self._log: deque[tuple[int, Event]] = deque(maxlen=LOG_LENGTH)
        self._kept: dict[type[Event], tuple[int, Event]] = {}

    @property
    def has_picture(self) -> bool:
        """It keeps the pixels of a frame or of the result."""
        return Frame in self._kept or Finished in self._kept

    def next_number(self) -> int:
        """The number of one more event, which need not be remembered."""
        self._number += 1
        return self._number

    def add(self, event: Event) -> tuple[int, Event]:
        """Remembers an event, and returns it with its number."""
        item = (self.next_number(), event)
        match event:
            case Accepted() | Changed() | Frame() | Finished():
                self._kept[type(event)] = item
            case Saved():
                pass
            case _:
                self._log.append(item)
        return item

    def forget_frame(self) -> None:
        """Lets the pixels go."""
        self._kept.pop(Frame, None)

    def after(self, number: int) -> list[tuple[int, Event]]:
        """What came after the event of this number, in order."""
        items = sorted((*self._log, *self._kept.values()), key=lambda item: item[0])
        return [item for item in items if item[0] > number]
