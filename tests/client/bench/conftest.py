"""Fixtures for the tests of `gramophone bench`."""

import pytest

from gramophone_client.bench import run


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """The working folder, which is empty. Pauses after a refusal are short, and no step waits for the server to settle:
    the fake service always reports one running job."""
    monkeypatch.setattr(run, "MIN_PAUSE_S", 0.001)
    monkeypatch.setattr(run, "SETTLE_TIMEOUT_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path
