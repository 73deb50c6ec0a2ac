"""A command to a job under control, until it is answered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import GramophoneError

__all__ = ["Command"]


@dataclass
class Command:
    """A command, sent again until it is answered. `output` is the picture or state that it asks for, which arrives
    after the answer."""

    request: pb.StylizeInteractiveRequest
    is_replay: bool = False  # answered before: sent to a server that continues from an older state of the job
    answer: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    output: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def kind(self) -> str:
        """The name of its field in the request."""
        return self.request.WhichOneof("command") or ""

    def fail(self, error: GramophoneError) -> None:
        """Raises the error in the caller that waits for the command."""
        for future in (self.answer, self.output):
            if not future.done():
                future.set_exception(error)
                future.exception()  # marks it as retrieved; otherwise asyncio logs that of the future without a waiter
