"""The client of a command: connected to its target, and ready as far as --wait asks for it."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from gramophone_client.async_client import DEFAULT_TIMEOUT_S, AsyncGramophoneClient
from gramophone_client.client import GramophoneClient
from gramophone_client.commands.local_server import INSTALL_HINT, server_is_installed
from gramophone_client.console.targets import LOCAL, Target, chosen_target
from gramophone_client.errors import ConnectionFailedError, NotReadyError

__all__ = ["async_client", "client"]

THIS_MACHINE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\]):(\d+)")
DEFAULT_PORT = "50051"


@contextmanager
def client(args: argparse.Namespace) -> Iterator[GramophoneClient]:
    """A client of the target that `args` choose."""
    target = chosen_target(args)
    with _start_hint(target), GramophoneClient(target.address, metadata=target.metadata) as connected:
        if args.wait:
            connected.wait_until_ready(args.wait)
        yield connected


@asynccontextmanager
async def async_client(target: Target, args: argparse.Namespace) -> AsyncIterator[AsyncGramophoneClient]:
    """A client of `target`, with --timeout."""
    timeout = args.timeout or target.timeout or DEFAULT_TIMEOUT_S
    with _start_hint(target):
        async with AsyncGramophoneClient(target.address, timeout=timeout, metadata=target.metadata) as connected:
            if args.wait:
                await connected.wait_until_ready(args.wait)
            yield connected


@contextmanager
def _start_hint(target: Target) -> Iterator[None]:
    """Adds to an error about a missing server on this machine how to start one."""
    try:
        yield
    except ConnectionFailedError as error:
        place = THIS_MACHINE.fullmatch(target.address)
        is_missing = error.reason is None and not isinstance(error, NotReadyError)
        if place is not None and is_missing and target.source != LOCAL:
            error.add_note(_start_command(place[2]) if server_is_installed() else INSTALL_HINT)
        raise


def _start_command(port: str) -> str:
    command = (
        "gramophone-server" if shutil.which("gramophone-server") else f"{sys.executable} -m gramophone_server.main"
    )
    return f"start one: {command}{'' if port == DEFAULT_PORT else f' --port {port}'}"
