"""The output files of a bench. They are checked before the measurement, which cannot be repeated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from gramophone_client.console.display import print_errors
from gramophone_client.console.outputs import UsageError

__all__ = ["check_files", "write_files"]


def check_files(outputs: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Raises `UsageError` if an output file cannot be written, or would replace an input or another output.

    `outputs` has the path of each output by its flag, `inputs` the paths of the inputs.
    """
    used_paths = {os.path.realpath(path): "an input" for path in inputs}
    for flag, path in outputs.items():
        if not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; create it first")
        problem = _not_a_file(path) or used_paths.get(os.path.realpath(path))
        if problem:
            raise UsageError(f"{path}: {flag} needs its own file, and this is {problem}; name another file")
        used_paths[os.path.realpath(path)] = f"the file of {flag}"
        try:
            # The report is written in the same way, to a temporary file in the folder that is then renamed. The mode
            # of the folder alone does not show whether that works.
            with NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
                pass
        except OSError as error:
            raise UsageError(
                f"{path}: cannot create a file there ({error.strerror}); name another file for {flag}"
            ) from None


def write_files(files: Mapping[Path, Callable[[Path], None]]) -> bool:
    """Writes each file even if others fail. Reports failures on standard error; returns False if there was one."""
    all_written = True
    for path, write in files.items():
        try:
            write(path)
        except OSError as error:
            print_errors(f"{path}: not written: {error.strerror}")
            all_written = False
    return all_written


def _not_a_file(path: Path) -> str:
    """Why the path cannot be replaced by a file; "" if it does not exist or is an ordinary, writable file."""
    if str(path) == "-" or _is_standard_stream(path):
        return "standard output or error"
    if path.is_dir():
        return "a folder"
    if path.exists() and not path.is_file():
        return "a device or a pipe"
    return "read-only" if path.exists() and not os.access(path, os.W_OK) else ""


def _is_standard_stream(path: Path) -> bool:
    """Whether standard output or error is this file, as with /dev/stdout; renaming a file to it would replace it."""
    for stream in (1, 2):
        with suppress(OSError):  # the file does not exist, or the stream is closed
            if os.path.samestat(path.stat(), os.fstat(stream)):
                return True
    return False
