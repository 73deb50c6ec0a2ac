"""Fixtures of the kernels' tests. They run on the emulator or, with GRAMOPHONE_TEST_ON=cuda, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import emulated


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The ops of the kernels under test."""
    return emulated.library()


# A GPU has its own order, which differs from run to run, so one run is enough there.
@pytest.fixture(params=[0] if emulated.ON_GPU else [0, 1, 7], ids=lambda seed: f"order {seed}")
def order(request: pytest.FixtureRequest) -> Iterator[None]:
    """The order in which blocks and warps run: ascending, descending, shuffled."""
    emulated.order(request.param)
    yield
    emulated.order(0)
