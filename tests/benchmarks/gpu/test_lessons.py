"""The table of lessons: RESULTS.md has it as it is computed, and verdicts follow from ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import lessons
from benchmarks.gpu.launches import launches
from benchmarks.gpu.predictions import SWITCHES, largest_gain
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.network.tuning import Tuning

BENCHMARKS = Path(lessons.__file__).parent.parent


def measured_rows() -> list[dict[str, object]]:
    """The rows of the newest GPU check; none before the first."""
    files = sorted((BENCHMARKS / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(files[-1].read_text())["rows"] if files else []


def test_results_have_the_table_of_the_data() -> None:
    text = (BENCHMARKS / "RESULTS.md").read_text()
    assert lessons.placed(text, lessons.table(measured_rows())) == text, "run: python -m benchmarks.gpu.lessons"


def test_results_have_the_launches_of_an_iteration() -> None:
    counts = [launches(Recipe(optimiser=optimiser)).total() for optimiser in (Optimiser.ADAM, Optimiser.LBFGS)]
    text = " ".join((BENCHMARKS / "RESULTS.md").read_text().split())
    assert "launches {} kernels with Adam and {} with L-BFGS".format(*counts) in text
    assert launches(Recipe(), Tuning(fused_check=True)).total() == launches(Recipe()).total() - 1


def test_predictions_are_finite_and_the_largest_gain_comes_first() -> None:
    lines = lessons.table([]).splitlines()
    order = [line.split("|")[1].strip().removesuffix(", same bits") for line in lines if line.startswith("| ")]
    ranked = sorted(SWITCHES, key=largest_gain)
    assert order[3:-1] == [switch.name for switch in ranked]  # after the head and the widths of batches
    assert all(0.9 < switch.predicted(case) < 1.1 for switch in SWITCHES for case in switch.cases)
    assert sum("not measured" in line for line in lines) == len(SWITCHES) + 3


@pytest.mark.parametrize(
    ("measured", "predicted", "fault", "expected"),
    [
        ([], [], "", "not measured"),
        ([0.95, 0.96], [0.96, 0.96], "", "**flip the default**"),
        ([0.9, 1.02], [0.96, 0.96], "", "flip it for the sizes that gain"),
        ([1.0, 1.005], [1.0, 1.0], "", "leave it: no difference"),
        ([1.1], [0.96], "", "leave it: slower; predicted 15% too fast"),
        ([0.8], [1.0], "", "**flip the default**; predicted 20% too slow"),
        ([0.9], [0.9], "two runs differ", "leave it: two runs differ"),
    ],
)
def test_verdicts(measured: list[float], predicted: list[float], fault: str, expected: str) -> None:
    assert lessons.verdict(measured, predicted, fault) == expected


def test_measured_ratios_stand_beside_the_predicted_ones() -> None:
    row = {"section": "switches", "name": "fused check", "size": 256, "batch": 1, "ratio": 0.98, "fault": ""}
    width = {"section": "switches", "name": "batch width", "size": 512, "batch": 4, "ratio": 0.9}
    frames = {"section": "switches", "name": "frames", "size": 256, "batch": 1, "ratio": 1.01}
    text = lessons.table([row, width, frames, row | {"section": "other", "ratio": 7.0}])
    assert "| 256 px: 0.996, 512 px: 0.998, 1024 px: 0.999, 256 px x 16: 0.999 | 256 px: 0.980 | **flip" in text
    assert "| 4 jobs: 0.900 | the scheduler measures widths itself |" in text
    assert "| 256 px: 1.010 | the cost of frames |" in text


def test_a_text_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="add <!-- lessons:begin --> and <!-- lessons:end -->"):
        lessons.placed("# Results\n", "table")
