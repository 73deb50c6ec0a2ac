"""Fixtures of the ops' tests."""

from __future__ import annotations

import pytest

from gramophone_server.ops import functional, library


@pytest.fixture(params=["kernels", "library"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ops` calls the kernels, or the versions of all ops through torch's library."""
    if request.param == "library":
        monkeypatch.setattr(functional, "by_library", {op: getattr(library, op) for op in library.__all__})
