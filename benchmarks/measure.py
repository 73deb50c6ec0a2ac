"""Interleaved timing of variants, and their results as tables and files."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "MAX_CALLS",
    "Row",
    "Switches",
    "captured",
    "driver",
    "interleaved",
    "machine",
    "milliseconds",
    "print_table",
    "write_json",
]

Row = dict[str, Any]

MAX_CALLS = 500  # calls in one measurement


def machine(device: str = "cpu") -> str:
    """One line that describes the machine and the software of a measurement."""
    # Imported here, so that the GPU check can time and report even if the ops do not load.
    from gramophone_server.engine.engine import cpu_name

    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, driver {driver()}, CUDA {torch.version.cuda}"
    else:
        where = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, Python {sys.version.split()[0]}, {date.today().isoformat()}"


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi reports it, or "unknown"."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def milliseconds(call: Callable[[], object], device: str = "cpu", calls: int = 1) -> float:
    """Milliseconds per call, over ``calls`` in a row: between two events of the GPU's stream, or by the host's
    clock."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls
    start_s = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start_s) * 1e3 / calls


def interleaved(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", least_ms: float = 0.0
) -> dict[str, float]:
    """Median milliseconds of a call of each variant: each once as a warm-up, then A B C A B C ...

    The order makes a slower machine slow down all variants alike. A call shorter than ``least_ms`` is repeated, so that
    the resolution of the clock and the launch of the first call do not count.
    """
    calls: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            if sys.stderr.isatty():
                print(f"\r\033[K{turn}/{repeats} {name}", end="", file=sys.stderr, flush=True)
            if turn:
                times[name].append(milliseconds(call, device, calls[name]))
                continue
            call()
            short = least_ms / max(milliseconds(call, device), 1e-3) if least_ms else 1
            calls[name] = min(MAX_CALLS, max(1, math.ceil(short)))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, captured as a CUDA graph; on a CPU the call itself."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries allocate their workspaces
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


class Switches:
    """Context manager that sets torch's process-wide switches. torch's defaults are (False, True, False, False).

    ``deterministic`` is on for the engine, as in `choose_precision`, which changes it for the whole process.
    """

    def __init__(self, *, benchmark: bool, conv_tf32: bool, matmul_tf32: bool, deterministic: bool = False) -> None:
        self.wanted = benchmark, conv_tf32, matmul_tf32, deterministic

    def __enter__(self) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        self.before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = self.wanted

    def __exit__(self, *_: object) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = self.before

    def around(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call, made with these switches."""

        def switched() -> object:
            with self:
                return call()

        return switched


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Prints rows as a table. A cell is empty if its row has no such key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    text = [any(isinstance(row.get(key), str) for row in rows) for key in keys]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a machine with a GPU may have only torch
        widths = [max(len(line[i]) for line in [keys, *cells]) for i in range(len(keys))]
        print(title)
        for line in [keys, *cells]:
            columns = zip(line, widths, text, strict=True)
            print("  ".join(c.ljust(width) if left else c.rjust(width) for c, width, left in columns).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for key, left in zip(keys, text, strict=True):
        table.add_column(key, justify="left" if left else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_json(path: str | None, rows: Sequence[Row]) -> None:
    """Writes the rows to ``path``, if there is one."""
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + os.linesep)
