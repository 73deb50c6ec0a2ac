"""Runs a command in a network namespace that has only the loopback interface: `python -m gpu_bundle.offline COMMAND...`

Linux and Python 3.12 or newer. Where namespaces are not permitted, it says so and runs the command with the network.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
INTERFACE = "16sH14x"  # struct ifreq: name, flags


def main() -> None:
    """Leaves the network and becomes the command."""
    if sys.version_info < (3, 12):  # os.unshare
        raise SystemExit("gpu_bundle.offline: needs Python 3.12 or newer")
    uid, gid = os.getuid(), os.getgid()
    try:
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
        # The user stays what it is, inside the new namespace.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        raise_loopback()
        print("the network is cut off", flush=True)
    except OSError as error:
        print(f"THE NETWORK IS NOT CUT OFF: namespaces are not permitted here ({error})", flush=True)
    os.execvp(sys.argv[1], sys.argv[1:])


def raise_loopback() -> None:
    """Turns on the loopback interface, which is down in a new namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        current = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack(INTERFACE, b"lo", 0))
        (_, flags) = struct.unpack(INTERFACE, current)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack(INTERFACE, b"lo", flags | IFF_UP))


if __name__ == "__main__":
    main()
