"""Imports gRPC so that a fork leaves it alone. To be imported before any other module that imports it.

gRPC's own handlers of a fork start its threads again in the child, on the connections of the parent. Of children that
were forked while a job streamed, one in three crashed. If the handlers are off, the threads stay away; `forking` has
the rest. gRPC reads the setting when it is imported, so this has no effect in a program that imported it before.
"""

from __future__ import annotations

import os

__all__: list[str] = []

VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"

if VARIABLE not in os.environ:
    os.environ[VARIABLE] = "0"
    import grpc  # noqa: F401

    del os.environ[VARIABLE]  # it is not for the programs that this one starts
