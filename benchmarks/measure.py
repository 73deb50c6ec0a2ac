"""Timing of variants against each other, and the tables and files that come of it."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gramophone_server.engine import cpu_name

__all__ = ["Row", "interleaved", "machine", "print_table", "write_json"]

Row = dict[str, Any]


def machine() -> str:
    """One line that says where and with what a number was measured."""
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}, {date.today().isoformat()}"
    )


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of a call of each variant: each once as a warm-up, then A B C A B C ...

    In turn, so that a machine that slows down slows all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            if sys.stderr.isatty():
                print(f"\r\033[K{turn}/{repeats} {name}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            call()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(title: str, rows: list[Row]) -> None:
    """Rows of equal keys as a table for people."""
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def write_json(path: str | None, rows: list[Row]) -> None:
    """Writes the rows, if a path was given."""
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + os.linesep)
