"""The events of a job that later watchers receive."""

from __future__ import annotations

from collections import deque

from gramophone_server.domain.events import Accepted, Changed, Event, Finished, Frame, Progress, Saved

__all__ = ["LOG_BYTES", "LOG_LENGTH", "EventLog"]

LOG_LENGTH = 256  # small events: at least the last 25 seconds of a job
# Of these events, as `_bytes` counts them: 256 reports of the default recipe, or 98 with losses of 2 x 16 layers.
LOG_BYTES = 320 * 1024
EVENT_BYTES, LAYER_BYTES = 768, 80  # measured with sys.getsizeof: of an event, and of each layer's loss in a report


class EventLog:
    """Numbered events: the newest small ones, at most `LOG_LENGTH` and `LOG_BYTES`, and, however old they are, the
    acceptance, the newest change, the newest frame and the result. Checkpoints are too large to be kept."""

    def __init__(self) -> None:
        self.recent_bytes = 0  # of the small events
        self._last_number = 0
        self._recent: deque[tuple[int, Event]] = deque()
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
                self.recent_bytes += _bytes(event)
                while len(self._recent) > LOG_LENGTH or self.recent_bytes > LOG_BYTES:
                    self.recent_bytes -= _bytes(self._recent.popleft()[1])
        return item

    def forget_frame(self) -> None:
        """Releases the pixels of the newest frame."""
        self._kept.pop(Frame, None)

    def after(self, number: int) -> list[tuple[int, Event]]:
        """The kept events with larger numbers, in order."""
        items = sorted((*self._recent, *self._kept.values()), key=lambda item: item[0])
        return [item for item in items if item[0] > number]


def _bytes(event: Event) -> int:
    """The memory of a small event."""
    losses = event.report.losses if isinstance(event, Progress) else None
    return EVENT_BYTES + (0 if losses is None else LAYER_BYTES * (len(losses.content) + len(losses.style)))
