"""The report of a GPU check: its tables, and its place in RESULTS.md."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import records, report
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.section import Section

ROOT = Path(__file__).parent.parent.parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
FASTEST = {"section": "iteration", "name": "ours fp16", "batch": 1, "ms_per_job": 1.0}
CONVOLUTION = {"section": "convolutions", "way": "forward", "layer": "1_2", "size": 512}
EXPECTED = ("here", "profile")
STYLE = {"section": "style", "layer": "all five", "size": 512}


def make_report() -> dict[str, Any]:
    rows = [
        {"section": "tests", "name": "test_graphs.py", "passed": 12, "skipped": 1, "failed": 0, "seconds": 30.1},
        {"section": "sanitizer", "name": "memcheck", "found": 0},
        {"section": "ceilings", "name": "matmul fp16", "unit": "TFLOP/s", "rate": 790.4, "ms": 1.39},
        {"section": "ceilings", "name": "matmul tf32", "unit": "TFLOP/s", "rate": 390.4, "ms": 2.8},
        {"section": "ceilings_b", "name": "matmul fp16", "unit": "TFLOP/s", "rate": 770.1, "ms": 1.39},
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
        "runs": [{"device": "cuda", "sections": ["here", "profile"], "started": "2026-12-01T10:00:00"}],
        "sections": {name: {"started": "", "seconds": 1.0} for name in EXPECTED} | {"compile": {"seconds": None}},
        "facts": {
            "profile": {"profile 512 px": "970.0 us per iteration in 60 kernels\n 100.0 us  10%  conv"},
            "switches": {"lessons": "| 256 px: 0.980 | **flip the default** |"},
        },
        "failed": [{"section": "compile", "what": "512 px", "why": "no compiler"}],
        "left_out": [{"section": "here", "what": "tests", "why": "the package pytest is not installed"}],
    }


def test_the_section_has_all_results() -> None:
    text = report.section(make_report(), [*EXPECTED, "compile", "style"])
    assert text.startswith("### NVIDIA H200\n\ndriver 580.1, torch 2.11.0, 2026-12-01. `make gpu-check`")
    for line in (
        "| 512 px: ours / eager fp32 | at most 0.25 | 0.3 | **missed** by 1.20 times |",
        "| matmul fp16 | 790.4 TFLOP/s | 770.1 TFLOP/s |",
        "| matmul tf32 | 390.4 TFLOP/s |  |",
        "| 512 px x 1 | ours fp16 | 0.97 | 1 | 0.3 | 0.5 | 2 |",
        "| 512 px | all five | 400 | 80 | 5 |",
        "| 512 px | conv 1_2 | forward | fused 28, bare 31 | 1.2 |",
        "| test_graphs.py | 12 | 1 | 0 | 30.1 |",
        "compute-sanitizer memcheck: 0 found.",
        "#### Table of lessons",
        "| 256 px: 0.980 | **flip the default** |",
        "- Failed: compile, 512 px: no compiler",
        "- Left out: here, tests: the package pytest is not installed",
        "- Cut off: compile",
        "- Missing: style",
    ):
        assert line in text


def test_there_is_a_section_without_results() -> None:
    assert report.section(records.total([]), []) == "### no GPU\n\nno date. `make gpu-check`\n"


def test_a_section_replaces_its_older_version() -> None:
    before = f"# Results\n\n## GPU\n\n{report.NOT_YET}"
    once = report.placed(before, "A", "one\n")
    assert once == "# Results\n\n## GPU\n\n<!-- gpu:begin A -->\none\n<!-- gpu:end A -->\n"
    both = report.placed(once, "B", r"two \1")
    again = report.placed(both, "A", "three")
    assert again == both.replace("one", "three")
    assert r"two \1" in again


def test_the_results_state_whether_a_gpu_was_measured() -> None:
    text = RESULTS.read_text()
    assert ("<!-- gpu:begin" in text) != (report.NOT_YET in text)


def test_a_part_that_fails_does_not_affect_others(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.touch()
    clock = Clock(time.monotonic(), 60.0)
    section = Section("profile", "cuda", clock, clock.began + 60.0, [], file, tmp_path)

    def broken() -> None:
        section.row(name="half done", ms=1.0)
        raise RuntimeError("a reason\nand a trace")

    assert not section.attempt("one", broken)
    assert section.attempt("two", lambda: section.fact("profile x", "text"))
    assert not section.attempt("three", lambda: None, seconds=3600)
    found = records.read(file)
    assert found["rows"] == [{"section": "profile", "name": "half done", "ms": 1.0}]
    assert found["failed"] == [{"section": "profile", "what": "one", "why": "RuntimeError: a reason"}]
    assert [one["what"] for one in found["left_out"]] == ["three"]
    assert "text" in report.section(found, ["profile"])


def test_nothing_that_the_check_itself_runs_imports_torch() -> None:
    """It would take seconds of the time limit."""
    program = "import sys; import benchmarks.gpu.check as c, benchmarks.gpu.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False).returncode == 0
