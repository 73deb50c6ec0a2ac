"""Reads single keys from a terminal, without Enter."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["pressed_keys"]


@contextmanager
def pressed_keys(terminal: TextIO) -> Iterator[asyncio.Queue[str]]:
    """Puts each key into a queue as it is pressed, and "q" at the end of the input. Restores the terminal afterwards.

    Needs a running event loop. Raises OSError on systems without Unix terminals.
    """
    try:
        import termios
        import tty
    except ImportError as error:  # not a Unix
        raise OSError("single keys cannot be read on this system; use the options instead") from error
    keys: asyncio.Queue[str] = asyncio.Queue()
    loop, descriptor = asyncio.get_running_loop(), terminal.fileno()

    def read_keys() -> None:
        pressed = os.read(descriptor, 64)
        if not pressed:
            loop.remove_reader(descriptor)
        for key in pressed.decode(errors="ignore") or "q":
            keys.put_nowait(key)

    attributes = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSANOW)  # keeps what was typed before
    try:
        loop.add_reader(descriptor, read_keys)
        yield keys
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, attributes)
