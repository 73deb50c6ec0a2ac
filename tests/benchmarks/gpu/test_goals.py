"""Goals are met, missed by a factor, or not measured."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.goals import Goal, goals


def found(*rows: dict[str, Any]) -> dict[str, Goal]:
    return {goal.what: goal for goal in goals(rows)}


def iteration(section: str, size: int, eager: float, sixteen: float, floor: float | None) -> dict[str, Any]:
    ratios = {"ratio_vs_eager": eager, "ratio_vs_eager16": sixteen, "ratio_vs_floor": floor}
    return {"section": section, "name": "ours fp16", "batch": 1, "size": size, **ratios}


def test_without_rows_every_goal_is_listed_as_not_measured() -> None:
    everything = goals([])
    assert len(everything) == len({goal.what for goal in everything}) == 19
    assert all(goal.verdict == "not measured" and not goal.met for goal in everything)


def test_goals_of_an_iteration() -> None:
    by_name = found(
        iteration("iteration", 512, 0.3, 0.5, 2.0),
        iteration("sizes", 256, 0.2, 0.3, 3.5),
        iteration("iteration", 1024, 0.2, 0.5, None),  # without the ceilings there is no floor
        iteration("compile", 2048, 0.2, 0.5, 1.0),
        {**iteration("sizes", 2048, 0.1, 0.1, 1.0), "batch": 4},
    )
    assert by_name["256 px: ours / eager fp32"].met
    assert by_name["256 px: ours / eager 16-bit channels_last"].met  # 0.3 of at most 1/3
    assert "256 px: ours / FLOP floor" not in by_name  # the goal applies from 512 px up
    missed = by_name["512 px: ours / eager fp32"]
    assert not missed.met and missed.verdict == "missed by 1.20 times"
    assert by_name["512 px: ours / FLOP floor"].verdict == "missed by 1.11 times"
    assert by_name["1024 px: ours / FLOP floor"].verdict == "not measured"
    assert by_name["2048 px: ours / eager fp32"].verdict == "not measured"


def test_goals_of_the_style_op_and_of_the_service() -> None:
    service = {"section": "service"}
    by_name = found(
        {"section": "style", "name": "ours graph", "layer": "all five", "size": 512, "ratio_vs_eager": 0.2,
         "ratio_vs_graph": 0.3},
        {**service, "name": "warm", "size": 512, "ms": 400.0, "first_frame_ms": 200.0},
        {**service, "name": "fast, 512 px", "ratio_vs_engine": 1.5},
        {**service, "name": "16 jobs together", "size": 256, "throughput_vs_in_turn": 2.0},
    )  # fmt: skip
    assert by_name["style op, 512 px: torch / ours"].measured == pytest.approx(5)
    assert by_name["style op, 512 px: the same, both as graphs"].verdict == "missed by 1.20 times"
    assert by_name["`fast` at 512 px through the server, warm: ms"].met
    assert by_name["its first frame: ms"].verdict == "missed by 1.33 times"
    assert not by_name["fast, 512 px: through the server / in process"].met
    assert by_name["quality, 1024 px: through the server / in process"].measured is None
    assert by_name["16 jobs of 256 px through the server: throughput together / in turn"].met


@pytest.mark.parametrize(("ratios", "factor", "met"), [((0.95, 1.05), 1.0526, True), ((1.05, 0.8), 1.25, False)])
def test_the_memory_goal_is_for_the_worst_estimate_in_either_direction(
    ratios: tuple[float, float], factor: float, met: bool
) -> None:
    rows = [{"section": "memory", "size": 512, "batch": batch, "ratio": ratio} for batch, ratio in enumerate(ratios, 1)]
    (goal,) = (goal for goal in goals(rows) if goal.what.startswith("memory"))
    assert goal.measured == pytest.approx(factor, rel=1e-3)
    assert goal.met == met
