"""Counts and ends TCP connections, which gRPC does not offer."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from urllib.parse import unquote

__all__ = ["close_connection", "count_connections"]


def close_connection(peer: str) -> bool:
    """Ends the connection of a peer, as gRPC names it: "ipv4:127.0.0.1:51234", and so all its calls. Returns False if
    there is none.

    gRPC keeps a message that a client does not read until the client resets the call or closes the connection; for
    Python it has no way to do either from the server.
    """
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    for connection in _sockets():
        if _peer_of(connection) == (host.strip("[]"), port):
            with contextlib.suppress(OSError):  # it has just been closed
                connection.shutdown(socket.SHUT_RDWR)
            return True
    return False


def count_connections(port: int) -> int:
    """The number of TCP connections to a port that this process listens on. Thread-safe; takes some microseconds for
    each descriptor of the process."""
    return sum(_peer_of(connection) is not None and connection.getsockname()[1] == port for connection in _sockets())


def _sockets() -> Iterator[socket.socket]:
    """Copies of the sockets of this process, each until the next one is asked for."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # a descriptor that is no socket, or was just closed
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            # A copy, because gRPC's threads may close the descriptor meanwhile, and open another one with its number.
            with contextlib.closing(socket.socket(fileno=os.dup(int(name)))) as copy:
                yield copy


def _peer_of(connection: socket.socket) -> tuple[str, str] | None:
    """(host, port) of the other side of a TCP connection; None for another or unconnected socket."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        host, port, *_ = connection.getpeername()
    except OSError:
        return None
    return host.removeprefix("::ffff:"), str(port)
