"""Environments with a wheel and what it requires, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release_check.building import clean_environment, run
from release_check.metadata import read


def make(folder: Path, wheel: Path, *, extras: Sequence[str]) -> Path:
    """The Python of a new environment with the wheel and links to the packages that it requires with these extras."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    for name in sorted(closure(read(wheel).get_all("Requires-Dist") or [], extras)):
        link(name, site)
    pip = [*pip_of(python), "install", "--quiet", "--no-index", "--no-deps"]
    run(f"installing {wheel.name}", [*pip, str(wheel)])
    return python


def pip_of(python: Path) -> list[str]:
    """The start of a command of this environment's pip for another environment, which has none."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]


def closure(requirements: Iterable[str], extras: Sequence[str]) -> set[str]:
    """The names of all packages that these requirements need, directly or not. Exits if one is not installed."""
    found: set[tuple[str, str]] = set()
    waiting = [each for extra in ("", *extras) for each in required(requirements, extra)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            waiting += required(distribution(name).requires or [], extra)
        except PackageNotFoundError:
            raise SystemExit(f"release_check: {name} is required and is not in .venv: make install") from None
    return {name for name, _ in found}


def required(requirements: Iterable[str], extra: str) -> Iterator[tuple[str, str]]:
    """The packages of requirements that apply here with this extra, "" for none, each with an extra of its own."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for wanted in ("", *requirement.extras):
                yield canonicalize_name(requirement.name), wanted


def link(name: str, site: Path) -> None:
    """Makes an installed package importable from another environment's folder of packages."""
    package = distribution(name)
    for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
        target = site / top
        if not target.is_symlink():
            target.symlink_to(Path(str(package.locate_file(top))))


def problems(python: Path) -> list[str]:
    """Requirements that are not met, as `pip check` prints them."""
    command = [*pip_of(python), "check"]
    checked = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    return checked.stdout.splitlines() if checked.returncode else []
