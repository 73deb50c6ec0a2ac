"""Messages on their way to a client: serialised, with the memory that they hold until gRPC has taken them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from google.protobuf.message import Message

from gramophone_server.rpc.byte_budget import Share

__all__ = ["Outgoing", "nested"]


class Outgoing:
    """A message to a client. gRPC gets this object and asks for its bytes: it keeps what it gets until the next
    message, so each watcher of a paused job would keep its last picture.

    ``data``: the serialised message. ``dropped``: in a frame, the number of frames that were left out before it.
    ``share``: bytes that count for this message alone. ``holds``: what else it keeps, such as its part in an encoding.
    """

    def __init__(
        self,
        data: bytes,
        *,
        dropped: int | None = None,
        share: Share | None = None,
        holds: contextlib.ExitStack | None = None,
    ) -> None:
        self.data, self.dropped, self.share = data, dropped, share
        self._holds = holds

    def abandon(self) -> None:
        """Gives back all but the bytes of gRPC's copy, which gRPC keeps as long as the client does not read it."""
        if self.share is not None:
            self.share.shrink_to(len(self.data))
        self.data = b""
        if self._holds is not None:
            self._holds.close()

    def close(self) -> None:
        """Gives back what it holds. Further calls change nothing."""
        self.abandon()
        if self.share is not None:
            self.share.give_back()


def nested(levels: Sequence[tuple[Message, int]], body: bytes | memoryview) -> list[bytes | memoryview]:
    """The parts of a serialised message with ``body`` in its depths: one for each level, and ``body``. Joining them is
    the only copy of ``body``; protobuf itself makes three.

    ``levels``: from the outermost message on, each without the next one, and the number of the field that holds the
    next one. That of the innermost message holds ``body``: bytes, or a message that is serialised already.
    """
    parts = [body]
    size = len(body)
    for message, field in reversed(levels):
        head = message.SerializeToString() + _varint(field << 3 | 2) + _varint(size)  # 2: a field with a length
        parts.append(head)
        size += len(head)
    return parts[::-1]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
