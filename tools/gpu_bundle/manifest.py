"""The bundle's folder, and its manifest: what it was made from and for."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
BUNDLE = ROOT / "gpu-bundle"
KEYS = {"architectures", "commit", "cuda", "files", "platform", "python", "sources", "torch"}


def read(bundle: Path = BUNDLE) -> dict[str, Any]:
    """The manifest of a bundle, empty if it is missing or incomplete."""
    try:
        manifest = json.loads((bundle / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.keys() >= KEYS else {}


def describe(manifest: Mapping[str, Any]) -> str:
    """What the ops were compiled for and from, in one line."""
    targets = ", ".join(f"sm_{built.replace('.', '')}" for built in manifest["architectures"])
    return f"Python {manifest['python']}, torch {manifest['torch']}, {targets}, made from {manifest['commit']}"


def running_python() -> str:
    """The version of this Python, such as "3.12"."""
    return "{}.{}".format(*sys.version_info[:2])


def sources() -> list[Path]:
    """The files that the ops are compiled from."""
    return [ROOT / "setup.py", *sorted(files_in(ROOT / "csrc"))]


def sources_digest() -> str:
    """One sha256 of the names and the contents of `sources`."""
    hashed = hashlib.sha256()
    for path in sources():
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()


def digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    """All files below a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def size_of(paths: Iterable[Path]) -> int:
    """The total size in bytes."""
    return sum(path.stat().st_size for path in paths)
