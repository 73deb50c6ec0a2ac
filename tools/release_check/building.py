"""Builds the sdist from a copy of the sources, and wheels from the sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROOT_FILES = ("LICENSE", "CHANGELOG.md", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py")
SOURCES = ("proto", "client", "server", "csrc", "tests")  # tests, because setuptools would pack some of them
# The backend of pyproject.toml, with the packages of this environment.
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def sdist(files: Collection[str], folder: Path) -> Path:
    """The path of a new sdist of these files of the checkout."""
    copy = folder / "source"
    copy_sources(files, copy)
    run("building the sdist", [sys.executable, "-c", BUILD_SDIST, str(folder)], cwd=copy)
    (built,) = folder.glob("*.tar.gz")
    return built


def wheel(sdist: Path, folder: Path, *, client_only: bool) -> Path:
    """The path of a new wheel. The one of the server has ops, for the CPU unless GRAMOPHONE_CUDA is set."""
    settings = {"GRAMOPHONE_CUDA": os.environ.get("GRAMOPHONE_CUDA", "0")}
    if client_only:
        no_torch = folder / "no-torch"
        no_torch.mkdir(parents=True)
        (no_torch / "torch.py").write_text("raise ImportError('the client is built without torch')\n")
        settings = {"GRAMOPHONE_BUILD": "client", "PYTHONPATH": str(no_torch)}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sdist)]
    run(f"building the wheel of the {'client' if client_only else 'server'}", command, settings)
    (built,) = folder.glob("*.whl")
    return built


def copy_sources(files: Collection[str], to: Path) -> None:
    """Copies files of the checkout."""
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)


def listed() -> set[str]:
    """The names of the files that a build could read: neither builds nor caches of this checkout."""
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in paths if path.suffix not in (".so", ".pyc")}
    return {name for name in names if "/." not in name and ".egg-info/" not in name} | set(ROOT_FILES)


def run(name: str, command: Sequence[str], settings: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Runs a command that must succeed. Exits with the end of its output if it does not."""
    print(f"{name} ... ", end="", flush=True)
    began = time.monotonic()
    env = clean_environment() | dict(settings or {})
    ran = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        end = (ran.stdout + ran.stderr)[-3000:]
        raise SystemExit(f"failed\nrelease_check: {name}: exit code {ran.returncode}\n{end}")
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def clean_environment() -> dict[str, str]:
    """The environment variables without those that change Python's search path or our programs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GRAMOPHONE_", "PYTHON"))}
