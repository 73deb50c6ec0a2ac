"""The report of a GPU check: its goals, its tables, and its place in RESULTS.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, gpu_report
from benchmarks.section import Section

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "RESULTS.md"
FASTEST = {"section": "iteration", "name": "ours fp16", "batch": 1, "ms_per_job": 1.0}
CONVOLUTION = {"section": "convolutions", "way": "forward", "layer": "1_2", "size": 512}
STYLE = {"section": "style", "layer": "all five", "size": 512}


def make_report() -> dict[str, Any]:
    rows = [
        {"section": "tests", "name": "test_graphs.py", "passed": 12, "skipped": 1, "failed": 0},
        {"section": "sanitizer", "name": "memcheck", "found": 0},
        {"section": "ceilings", "name": "matmul fp16", "unit": "TFLOP/s", "rate": 790.4, "ms": 1.39},
        {**CONVOLUTION, "name": "bare", "ms": 0.031, "ratio_vs_floor": 1.3},
        {**CONVOLUTION, "name": "fused", "ms": 0.028, "ratio_vs_floor": 1.2},
        {**STYLE, "name": "torch", "ms": 0.4, "ratio_vs_eager": 1.0, "ratio_vs_graph": 1.5},
        {**STYLE, "name": "ours graph", "ms": 0.08, "ratio_vs_eager": 0.2, "ratio_vs_graph": 0.3},
        {**FASTEST, "size": 256, "ms": 0.4, "ratio_vs_eager": 0.2, "ratio_vs_eager16": 0.3, "ratio_vs_floor": 3.5},
        {**FASTEST, "size": 512, "ms": 0.97, "ratio_vs_eager": 0.3, "ratio_vs_eager16": 0.5, "ratio_vs_floor": 2.0},
        {**FASTEST, "size": 1024, "ms": 3.4, "ratio_vs_eager": 0.2, "ratio_vs_eager16": 0.5, "ratio_vs_floor": None},
        {"section": "job", "name": "16 jobs together", "size": 256, "ms": 100.0, "throughput_vs_in_turn": 2.0},
        {"section": "memory", "name": "memory", "size": 512, "batch": 4, "needed_mb": 700.0, "ratio": 0.9},
    ]  # fmt: skip
    return {
        "machine": {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "date": "2026-12-01", "network": "VGG"},
        "rows": rows,
        "profile": {"profile 512 px": "970.0 us per iteration in 60 kernels\n 100.0 us  10%  conv"},
        "forms": {},
        "failed": [{"section": "compile", "what": "512 px", "why": "no compiler"}],
        "left_out": [{"section": "machine", "what": "tables", "why": "the package rich is not installed"}],
    }


def test_goals_are_met_or_missed_by_a_factor() -> None:
    goals = {goal.what: goal for goal in gpu_report.goals(make_report()["rows"])}
    assert goals["256 px: ours / eager fp32"].met
    assert goals["256 px: ours / eager 16-bit channels_last"].met  # 0.3 of at most 1/3
    assert "256 px: ours / FLOP floor" not in goals  # the goal applies from 512 px up
    missed = goals["512 px: ours / eager fp32"]
    assert not missed.met and missed.missed_by == pytest.approx(1.2)
    assert goals["512 px: ours / FLOP floor"].missed_by == pytest.approx(2 / 1.8)
    assert "1024 px: ours / FLOP floor" not in goals  # without the ceilings there is no FLOP floor
    assert goals["style op, 512 px: torch / ours"].measured == pytest.approx(5)
    both_graphs = goals["the same, both as graphs"]
    assert not both_graphs.met and both_graphs.missed_by == pytest.approx(1.2)
    assert goals["16 jobs of 256 px: throughput together / in turn"].met


def test_the_section_has_all_results() -> None:
    text = gpu_report.section(make_report())
    assert text.startswith("### NVIDIA H200\n\ndriver 580.1, torch 2.11.0, 2026-12-01. `make gpu-check`")
    for line in (
        "| 512 px: ours / eager fp32 | at most 0.25 | 0.3 | **missed** by 1.20 times |",
        "| matmul fp16 | 790.4 TFLOP/s |",
        "| 512 px x 1 | ours fp16 | 0.97 | 1 | 0.3 | 0.5 | 2 |",
        "| 512 px | all five | 400 | 80 | 5 |",
        "| 512 px | conv 1_2 | forward | fused 28, bare 31 | 1.2 |",
        "| test_graphs.py | 12 | 1 | 0 |",
        "compute-sanitizer memcheck: 0 found.",
        "- Failed: compile, 512 px: no compiler",
        "- Left out: machine, tables: the package rich is not installed",
    ):
        assert line in text


def test_there_is_a_section_without_results() -> None:
    empty = {"machine": {}, "rows": [], "profile": {}, "forms": {}, "failed": [], "left_out": []}
    assert gpu_report.section(empty) == "### no GPU\n\nno date. `make gpu-check`\n"


def test_a_section_replaces_its_older_version() -> None:
    before = f"# Results\n\n## GPU\n\n{gpu_report.NOT_YET}"
    once = gpu_report.placed(before, "A", "one\n")
    assert once == "# Results\n\n## GPU\n\n<!-- gpu:begin A -->\none\n<!-- gpu:end A -->\n"
    both = gpu_report.placed(once, "B", r"two \1")
    again = gpu_report.placed(both, "A", "three")
    assert again == both.replace("one", "three")
    assert r"two \1" in again


def test_the_results_state_whether_a_gpu_was_measured() -> None:
    text = RESULTS.read_text()
    assert ("<!-- gpu:begin" in text) != (gpu_report.NOT_YET in text)


def test_a_part_that_fails_does_not_affect_others(tmp_path: Path) -> None:
    log = tmp_path / "found.jsonl"
    log.touch()
    section = Section("style", "cpu", 60.0, [], log, tmp_path)

    def broken() -> None:
        section.row(name="half done", ms=1.0)
        raise RuntimeError("a reason\nand a trace")

    assert not section.attempt("one", broken)
    assert section.attempt("two", lambda: section.fact("profile x", "text"))
    assert not section.attempt("three", lambda: None, seconds=3600)
    with log.open("a") as file:
        file.write('{"row": {"section": "st')  # an incomplete line
    found = gpu_check.read(log)
    assert found["rows"] == [{"section": "style", "name": "half done", "ms": 1.0}]
    assert found["failed"] == [{"section": "style", "what": "one", "why": "RuntimeError: a reason"}]
    assert [one["what"] for one in found["left_out"]] == ["three"]
    assert found["profile"] == {"profile x": "text"}
    assert json.dumps(found)
