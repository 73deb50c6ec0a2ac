"""The process of one section of the GPU check; `runner` starts it.

It imports what the section needs, then waits for a line with the time when the section must end, and runs it. If the
check itself is killed, it ends with all that it started: they would use the GPU during the next call.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import records
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.runner import end_session
from benchmarks.gpu.section import Section

__all__ = ["LIBRARY_OPS", "load", "main", "run"]

# The server's setting. A kernel that breaks the device would otherwise break every section that makes an engine.
LIBRARY_OPS = "GRAMOPHONE_LIBRARY_OPS"


def main() -> int:
    """Runs the section of the command line. The exit code is 0 also if parts of it failed, which the records say."""
    function, name, device, began, seconds, record_file, folder = sys.argv[1:]
    section_function = load(function)
    line = sys.stdin.readline()
    if not line:  # the check has ended before this section's turn
        return 0
    threading.Thread(target=_end_with_the_check, daemon=True).start()
    clock = Clock(float(began), float(seconds))
    run(section_function, name, device, clock, float(line), Path(record_file), Path(folder))
    return 0


def load(function: str) -> Callable[[Section], object]:
    """The section's function, which is named "module:function"."""
    module, _, attribute = function.partition(":")
    loaded: Callable[[Section], object] = getattr(importlib.import_module(module), attribute)
    return loaded


def run(
    function: Callable[[Section], object],
    name: str,
    device: str,
    clock: Clock,
    due: float,
    record_file: Path,
    folder: Path,
) -> None:
    """Runs the section in this process. It must end ``due``, by `time.monotonic`."""
    section = Section(name, device, clock, due, records.read(record_file)["rows"], record_file, folder)
    if requested := os.environ.get(LIBRARY_OPS):
        section.attempt(LIBRARY_OPS, lambda: _replace(requested))
    section.attempt("all of it", lambda: function(section))
    _report_fallbacks(section)


def _end_with_the_check() -> None:
    """Waits until the other end of the pipe is closed, which the system does however the check ends."""
    os.read(sys.stdin.fileno(), 1)
    end_session(os.getpid())  # it leads a session of its own


def _replace(names: str) -> None:
    """Lets these ops run through torch's library in this process, without a test."""
    import torch

    from gramophone_server.ops.self_test import choose_kernels

    choose_kernels(torch.device("cpu"), torch.float32, torch.float32, requested=names, ops=())


def _report_fallbacks(section: Section) -> None:
    """Ops that ran through torch's library, on request or because their kernels failed the self-test: what was timed is
    not ours."""
    functional = sys.modules.get("gramophone_server.ops.functional")
    fallen = sorted(functional.by_library) if functional else []
    if fallen:
        section.failed("kernels", f"these ops ran through torch's library: {', '.join(fallen)}")


if __name__ == "__main__":
    sys.exit(main())
