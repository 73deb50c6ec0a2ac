"""Which files an sdist and a wheel hold, and which they must hold."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from release_check.building import ROOT_FILES

# Folders of the checkout -> where their packages are in a wheel, which is without the folder.
CLIENT, SERVER = ("proto", "client"), ("proto", "client", "server")
PACKED = (".py", ".pyi", ".proto", "py.typed")  # ends of the names of files that a wheel has from these folders
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
GENERATED = ("PKG-INFO", "setup.cfg", "gramophone.egg-info/")  # by setuptools, in an sdist


def sdist_problems(sdist: Path, files: Iterable[str]) -> list[str]:
    """Files that are missing in the sdist, and files that do not belong there. `files`: the checkout's."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    expected = {name for name in files if name.partition("/")[0] in ("csrc", *SERVER)} | set(ROOT_FILES)
    return differences({name for name in names if not name.startswith(GENERATED)}, expected)


def wheel_problems(wheel: Path, files: Iterable[str], *, server: bool) -> list[str]:
    """Files that are missing in the wheel, and files that do not belong there. `files`: the checkout's."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    modules = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in modules if name.endswith(".so")}
    folders = SERVER if server else CLIENT
    expected = modules_of(files, folders)
    found = differences(modules - extensions, expected) + differences(info, DIST_INFO)
    ops = [name for name in extensions if name.startswith("gramophone_server/_C.")]
    if len(ops) != (1 if server else 0) or extensions != set(ops):
        found.append(f"has the extensions {sorted(extensions)}, expected {'the ops alone' if server else 'none'}")
    if not server and not wheel.name.endswith("-py3-none-any.whl"):
        found.append(f"is named {wheel.name}, and a wheel of pure Python ends in -py3-none-any.whl")
    return found


def modules_of(files: Iterable[str], folders: Sequence[str]) -> set[str]:
    """The files of a wheel of these folders, without ops and dist-info."""
    parts = (name.partition("/") for name in files if name.endswith(PACKED))
    return {rest for folder, _, rest in parts if folder in folders}


def differences(names: Iterable[str], expected: Iterable[str]) -> list[str]:
    """One problem for each name that is in only one of the two."""
    names, expected = set(names), set(expected)
    return [f"has no {name}" for name in sorted(expected - names)] + [
        f"has {name}, which does not belong there" for name in sorted(names - expected)
    ]
