"""`gramophone stylize --local`: real processes, with the fake engine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from gramophone_client.commands import local_server
from gramophone_client.console.outputs import UsageError
from tests.support.processes import PAINTING, PHOTO, WITHIN_S, Process, processes_in

SMALL = ("--size", "96", "--iterations", "4", "--smallest-size", "0")
LONG = ("--size", "96", "--iterations", "5000", "--smallest-size", "0")


def stylize(folder: Path, *flags: str, **settings: str) -> Process:
    words = ("-m", "gramophone_client", "stylize", PHOTO, PAINTING, "-o", "out.png", "--local", *flags)
    return Process(*words, cwd=folder, **{"GRAMOPHONE_ENGINE": "fake", **settings})


def until_no_process(folder: Path) -> None:
    end = time.monotonic() + WITHIN_S
    while left := processes_in(folder):
        assert time.monotonic() < end, left
        time.sleep(0.01)


def test_a_picture_is_painted_on_a_server_that_then_ends(tmp_path: Path) -> None:
    # What the environment sets for a server is valid, but its port and its metrics are not for this one.
    settings = {"GRAMOPHONE_PORT": "1", "GRAMOPHONE_METRICS_PORT": "1", "GRAMOPHONE_TARGET": "127.0.0.1:1"}
    with stylize(tmp_path, *SMALL, "--checkpoint", "job.state", **settings) as client:
        assert client.code() == 0, client.output
    lines = client.output.splitlines()
    assert lines[0].startswith("starting a server for this job: loading the network, 0 s")
    assert lines[-1] == "out.png"
    assert processes_in(tmp_path) == []  # at once: the command waits for its server
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (96, 64)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("when", ["starting a server", "job "])
def test_a_command_that_is_stopped_stops_its_server(
    tmp_path: Path, number: signal.Signals, code: int, word: str, when: str
) -> None:
    with stylize(tmp_path, *LONG) as client:
        client.line(when)
        os.kill(client.pid, number)
        assert client.code() == code, client.output
    assert client.output.splitlines()[-1] == f"gramophone: {word}"
    assert "Traceback" not in client.output
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("when", ["starting a server", "job "])
def test_a_command_that_is_killed_leaves_no_server(tmp_path: Path, when: str) -> None:
    with stylize(tmp_path, *LONG) as client:
        client.line(when)
        os.kill(client.pid, signal.SIGKILL)
        assert client.code() == -signal.SIGKILL
    until_no_process(tmp_path)


def parent(pid: int) -> int:
    """The parent of a process; see proc_pid_stat(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_server_that_is_lost_is_not_waited_for(tmp_path: Path) -> None:
    with stylize(tmp_path, *LONG) as client:
        client.line("job ")
        # The server's decoders are its own children, and end with it.
        (server,) = (pid for pid in processes_in(tmp_path) if parent(pid) == client.pid)
        os.kill(server, signal.SIGKILL)
        assert client.code(within_s=20) == 3, client.output
    assert "gramophone: the server for this job ended with exit code -9:" in client.output
    until_no_process(tmp_path)


def test_an_error_of_the_server_is_passed_on(tmp_path: Path) -> None:
    with stylize(tmp_path, GRAMOPHONE_MAX_SIZE="huge") as client:
        assert client.code() == 3, client.output
    assert client.output.splitlines()[-2:] == [
        "gramophone: the server for this job ended with exit code 2:",
        "gramophone: GRAMOPHONE_MAX_SIZE must be a whole number from 16 to 16383, got 'huge'",
    ]
    assert os.listdir(tmp_path) == []


def test_a_job_that_is_refused_stops_the_server(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is not a picture")
    with Process(
        *("-m", "gramophone_client", "stylize", "text.png", PAINTING, "-o", "out.png", "--local"),
        cwd=tmp_path,
        GRAMOPHONE_ENGINE="fake",
    ) as client:
        assert client.code() == 2, client.output
    assert "text.png: must be a JPEG, PNG or WebP image" in client.output
    assert processes_in(tmp_path) == []


def test_without_the_server_installed_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "SERVER", "no_such_package")
    assert not local_server.server_is_installed()
    words = "--local: the server is not installed in this Python; install it with `make install`"
    with pytest.raises(UsageError, match=words), local_server.local_server(print):
        pass
