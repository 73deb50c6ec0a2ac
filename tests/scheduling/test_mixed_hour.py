from tests.support.mixed_hour import Device, Hour, Verdict


def test_of_a_mixed_hour_almost_all_deadlines_are_judged_rightly():
    """A sample of `python -m tests.support.mixed_hour`."""
    verdict = Verdict()
    for seed in (1, 3):
        verdict.add(Hour(seconds=600.0, device=Device(slow_from_s=240.0, slow_until_s=340.0)), seed)
    assert verdict.possible > 150 and verdict.accepted > 240
    assert verdict.wrongly_refused <= 0.01 * verdict.possible, verdict
    assert verdict.late <= 0.01 * verdict.accepted, verdict
