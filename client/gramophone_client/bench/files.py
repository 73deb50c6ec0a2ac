"""The files of a report: looked at before anything is measured, since a measurement cannot be had again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from gramophone_client.console.display import print_errors
from gramophone_client.console.outputs import UsageError

__all__ = ["check_files", "write_files"]


def check_files(written: Mapping[str, Path], read: Iterable[Path]) -> None:
    """Raises `UsageError` if a file that will be written, by its flag, cannot be, or would replace another of these."""
    taken = {os.path.realpath(path): "an input" for path in read}
    for flag, path in written.items():
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
        what = _no_file(path) or taken.get(os.path.realpath(path))
        if what:
            raise UsageError(f"{path}: {flag} needs a file of its own, and this is {what}; name another")
        taken[os.path.realpath(path)] = f"that of {flag}"
        try:
            # As the report will be: a neighbour that is renamed. What the folder's mode says is not the whole truth.
            with NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
                pass
        except OSError as error:
            raise UsageError(f"{path}: no file can be made there ({error.strerror}); name another for {flag}") from None


def write_files(files: Mapping[Path, Callable[[Path], None]]) -> bool:
    """Writes each, whatever becomes of the others; False if one could not be written, which is said."""
    is_whole = True
    for path, write in files.items():
        try:
            write(path)
        except OSError as error:
            print_errors(f"{path}: not written: {error.strerror}")
            is_whole = False
    return is_whole


def _no_file(path: Path) -> str:
    """What is there that must not be replaced by a file; "" if there is nothing, or an older file."""
    if str(path) == "-" or _is_standard(path):
        return "where the table or the display goes"
    if path.is_dir():
        return "a folder"
    if path.exists() and not path.is_file():
        return "a device or a pipe"
    return "read-only" if path.exists() and not os.access(path, os.W_OK) else ""


def _is_standard(path: Path) -> bool:
    """Whether standard output or error lead there, as with /dev/stdout: a rename would take the place of that name."""
    for stream in (1, 2):
        with suppress(OSError):  # nothing there, or the stream is closed
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return True
    return False
