"""A registry on a clock and timers that the test moves by hand."""

import pytest

from gramophone_server.config import Limits
from gramophone_server.jobs.registry import JobRegistry
from tests.support.clock import ManualClock, ManualLoop


@pytest.fixture
def loop():
    return ManualLoop(ManualClock(1000.0, epoch_s=5000.0))


@pytest.fixture
def withdrawn():
    """The jobs that were taken out of the scheduler."""
    return []


@pytest.fixture
def registry(loop, withdrawn):
    """Makes a registry with limits."""

    def make(**limits):
        return JobRegistry(withdrawn.append, Limits(**limits), loop=loop, clock=loop.clock.time)

    return make
