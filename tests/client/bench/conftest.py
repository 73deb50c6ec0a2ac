"""Fixtures for the tests of `gramophone bench`."""

import pytest

from gramophone_client import cli
from gramophone_client.bench import run


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The working folder, which is empty. Pauses after a refusal are short, and no step waits for the server to settle:
    the fake service always reports one running job."""
    monkeypatch.setattr(run, "MIN_PAUSE_S", 0.001)
    monkeypatch.setattr(run, "SETTLE_TIMEOUT_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def gramophone(service, monkeypatch, capsys):
    """Runs a command against the fake service; returns (exit code, standard output, lines of standard error)."""
    monkeypatch.setenv("GRAMOPHONE_SERVER", service.target)

    def run(command: str):
        try:
            code = cli.main(command.split())
        except SystemExit as error:  # raised by argparse
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run
