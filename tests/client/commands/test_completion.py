"""`gramophone completion`, in the real shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from tests.support.processes import ROOT, WITHIN_S

Complete = Callable[[str], Sequence[str]]  # the words that complete a line; the line's last word may be empty

TARGETS = """\
default = "studio"
[targets.studio]
address = "gpu-1:50051"
[targets.lab]
address = "gpu-2:50051"
"""
# Prints what bash would show for the words that are its arguments.
BASH = """\
source script
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
function_name=$(complete -p gramophone | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function_name"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With `gramophone` on the PATH, and a file of targets."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "gramophone"
    note = f'echo "$@" >> "{tmp_path}/commands"'
    command.write_text(f'#!/bin/sh\n{note}\nexec "{sys.executable}" -m gramophone_client "$@"\n')
    command.chmod(0o755)
    (tmp_path / "targets.toml").write_text(TARGETS)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("proto", "client")),
        "GRAMOPHONE_CONFIG": str(tmp_path / "targets.toml"),
        "HOME": str(tmp_path),
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working folder, with a picture and a folder."""
    work = tmp_path / "work"
    (work / "pictures").mkdir(parents=True)
    (work / "photo.jpg").touch()
    return work


def script(shell: str, path: Path, environment: dict[str, str]) -> Path:
    printed = subprocess.run(["gramophone", "completion", shell], env=environment, capture_output=True, check=True)
    assert not printed.stderr
    path.write_bytes(printed.stdout)
    return path


@pytest.fixture
def complete(request: pytest.FixtureRequest, folder: Path, environment: dict[str, str]) -> Iterator[Complete]:
    """Completes lines in the shell that the test names."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    if shell == "zsh":
        with ZshTerminal(folder, environment) as terminal:
            yield terminal.complete
        return
    script(shell, folder.parent / "script", environment)

    def run(line: str) -> Sequence[str]:
        if shell == "bash":
            command = ["bash", "--norc", "-c", BASH.replace("script", "../script", 1), "bash", *line.split(" ")]
        else:
            command = ["fish", "--no-config", "-c", f"source ../script; complete -C '{line}'"]
        ran = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=True
        )
        assert not ran.stderr
        return [word.partition("\t")[0] for word in ran.stdout.splitlines()]

    yield run


class ZshTerminal:
    """An interactive zsh on a pseudo-terminal: it completes only while a person types."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        functions = folder.parent / "functions"
        functions.mkdir()
        script("zsh", functions / "_gramophone", environment)
        self._terminal, theirs = pty.openpty()
        self._shell = subprocess.Popen(
            ["zsh", "-f", "-i"],
            cwd=folder,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        # The whole list below the line, without a question, whatever its length.
        self._type(
            f"PS1='> '; stty columns 200; fpath=({functions} $fpath); LISTMAX=0; zstyle ':completion:*' menu no\n"
        )
        self._type(f"autoload -Uz compinit; compinit -u -d {folder.parent}/dump; setopt noautomenu; echo rea''dy\n")
        self._read_until(r"ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._terminal)

    def complete(self, line: str) -> Sequence[str]:
        """All words on the screen after the keys TAB and ^D, which lists; the line's own words among them."""
        self._type(f"\x15{line}\t\x04")
        self._type("\x01\x0becho do''ne\n")  # empties the line and runs a command
        screen = self._read_until(r"\n(\x1b\[J)?done")
        screen = re.sub(r"\x1b\[\d*A", " ", screen)  # back up from the list to the line
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x07|[\r\x00]", "", screen).split()

    def _type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _read_until(self, pattern: str) -> str:
        seen, end = "", time.monotonic() + WITHIN_S
        while not re.search(pattern, seen):
            assert time.monotonic() < end, seen
            if select.select([self._terminal], [], [], 1.0)[0]:
                seen += os.read(self._terminal, 65536).decode(errors="replace")
        return seen


@pytest.mark.parametrize("complete", ["bash", "zsh", "fish"], indirect=True)
def test_commands_options_values_paths_and_targets_are_completed(complete: Complete, tmp_path: Path) -> None:
    for line, words in (
        ("gramophone styl", {"stylize"}),
        ("gramophone stylize --optim", {"--optimiser"}),
        ("gramophone stylize --optimiser ", {"adam", "lbfgs"}),
        ("gramophone stylize --preset q", {"quality"}),
        ("gramophone stylize ph", {"photo.jpg"}),
        ("gramophone stylize photo.jpg ph", {"photo.jpg"}),
        ("gramophone info --target l", {"lab"}),
        ("gramophone watch job --server s", {"studio"}),
        ("gramophone completion ", {"bash", "zsh", "fish"}),
    ):
        found = {word.rstrip("/") for word in complete(line)}
        assert words <= found, f"{line!r}: {found}"
        assert "nothing" not in found
    ran = (tmp_path / "commands").read_text().splitlines().count("targets --names")
    assert 2 <= ran <= 4, "to complete a target, and for nothing else"  # zsh asks once more for its list


@pytest.mark.parametrize("complete", ["bash", "fish"], indirect=True)
def test_a_folder_is_completed_with_folders(complete: Complete) -> None:
    assert [word.rstrip("/") for word in complete("gramophone stylize --frames p")] == ["pictures"]


def test_an_unknown_shell_is_refused_with_the_known_ones(gramophone) -> None:
    code, out, err = gramophone("completion fihs")
    assert (code, out) == (2, "")
    assert err == [
        "gramophone completion: argument SHELL: expected one of bash, zsh, fish, got 'fihs'; did you mean fish?"
    ]
