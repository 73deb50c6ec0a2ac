"""Records survive an end within a line, and a section that ran again replaces its older results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu import records
from tests.support.gpu_parts import MACHINE, part

ROW = {"name": "ours fp16", "ms": 1.0}


def test_an_incomplete_line_is_skipped_and_nothing_is_appended_to_it(tmp_path: Path) -> None:
    path = part(tmp_path / "a.jsonl", {"iteration": [ROW]})
    with path.open("a") as file:
        file.write('{"kind": "row", "section": "iteration", "va')
    records.write(path, "row", "iteration", {"name": "later"})
    with path.open("a") as file:
        file.write('{"kind": "row"}\n7\n{"kind"')
    found = records.read(path)
    assert [row["name"] for row in found["rows"]] == ["ours fp16", "later"]
    assert found["machine"] == MACHINE


def test_a_section_that_ran_again_replaces_its_rows_facts_and_failures(tmp_path: Path) -> None:
    first = part(tmp_path / "a.jsonl", {"iteration": [ROW, ROW], "style": [ROW]})
    records.write(first, "failed", "iteration", {"what": "512 px", "why": "a reason"})
    records.write(first, "fact", "iteration", {"forms": "old"})
    second = part(tmp_path / "b.jsonl", {"iteration": [{"name": "new"}]})
    found = records.total([first.read_text(), second.read_text()])
    assert [(row["section"], row["name"]) for row in found["rows"]] == [("iteration", "new"), ("style", "ours fp16")]
    assert not found["failed"] and not found["facts"]


def test_a_section_that_was_cut_off_before_its_first_result_replaces_nothing(tmp_path: Path) -> None:
    first = part(tmp_path / "a.jsonl", {"iteration": [ROW]})
    second = part(tmp_path / "b.jsonl", {})
    records.write(second, "start", "iteration", {"at": "later"})
    texts = [first.read_text(), second.read_text()]
    found = records.total(texts)
    assert len(found["rows"]) == 1
    assert records.absent(found, ["here", "iteration", "style"]) == ["style"]
    # With a result it does, and the section then counts as cut off.
    records.write(second, "row", "iteration", {"name": "new"})
    found = records.total([texts[0], second.read_text()])
    assert [row["name"] for row in found["rows"]] == ["new"]
    assert records.absent(found, ["here", "iteration"]) == ["iteration"]
