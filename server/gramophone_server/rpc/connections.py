"""Counts and ends TCP connections, which gRPC does not offer."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Collection, Iterator
from urllib.parse import unquote

__all__ = ["close_connections", "count_connections"]


def close_connections(names: Collection[str]) -> set[str]:
    """Ends connections and so all their calls, by the names that gRPC gives their other ends: "ipv4:127.0.0.1:51234".
    Returns the names of those that were there. Takes up to 9 microseconds for each descriptor of the process.

    gRPC keeps a message that a client does not read until the client resets the call or closes the connection; for
    Python it has no way to do either from the server.
    """
    wanted = {_address_in(name): name for name in names}
    found = set()
    with contextlib.suppress(OSError):  # the process has no descriptor left to look at the others
        for own in _sockets():
            name = wanted.get(_peer_of(own))
            if name is not None:
                found.add(name)
                with contextlib.suppress(OSError):  # it has just been closed
                    own.shutdown(socket.SHUT_RDWR)
    return found


def _address_in(name: str) -> tuple[str, str] | None:
    """(host, port) in gRPC's name of a connection."""
    host, _, port = unquote(name).partition(":")[2].rpartition(":")
    return host.strip("[]"), port


def count_connections(port: int) -> int | None:
    """The number of TCP connections to a port that this process listens on; None if the process has no descriptor left
    to look at the others. Thread-safe; takes some microseconds for each descriptor of the process."""
    try:
        descriptors = list(_descriptors_of_sockets())
    except OSError:
        return None
    return sum(_is_connected_to(port, descriptor) for descriptor in descriptors)


def _is_connected_to(port: int, descriptor: int) -> bool:
    """Whether it is a connection to a port of this machine. Takes no descriptor."""
    try:
        borrowed = socket.socket(fileno=descriptor)
    except OSError:  # it was just closed
        return False
    try:
        return _peer_of(borrowed) is not None and borrowed.getsockname()[1] == port
    except OSError:
        return False
    finally:
        borrowed.detach()  # it stays open


def _sockets() -> Iterator[socket.socket]:
    """Copies of the sockets of this process, each until the next one is asked for."""
    for descriptor in _descriptors_of_sockets():
        # A copy, because gRPC's threads may close the descriptor meanwhile, and open another one with its number.
        try:
            own = os.dup(descriptor)
        except OSError:  # it was just closed, or there is no descriptor left
            continue
        try:
            copy = socket.socket(fileno=own)
        except OSError:  # by now it is no socket
            os.close(own)
            continue
        with copy:
            yield copy


def _descriptors_of_sockets() -> Iterator[int]:
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it was just closed
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                yield int(name)


def _peer_of(connection: socket.socket) -> tuple[str, str] | None:
    """(host, port) of the other side of a TCP connection; None for another or unconnected socket."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        host, port, *_ = connection.getpeername()
    except OSError:
        return None
    return host.removeprefix("::ffff:"), str(port)
