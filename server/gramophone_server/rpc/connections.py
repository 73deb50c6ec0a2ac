"""Ends TCP connections, which gRPC does not offer."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from urllib.parse import unquote

__all__ = ["close_connection"]


def close_connection(peer: str) -> bool:
    """Ends the connection of a peer, as gRPC names it: "ipv4:127.0.0.1:51234", and so all its calls. Returns False if
    there is none.

    gRPC keeps a message that a client does not read until the client resets the call or closes the connection; for
    Python it has no way to do either from the server.
    """
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # a descriptor that is no socket, or is not connected, or was just closed
            if _peer_of(int(name)) == (host.strip("[]"), port):
                with contextlib.closing(socket.socket(fileno=os.dup(int(name)))) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
                return True
    return False


def _peer_of(descriptor: int) -> tuple[str, str] | None:
    """(host, port) of the other side of a TCP connection; None for another descriptor."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return None
    connection = socket.socket(fileno=os.dup(descriptor))
    with contextlib.closing(connection):
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        host, port, *_ = connection.getpeername()
        return host.removeprefix("::ffff:"), str(port)
