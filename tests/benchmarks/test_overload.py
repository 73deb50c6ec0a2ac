"""The calculations of the overload benchmark, with invented measurements."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import overload
from benchmarks.overload import PLACES, Outcome
from gramophone_client.bench.arrivals import OpenLoop
from gramophone_client.bench.measure import OK, Sample, Tally
from gramophone_client.bench.report import Step

CAPACITY = 50.0


def step(results: list[float], **failures: list[float]) -> Step:
    """A step of 10 s, from the latency of each result and, by status, of each failure."""
    tally = Tally(seconds=10.0, due=len(results) + sum(map(len, failures.values())))
    for status, ended in {OK: results, **failures}.items():
        for ended_s in ended:
            tally.add(Sample("patient", 0.0, ended_s, status))
    return Step(
        load=OpenLoop(1.0),
        ending="time is up",
        is_warm=True,
        began_s=0.0,
        windows=(),
        tally=tally,
        unfinished=0,
        oldest_unfinished_s=0.0,
        late_s=0.0,
        client_cpu=0.5,
        server_before=None,
        server_after=None,
        timeline=(dict(tally.statuses),),
    )


def outcome(factor: float, results: list[float], cpu_s: float, **failures: list[float]) -> Outcome:
    """One turn of ten seconds."""
    new = Outcome(factor, factor * CAPACITY)
    new.add(step(results, **failures), cpu_s, 10.0)
    return new


def curve(*, at_most: float = 0.4, last: int = 495) -> list[Outcome]:
    return [
        outcome(1.0, [0.2] * 500, 2.0),
        outcome(2.0, [at_most] * 500, 3.0, QUEUE_FULL=[0.002] * 500),
        outcome(3.0, [at_most] * last, 3.4, QUEUE_FULL=[0.002] * 1000),
    ]


def judged(patient: list[Outcome], hurried: list[Outcome]) -> dict[str, overload.Verdict]:
    verdicts = overload.judged(CAPACITY, patient, hurried, sleeps=True)
    return {
        verdict.goal.split(" ")[0] + " in a hurry" * (" in a hurry" in verdict.goal): verdict for verdict in verdicts
    }


def test_turns_add_up() -> None:
    twice = outcome(3.0, [0.1, 0.3], 2.0, QUEUE_FULL=[0.001], DEADLINE_UNATTAINABLE=[0.004], DEADLINE_EXCEEDED=[0.5])
    twice.add(step([0.2], UNAVAILABLE=[0.1]), 1.0, 10.0)
    row = twice.row()
    assert (row["missed"], row["full"], row["too late"], twice.untyped) == (1, 1, 1, 1)
    assert row["sent per s"] == pytest.approx(7 / 20), "not the rate that was offered"
    assert row["done per s"] == pytest.approx(3 / 20)
    assert row["p50 s"] == pytest.approx(0.2, rel=0.01)
    assert row["refusal p50 ms"] == pytest.approx(1, rel=0.01)
    assert row["refusal p99 ms"] == pytest.approx(4, rel=0.01)
    assert row["server cpu %"] == pytest.approx(15)
    assert row["client cpu %"] == pytest.approx(50)


def test_goals_that_are_met() -> None:
    verdicts = judged(curve(), curve())
    assert len(verdicts) == 8 and all(verdict.met for verdict in verdicts.values()), verdicts
    assert verdicts["goodput"].measured == "99%"
    assert verdicts["a"].measured == "0.80 ms"  # 0.04 s more CPU per second for 50 more refusals per second


@pytest.mark.parametrize(
    ("goal", "patient", "hurried"),
    [
        ("goodput", curve(last=440), curve()),
        ("3x, a", [outcome(3.0, [0.2] * 500, 2.0), outcome(3.0, [0.2] * 500, 2.0)], curve()),
        ("p95", curve(at_most=1.25 * PLACES / CAPACITY + 0.01), curve()),
        ("p95 in a hurry", curve(), curve(at_most=2 * PLACES / CAPACITY + 0.01)),
        ("a", [outcome(2.0, [0.4] * 500, 3.0, QUEUE_FULL=[0.002] * 500)], curve()),
        ("p99", curve(), [*curve(), outcome(3.0, [0.4], 3.0, DEADLINE_UNATTAINABLE=[0.06])]),
        ("every", curve(), [*curve(), outcome(3.0, [0.4], 3.0, UNAVAILABLE=[0.001])]),
        ("at", curve(), [*curve(), outcome(3.0, [0.4], 3.0, DEADLINE_EXCEEDED=[0.4] * 40)]),
        ("a", [*curve(), outcome(4.0, [0.4] * 495, 9.0, QUEUE_FULL=[0.002] * 1500)], curve()),
    ],
)
def test_a_goal_that_is_missed(goal: str, patient: list[Outcome], hurried: list[Outcome]) -> None:
    missed = {name for name, verdict in judged(patient, hurried).items() if not verdict.met}
    assert missed == set(goal.split(", "))


def test_the_cost_of_a_refusal_is_not_judged_with_an_engine_that_uses_the_cpu() -> None:
    assert len(overload.judged(CAPACITY, curve(), curve(), sleeps=False)) == 7


def test_jobs_with_short_deadlines_may_delay_others_beyond_the_length_of_the_queue() -> None:
    verdicts = judged(curve(), curve(at_most=1.5 * PLACES / CAPACITY))
    assert all(verdict.met for verdict in verdicts.values()), verdicts
    assert verdicts["p95"].measured == "0.4 s" and verdicts["p95 in a hurry"].measured == "0.6 s"


async def test_each_turn_has_its_own_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    async def run_step(*_: Any, seed: int = 0) -> tuple[Step, float, float]:
        seeds.append(seed)
        return step([0.2] * 500), 1.0, 10.0

    monkeypatch.setattr(overload, "run_step", run_step)
    await overload.measured("127.0.0.1:9", 0, overload.PROFILES["fake"], 10.0, 3)
    one = 2 * len(overload.FACTORS)
    assert seeds == [0, 0, *[0] * one, *[1] * one, *[2] * one]


def test_the_curve_is_a_standalone_svg() -> None:
    root = ElementTree.fromstring(overload.drawn("overload & more", CAPACITY, curve()))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter() if element.text]
    for text in ("overload & more", "Jobs per second", "refused", "p99", "3x"):
        assert text in texts
    tips = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "done: 49.5 at 3x" in tips and "refused: 100 at 3x" in tips
    assert "prefers-color-scheme: dark" in "".join(texts)
