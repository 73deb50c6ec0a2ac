"""What a fork does to gRPC, and how a child process is kept from waiting for it forever.

gRPC's asyncio part has one thread in the process that waits for the network, from the first open channel to the end of
the last. A forked child has all channels, but not that thread: a call in the child would never end, not even at its
deadline, and closing a channel there would wait for the thread or crash. gRPC's own handlers of a fork do not run as
long as that thread does.

So a process that was forked while the thread ran cannot have a client. One that was forked before the first client was
made, or after the last was closed, can: gRPC then starts again in it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from typing import Any

import grpc

from gramophone_client.errors import ClientUsageError

__all__ = ["channel_closed", "check_grpc", "check_process", "open_channel"]

POLLER = "(_poll_wrapper)"  # the end of the name of gRPC's thread
# With its first channel gRPC starts further threads of its own, and with its last it ends them, which takes a
# millisecond, or longer on a busy machine. A fork meanwhile can break gRPC in both processes, so it waits.
SETTLING_S = 0.2


class _Forks:
    """The channels of this process, and the handlers of its forks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while a channel is made, and during a fork
        self.channels: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()
        self.changed_s = -SETTLING_S  # when a channel was last opened or closed
        self.is_running = False  # gRPC's thread ran when the current fork began
        self.is_cut_off = False  # it ran when this process was forked
        os.register_at_fork(
            before=self._before, after_in_parent=self._after_in_parent, after_in_child=self._after_in_child
        )

    def _before(self) -> None:
        self.lock.acquire()
        while (left_s := self.changed_s + SETTLING_S - time.monotonic()) > 0:
            time.sleep(left_s)
        self.is_running = _poller_runs()
        if self.is_running:
            grpc.aio.init_grpc_aio()  # one user more, which the child never removes: its last channel ends nothing

    def _after_in_parent(self) -> None:
        if self.is_running:
            grpc.aio.shutdown_grpc_aio()
        self.lock.release()

    def _after_in_child(self) -> None:
        if self.is_running:
            self.is_cut_off = True
            for channel in self.channels:
                # Never deleted: that would take locks which threads of the parent held.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(channel))
        self.lock.release()


def _poller_runs() -> bool:
    return any(thread.name.endswith(POLLER) for thread in threading.enumerate())


_FORKS = _Forks()


def check_grpc() -> None:
    """Raises `ClientUsageError` in a process where gRPC cannot work."""
    if _FORKS.is_cut_off:
        raise ClientUsageError(
            "this process was forked while its parent had an open client (or another channel of grpc.aio), after which "
            "gRPC does not work in it; start the process with multiprocessing's 'spawn' or 'forkserver', or close all "
            "clients before the fork"
        )


def open_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: list[tuple[str, Any]]
) -> grpc.aio.Channel:
    """A new channel. Call `check_grpc` before."""
    with _FORKS.lock:
        if credentials is None:
            channel = grpc.aio.insecure_channel(target, options)
        else:
            channel = grpc.aio.secure_channel(target, credentials, options)
        _FORKS.channels.add(channel)
        _FORKS.changed_s = time.monotonic()
        return channel


def channel_closed() -> None:
    """To be called before a closed channel is dropped, and after it: gRPC may be ending."""
    _FORKS.changed_s = time.monotonic()


def check_process(pid: int) -> None:
    """Raises `ClientUsageError` in any process but `pid`, where a client was made."""
    if os.getpid() != pid:
        raise ClientUsageError(
            f"this client belongs to process {pid}, of which this process, {os.getpid()}, is a fork; make a client in "
            "each process, and start processes with multiprocessing's 'spawn' or 'forkserver'"
        )
