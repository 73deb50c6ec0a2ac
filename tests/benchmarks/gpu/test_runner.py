"""Sections keep to their time, whatever they do, and their results survive."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu import records
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.runner import Step, run

FAKE = "tests.support.gpu_parts:"


# Seconds for a section that hangs. A process starts in 3 s on a quiet machine, and a busy one gets another try.
SHARES = (8, 20, 60, 180)


def test_a_section_that_hangs_is_killed_and_the_run_ends_in_time(tmp_path: Path) -> None:
    for share in SHARES:
        file = tmp_path / f"{share}.jsonl"
        file.touch()
        clock = Clock(time.monotonic(), share + 184.0)
        steps = {name: Step(f"{FAKE}{name}", 60) for name in ("hanging", "dying", "missing", "good")}
        steps["hanging"] = Step(f"{FAKE}hanging", share)
        names = list(run(steps, "cpu", clock, file, tmp_path, lambda: None))
        assert clock.left > 0
        assert names == list(steps)
        found = records.read(file)
        if found["rows"][0]["section"] == "hanging" or share == SHARES[-1]:
            break
    assert [(row["section"], row["name"]) for row in found["rows"]] == [
        ("hanging", "before"),
        ("dying", "before"),
        ("good", "good"),
    ]
    why = {one["section"]: one["why"] for one in found["failed"]}
    assert why["hanging"] == "it exceeded its time and was killed"
    assert why["dying"].startswith("its process ended with 3")
    assert "has no attribute 'missing'" in why["missing"]
    assert not records.absent(found, list(steps))
    # What the section had started was killed with it.
    assert not alive(found["rows"][0]["pid"])


def test_a_kernel_can_be_replaced_in_all_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAMOPHONE_LIBRARY_OPS", "tv_, adam_")
    file = tmp_path / "a.jsonl"
    file.touch()
    list(run({"good": Step(f"{FAKE}good", 60)}, "cpu", Clock(time.monotonic(), 60.0), file, tmp_path, lambda: None))
    found = records.read(file)
    assert found["rows"]
    assert [one["why"] for one in found["failed"]] == ["these ops ran through torch's library: adam_, tv_"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_time_that_a_section_leaves_goes_to_the_next(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.touch()
    steps = {"one": Step(f"{FAKE}good", 60), "two": Step(f"{FAKE}good", 30)}
    for _ in run(steps, "cpu", Clock(time.monotonic(), 93.0), file, tmp_path, lambda: None):
        pass
    one, two = (row["seconds"] for row in records.read(file)["rows"])
    assert one < 58 < two  # of which 30 are its own


def test_a_run_that_is_left_early_ends_its_processes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.touch()
    steps = {"one": Step(f"{FAKE}good", 60), "two": Step(f"{FAKE}hanging", 30)}
    sections = run(steps, "cpu", Clock(time.monotonic(), 90.0), file, tmp_path, lambda: None)
    assert next(sections) == "one"
    sections.close()  # the process of the next section is already waiting for its turn
    assert records.read(file)["sections"].keys() == {"one"}
    assert not [process for process in Path("/proc").glob("[0-9]*") if is_ours(process, tmp_path)]


def is_ours(process: Path, folder: Path) -> bool:
    try:
        return str(folder) in (process / "cmdline").read_text()
    except OSError:
        return False
