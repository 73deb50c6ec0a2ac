from tests.support.mixed_hour import Device, Hour, Verdict

# The goal is 1 % over an hour (`python -m tests.support.mixed_hour`). In a sample of this size, one job is 0.35 %.
MOST_WRONG = 0.015


def test_of_a_mixed_hour_almost_all_deadlines_are_judged_rightly():
    verdict = Verdict()
    slow = Device(slow_from_s=240.0, slow_until_s=340.0)
    for seed, device in ((1, slow), (2, Device()), (3, Device())):
        verdict.add(Hour(seconds=600.0, device=device), seed)
    assert verdict.possible > 250 and verdict.accepted > 350
    assert verdict.wrongly_refused <= MOST_WRONG * verdict.possible, verdict
    assert verdict.late <= MOST_WRONG * verdict.accepted, verdict
