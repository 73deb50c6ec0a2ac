"""Pools of threads that exist before they are needed. Standard library only."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

__all__ = ["started_threads"]


def started_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of ``count`` threads, all of which are started. An ordinary pool starts each of them for the first request
    that needs it, which fails if the machine has no memory or no threads left by then."""
    threads = ThreadPoolExecutor(count, name)
    all_started = threading.Barrier(count)
    for _ in range(count):
        threads.submit(all_started.wait)  # so that none of them is idle when the next one is started
    return threads
