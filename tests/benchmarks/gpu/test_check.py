"""The GPU check as a dry run on the CPU: all sections of the three calls, their files, and their merge."""

from __future__ import annotations

import json
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.gpu import correctness, records
from benchmarks.gpu.check import CALLS, SECTIONS
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.output import Output
from benchmarks.gpu.section import Section
from tests.gpu import small_shapes
from tests.support import emulated
from tests.support.processes import ROOT, Process

RESULTS = ROOT / "benchmarks"


def kept() -> dict[Path, bytes]:
    """What only the results of a GPU may change."""
    files = [RESULTS / "RESULTS.md", *(RESULTS / "results").glob("*")]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder and the output by call, of all three calls at the same time."""
    out, before = tmp_path_factory.mktemp("out"), kept()

    def call(name: str) -> str:
        words = ("-m", "tests.support.gpu_check", "--call", name, "--device", "cpu", "--out", out)
        with Process(*words, cwd=ROOT) as process:
            assert process.code(within_s=240) == 0, process.output
        return process.output

    with ThreadPoolExecutor(3) as pool:
        outputs = dict(zip(CALLS, pool.map(call, CALLS), strict=True))
    yield out, outputs
    assert kept() == before


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_all_its_sections(name: str, dry_run: tuple[Path, dict[str, str]]) -> None:
    out, outputs = dry_run
    results = json.loads((out / f"{name}.json").read_text())
    assert not records.absent(results, list(CALLS[name]))
    assert {row["section"] for row in results["rows"]} >= CALLS[name].keys() - {"here", "sanitizer"}
    assert results["machine"]["torch"]
    assert "**A dry run" in (out / f"{name}.md").read_text()
    with tarfile.open(out / f"{name}-logs.tar.gz") as logs:
        assert "iteration.log" in logs.getnames() or name != "a"
    printed = outputs[name].splitlines()
    assert all(any(line.startswith(f"== {section}: ") for line in printed) for section in CALLS[name])
    assert printed[-1].startswith("goals: ")
    assert len("\n".join(printed[-40:])) < 12_000


@pytest.mark.timeout(300)
def test_the_three_calls_become_one_result(dry_run: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    out, _ = dry_run
    with Process("-m", "benchmarks.gpu.check", "--merge", out, "--out", tmp_path, cwd=ROOT) as process:
        assert process.code() == 0, process.output
    merged = json.loads((tmp_path / "dry-run.json").read_text())
    assert merged["sections"].keys() == SECTIONS.keys()
    assert "goals: " in process.output.splitlines()[-1]
    assert "not measured: memory" in process.output  # a CPU has no allocator whose peak could be compared
    assert process.output.count("not measured: ") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_call_that_is_cut_off_leaves_results_and_no_process(tmp_path: Path, how: signal.Signals, code: int) -> None:
    words = ("-m", "benchmarks.gpu.check", "--only", "ceilings,iteration", "--device", "cpu", "--out", tmp_path)
    with Process(*words, cwd=ROOT) as process:
        process.line("== iteration")
        process.signal(how)
        assert process.code() == code, process.output
    results = records.read(tmp_path / "only.jsonl")
    assert records.absent(results, ["here", "ceilings", "iteration"]) == ["iteration"]
    kept = json.loads((tmp_path / "only.json").read_text())
    assert [row for row in kept["rows"] if row["section"] == "ceilings"]
    assert (tmp_path / "only-logs.tar.gz").exists()
    until = time.monotonic() + 20
    while left := processes_with(str(tmp_path)):  # they would use the GPU during the next call
        assert time.monotonic() < until, left
        time.sleep(0.1)


def processes_with(argument: str) -> list[str]:
    """The numbers of the processes whose command line has this text."""
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if argument in text_of(path)]


def text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended meanwhile
        return ""


@pytest.mark.timeout(60)
def test_a_file_of_tests_that_hangs_reports_those_before(tmp_path: Path) -> None:
    file = tmp_path / "test_three.py"
    hanging = "import time\n\ndef test_good():\n    pass\n\ndef test_bad():\n    assert 0\n\n"
    file.write_text(f"{hanging}def test_hanging():\n    time.sleep(100)\n")
    out, now = tmp_path / "a.jsonl", time.monotonic()
    section = Section("tests", "cpu", Clock(now, 20), now + 12, [], out, tmp_path)
    correctness.run_tests(section, [file])
    found = records.read(out)
    (row,), (failed,) = found["rows"], found["failed"]
    assert (row["passed"], row["skipped"], row["failed"]) == (1, 0, 2)
    assert "test_bad (see test_three.log)" in failed["why"] and "exceeded its time in" in failed["why"]
    assert "::test_hanging" in failed["why"]


def test_files_are_complete_at_every_moment(tmp_path: Path) -> None:
    output = Output(tmp_path, "a", tmp_path, ["style"])
    output.keep()
    stop, problems = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads((tmp_path / "a.json").read_text())
                tarfile.open(tmp_path / "a-logs.tar.gz").close()
            except Exception as error:  # noqa: BLE001
                problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(50):
            records.write(output.records, "row", "tests", {"name": "x" * 1000, "turn": turn})
            assert len(output.keep()["rows"]) == turn + 1
    finally:
        stop.set()
        reader.join()
    assert not problems
    # A row that the report does not understand costs only the report.
    assert "The report failed" in (tmp_path / "a.md").read_text()


def test_another_run_keeps_the_files_of_the_first(tmp_path: Path) -> None:
    names = [Output(tmp_path, "a", tmp_path, []).name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


def test_the_files_that_the_check_names_exist() -> None:
    assert set(correctness.FAMILIES) == small_shapes.FAMILIES.keys()
    assert correctness.EMULATOR.parent == emulated.BUILD
    for name in (*correctness.EMULATED_ONLY, correctness.QUICK):
        assert (ROOT / "tests" / "cuda" / f"{name}.py").exists()


def test_every_section_belongs_to_one_call() -> None:
    names = [name for call in CALLS.values() for name in call if name != records.MACHINE]
    assert len(names) == len(set(names))
    assert all(next(iter(call)) == records.MACHINE for call in CALLS.values())
