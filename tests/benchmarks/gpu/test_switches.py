"""The section of the switches as a dry run on a CPU, with a tiny network."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import records, switches
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.predictions import SWITCHES, WIDTHS
from benchmarks.gpu.section import Section
from gramophone_server.network.tuning import Tuning


@pytest.fixture
def results(tmp_path: Path) -> Any:
    """Runs the section and returns what it wrote."""

    def run() -> records.Results:
        log = tmp_path / "found.jsonl"
        log.touch()
        clock = Clock(time.monotonic(), 600.0)
        switches.switches(Section("switches", "cpu", clock, clock.began + 600.0, [], log, tmp_path))
        return records.read(log)

    return run


def test_a_dry_run_measures_all_that_needs_no_gpu(results: Any) -> None:
    found = results()
    assert not found["failed"]
    assert "| fused check, same bits |" in found["facts"]["switches"]["lessons"]
    assert {one["what"] for one in found["left_out"]} == {s.name for s in SWITCHES if s.needs_cudnn}
    rows = [(row["name"], (row["size"], row["batch"])) for row in found["rows"]]
    expected = [(s.name, case) for s in SWITCHES if not s.needs_cudnn for case in s.cases]
    expected += [("batch width", (size, width)) for size, widths in WIDTHS.items() for width in widths]
    assert sorted(rows) == sorted([*expected, *(("frames", (size, 1)) for size in (256, 512, 1024))])
    assert all(row["ratio"] > 0 and row["predicted"] > 0 for row in found["rows"])


def test_a_switch_that_paints_something_else_fails(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = next(s for s in SWITCHES if s.name == "fused check")
    engine = switches.Bench.engine

    def broken(self: switches.Bench, tuning: Tuning) -> Any:
        made = engine(self, tuning)
        backward = made.features.backward

        def scaled(*arguments: Any) -> Any:
            grad, losses = backward(*arguments)
            return grad * 0 + 1, losses

        monkeypatch.setattr(made.features, "backward", scaled)
        return made

    monkeypatch.setattr(switches, "SWITCHES", (replace(switch, cases=switch.cases[:1]),))
    monkeypatch.setattr(switches, "WIDTHS", {})
    monkeypatch.setattr(switches.Bench, "engine", broken)
    (failure,) = results()["failed"]
    assert "its pictures are not those of the defaults" in failure["why"]


def test_a_form_that_is_not_right_is_measured_and_its_row_says_so(
    results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time says whether the fault is worth removing."""
    fused, biased = (
        replace(s, cases=s.cases[:1], needs_cudnn=False)
        for s in SWITCHES
        if s.name in ("forward fused", "forward biased")
    )
    monkeypatch.setattr(switches, "SWITCHES", (fused, biased))
    monkeypatch.setattr(switches, "WIDTHS", {})
    monkeypatch.setattr(switches.Bench, "faults", lambda self: [("fused", "hides NaN")])
    rows = {row["name"]: row for row in results()["rows"]}
    assert (rows["forward fused"]["fault"], rows["forward biased"]["fault"]) == ("`fused` hides NaN", "")
