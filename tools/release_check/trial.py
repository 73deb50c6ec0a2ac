"""Uses what is installed in two environments: types, versions, a job."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from release_check.building import ROOT, clean_environment

# mypy must find the error in the last line, and no other. Without py.typed it would take all types for Any.
SCRIPT = """\
from gramophone_client import GramophoneClient, Result

with GramophoneClient("127.0.0.1:50051") as client:
    result: Result = client.stylize("photo.jpg", "painting.jpg", size=512)
    wrong: int = client.stylize("photo.jpg", "painting.jpg")
"""
PHOTO, PAINTING = ROOT / "examples/photos/cat.jpg", ROOT / "examples/styles/brushwork.jpg"
WITHIN_S = 120.0


def output(command: list[str | Path], cwd: Path) -> tuple[int, str]:
    """Runs a command and returns its exit code and what it printed."""
    ran = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    return ran.returncode, ran.stdout.strip()


def type_problems(python: Path, folder: Path) -> list[str]:
    """What mypy reports of a user's script against the installed client, except the error that must be there."""
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    command: list[str | Path] = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", "cache"]
    _, printed = output([*command, "--python-executable", python, "script.py"], folder)
    errors = [line for line in printed.splitlines() if ": error: " in line]
    last = f"script.py:{len(SCRIPT.splitlines())}: error: Incompatible types in assignment"
    if not any(line.startswith(last) for line in errors):
        return [f"mypy does not see the types of the installed client: {printed}"]
    return [line for line in errors if not line.startswith(last)]


def version_problems(client: Path, server: Path, version: str) -> list[str]:
    """Commands and modules that report another version, or that are not those of the environment."""
    found = []
    for python, command in ((client, "gramophone"), (server, "gramophone"), (server, "gramophone-server")):
        _, printed = output([python.parent / command, "--version"], python.parent)
        if printed != f"{command} {version}":
            found.append(f"{command} --version printed '{printed}', expected '{command} {version}'")
    program = "import gramophone_client as c; print(c.__version__, c.__file__)"
    code, printed = output([python, "-c", program], python.parent)
    if code or not printed.startswith(f"{version} {python.parent.parent}"):
        found.append(f"__version__ and __file__ of the client are '{printed}', expected {version} in the environment")
    if (client.parent / "gramophone-server").exists():
        found.append("the client's environment has the command gramophone-server")
    return found


@contextmanager
def serving(python: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server from an environment, with its address."""
    log = folder / "server.log"
    with log.open("w") as errors:
        command: list[str | Path] = [python.parent / "gramophone-server", "--port", "0"]
        server = subprocess.Popen(
            command, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert server.stdout is not None
        address = re.search(r"listening on (\S+)", server.stdout.readline())
        if address is None or not server.stdout.readline().startswith("ready in "):
            raise SystemExit(f"release_check: the server did not start:\n{log.read_text()[-3000:]}")
        yield server, address[1]
    finally:
        server.kill()
        server.communicate()


def job_problems(client: Path, server: Path, folder: Path) -> list[str]:
    """Paints a small picture with the client of one environment and the server of the other."""
    folder.mkdir()
    with serving(server, folder) as (process, address):
        found = stylize_problems(client, address, folder)
        process.send_signal(signal.SIGTERM)
        ended = process.wait(WITHIN_S)
    if ended:
        found.append(f"the server ended with {ended} after SIGTERM: {(folder / 'server.log').read_text()[-3000:]}")
    return found


def stylize_problems(client: Path, address: str, folder: Path) -> list[str]:
    """Paints a small picture with the client of an environment and the server at an address."""
    picture = folder / "picture.png"
    command: list[str | Path] = [client.parent / "gramophone", "stylize", PHOTO, PAINTING, "-o", picture]
    code, printed = output([*command, "--size", "64", "--iterations", "4", "--server", address], folder)
    if code:
        return [f"the client ended with {code}: {printed}"]
    return [] if picture.read_bytes().startswith(b"\x89PNG") else ["the picture is not a PNG"]
