"""Parts of several runs become one result, if they belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import lessons, records
from benchmarks.gpu.merge import merge
from benchmarks.gpu.report import NOT_YET
from tests.support.gpu_parts import MACHINE, part

EXPECTED = ("here", "iteration", "style")
STYLE = {"name": "ours graph", "layer": "all five", "size": 512, "ms": 0.1, "ratio_vs_eager": 0.2, "ratio_vs_graph": 1}
OURS = {"name": "ours fp16", "size": 512, "batch": 1, "ms": 1.0, "ms_per_job": 1.0, "ratio_vs_floor": 1.7}


def iteration(ratio: float) -> dict[str, object]:
    return {**OURS, "ratio_vs_eager": ratio, "ratio_vs_eager16": ratio}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "RESULTS.md"
    page.write_text(f"{lessons.BEGIN}\n{lessons.END}\n\n## GPU\n\n{NOT_YET}")
    return page


def test_parts_are_put_together_and_the_newest_counts(
    tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = "2026-12-01T11:00:00.000+00:00"
    folder = tmp_path / "parts"
    folder.mkdir()
    part(folder / "again.jsonl", {"iteration": [iteration(0.2)]}, started=later)
    part(folder / "first.jsonl", {"iteration": [iteration(0.5)]})
    alone = part(tmp_path / "b.jsonl", {"style": [STYLE]})
    records.write(alone, "fact", "switches", {"lessons": "the table of one call"})
    code = merge([alone, folder], EXPECTED, tmp_path / "results", page, None)
    assert code == 0
    found = json.loads((tmp_path / "results" / "NVIDIA-H200.json").read_text())
    assert [row["ratio_vs_eager"] for row in found["rows"]] == [0.2, 0.2]
    assert len(found["runs"]) == 3
    text = page.read_text()
    assert "| 512 px: ours / eager fp32 | at most 0.25 | 0.2 | met |" in text
    assert NOT_YET not in text
    assert lessons.table(found["rows"]).strip() in text
    assert "the table of one call" not in text  # the page has one table of lessons
    printed = capsys.readouterr().out
    assert "met: style op, 512 px: torch / ours: 5, at least 4" in printed
    assert "missed by 4.00 times: style op, 512 px: the same, both as graphs" in printed
    assert printed.splitlines()[-1].startswith("goals: ")


@pytest.mark.parametrize(("key", "value"), [("gpu", "NVIDIA L4"), ("torch", "2.14.1"), ("cudnn", 91900)])
def test_parts_of_other_machines_are_refused(
    key: str, value: object, tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = page.read_text()
    parts = [part(tmp_path / "a.jsonl", {}), part(tmp_path / "b.jsonl", {}, machine={**MACHINE, key: value})]
    assert merge(parts, EXPECTED, tmp_path / "results", page, tmp_path / "out") == 2
    assert f"{key}: {MACHINE.get(key, 'none')} in a.jsonl; {value} in b.jsonl" in capsys.readouterr().out
    assert not (tmp_path / "results").exists() and not (tmp_path / "out").exists()
    assert page.read_text() == before


def test_another_driver_is_reported_and_not_refused(tmp_path: Path, page: Path) -> None:
    parts = [part(tmp_path / "a.jsonl", {}), part(tmp_path / "b.jsonl", {}, machine={**MACHINE, "driver": "590.2"})]
    assert merge(parts, ("here",), tmp_path / "results", page, None) == 0
    assert "They differ in driver: 580.1 in a.jsonl; 590.2 in b.jsonl." in page.read_text()


def test_incomplete_parts_are_merged_and_what_is_missing_is_reported(
    tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = part(tmp_path / "a.jsonl", {})
    records.write(cut, "start", "iteration", {"at": "2026-12-01T10:01:00"})
    records.write(cut, "row", "iteration", iteration(0.2))
    with cut.open("a") as file:
        file.write('{"kind": "row", "sec')
    unknown = tmp_path / "b.jsonl"
    records.write(unknown, "run", "b", {"device": "cuda", "sections": [], "started": "2026-12-01"})
    assert merge([cut, unknown], EXPECTED, tmp_path / "results", page, None) == 1
    printed = capsys.readouterr().out
    assert f"{unknown} is left out: it does not say which machine it is from" in printed
    assert "CUT OFF iteration\nMISSING style" in printed
    assert "- Cut off: iteration\n- Missing: style" in page.read_text()
    assert merge([unknown], EXPECTED, tmp_path / "results", page, None) == 2


def test_a_dry_run_does_not_become_a_result(tmp_path: Path, page: Path) -> None:
    before = page.read_text()
    one = part(tmp_path / "a.jsonl", {}, device="cpu", machine={"torch": "2.14.1"})
    assert merge([one], ("here",), tmp_path / "results", page, tmp_path / "out") == 0
    assert "**A dry run" in (tmp_path / "out" / "dry-run.md").read_text()
    assert not (tmp_path / "results").exists()
    assert page.read_text() == before
    # Nor does it hide among the parts of a GPU.
    assert merge([one, part(tmp_path / "b.jsonl", {})], ("here",), tmp_path / "results", page, None) == 2
