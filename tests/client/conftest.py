"""Fixtures for the tests of the client: a fake service, a client that is connected to it, and its command line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from gramophone_client import AsyncGramophoneClient, cli
from gramophone_client.streams import recovery_states
from tests.support.clock import WITHIN_S
from tests.support.fake_service import PAINTING, PHOTO, FakeService, serving


@pytest.fixture
def service() -> Iterator[FakeService]:
    """A fake service on the loopback."""
    with serving() as fake:
        yield fake


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[AsyncGramophoneClient]:
    """A client of the fake service."""
    async with AsyncGramophoneClient(service.target, timeout=WITHIN_S) as connected:
        yield connected


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries after a loss come quickly."""
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.01, 0.05))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(PHOTO)
    (tmp_path / "painting.png").write_bytes(PAINTING)
    return tmp_path


@pytest.fixture
def gramophone(
    service: FakeService, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, list[str]]]:
    """Runs a command against the fake service; returns (exit code, standard output, lines of standard error)."""
    monkeypatch.setenv("GRAMOPHONE_SERVER", service.target)
    for name in ("GRAMOPHONE_TARGET", "GRAMOPHONE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))  # not the user's own file of targets

    def run(command: str) -> tuple[int, str, list[str]]:
        try:
            code = cli.main(command.split())
        except SystemExit as error:  # raised by argparse
            assert isinstance(error.code, int)
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run
