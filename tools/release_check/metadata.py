"""The metadata of wheels, as a package index reads and shows it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

from release_check.building import clean_environment

TOOLS = ("twine==7.0.0", "trove-classifiers")  # not in .venv, because twine needs twenty packages
UNKNOWN_CLASSIFIERS = """\
import sys, trove_classifiers
for name in sys.argv[1:]:
    if name not in trove_classifiers.classifiers:
        print(name)
"""
# A link or a picture of Markdown whose target is not absolute: a package index cannot follow it.
RELATIVE = re.compile(r"\[[^\]]*\]\((?!https?://|mailto:|#)[^)]*\)")


def read(wheel: Path) -> Message:
    """The headers of a wheel's METADATA; the payload is the long description."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def problems(wheels: Sequence[Path], version: str) -> list[str]:
    """What an index would show wrong or not at all."""
    found = []
    for wheel in wheels:
        headers = read(wheel)
        if headers["Version"] != version:
            found.append(f"{wheel.name} has the version {headers['Version']}, and CHANGELOG.md {version}")
        for name in ("Summary", "Keywords", "License-Expression", "Requires-Python", "Classifier", "Project-URL"):
            if not headers[name]:
                found.append(f"{wheel.name} has no {name}")
        if "Typing :: Typed" not in (headers.get_all("Classifier") or []):
            found.append(f"{wheel.name} has no classifier 'Typing :: Typed'")
        if headers["Description-Content-Type"] != "text/markdown":
            found.append(f"{wheel.name}: its long description is not text/markdown")
        description = str(headers.get_payload())
        if not description.strip():
            found.append(f"{wheel.name} has no long description")
        found += [f"{wheel.name}: {link} works in the repository alone" for link in RELATIVE.findall(description)]
    return found


def twine_problems(files: Sequence[Path], folder: Path) -> list[str]:
    """What `twine check --strict` prints, and classifiers that the index refuses. Installs `TOOLS` into `folder`."""
    env = clean_environment()
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS]
    installed = subprocess.run(install, env=env, capture_output=True, text=True, check=False)
    if installed.returncode:
        return [f"{' and '.join(TOOLS)} cannot be installed: {installed.stderr.strip().splitlines()[-1]}"]
    check = [str(python), "-m", "twine", "--no-color", "check", "--strict", *map(str, files)]
    checked = subprocess.run(check, env=env, capture_output=True, text=True, check=False)
    found = [checked.stdout.strip() + checked.stderr.strip()] if checked.returncode else []
    classifiers = {name for file in files if file.suffix == ".whl" for name in read(file).get_all("Classifier") or []}
    ask = [str(python), "-c", UNKNOWN_CLASSIFIERS, *sorted(classifiers)]
    unknown = subprocess.run(ask, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    return found + [f"the index knows no classifier '{name}'" for name in unknown]
