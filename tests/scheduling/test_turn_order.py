"""What it costs to choose a turn, in calls of functions: no time passes. Who has the turn: test_worker, test_fair_share
and test_urgency."""

import math
import sys

import pytest

from tests.support.simulation import Device

FEW, MANY = 8, 60


@pytest.mark.parametrize("deadline_at", [math.inf, 1e6], ids=["without deadlines", "with deadlines"])
@pytest.mark.parametrize(("shapes", "most"), [(1, 12), (MANY, 40)], ids=["one batch", "one batch each"])
def test_a_turn_costs_little_more_beside_many_jobs_in_batches(shapes, most, deadline_at):
    """A newcomer joins. Each job that is in a batch already may take so many calls, of Python and of C."""
    few, many = (calls_of_a_join(jobs, shapes, deadline_at) for jobs in (FEW, MANY))
    assert many - few <= most * (MANY - FEW)


def calls_of_a_join(jobs, shapes, deadline_at):
    """Calls in the turn in which one more job joins a batch beside so many jobs in batches."""
    device = Device(max_running=2 * MANY, pixel_s=0.0, iteration_s=0.001, style_pixel_s=0.0)
    for n in range(jobs):
        task = device.task(f"owner {n % 8}", 10**5, size=64 + 2 * (n % shapes))
        task.deadline_at = deadline_at
        device.add(iter([(task, 0.0)]))
    device.run(lambda: False, 30)
    newcomer = device.task("newcomer", 16)
    device.worker.admit(newcomer)
    while newcomer.batch is None:
        calls = 0

        def count(_frame, event, _argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            device.worker.step([*device.running, newcomer])
        finally:
            sys.setprofile(None)
    return calls
