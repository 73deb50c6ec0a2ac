"""Correctness in the GPU check: the tests of the kernels and of the engine, and compute-sanitizer."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.gpu.runner import environment, last_line
from benchmarks.gpu.section import Section

__all__ = ["EMULATOR", "engine_tests", "run_tests", "sanitizer", "self_test", "tests"]

ROOT = Path(__file__).parent.parent.parent
SMALL_SHAPES = ROOT / "tests" / "gpu" / "small_shapes.py"
# As in tests/support/emulated.py.
EMULATED = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}-torch-{torch.__version__}"
EMULATOR = EMULATED / "gramophone_emulated.so"
EMULATED_ONLY = ("test_features", "test_self_test")  # in tests/cuda
QUICK = "test_terms"  # in tests/cuda, for a dry run
PROCESSES = 12  # at the same time; the GPU machine has 16 cores
TOOLS = ("memcheck", "racecheck", "synccheck")
REPORT_S = 8.0  # that a tool may take for its report after the last shape
FAMILIES = ("style", "layers", "optimisers")  # of the ops in small_shapes.py
# compute-sanitizer is a part of the toolkit, but not always on the PATH.
TOOL_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/usr/local/cuda/extras/compute-sanitizer")


def self_test(section: Section) -> None:
    """The self-test that an engine makes when it is loaded, in every mode that uses the kernels."""
    from gramophone_server.network.precision import MODES
    from gramophone_server.ops.self_test import choose_kernels

    def test(name: str) -> None:
        mode = MODES[name]
        report = choose_kernels(torch.device(section.device), mode.forward, mode.backward)
        section.row(name=name, ms=report.seconds * 1e3, by_library=dict(report.by_library))
        if report.by_library:
            raise RuntimeError("; ".join(f"{op}: {why}" for op, why in report.by_library.items()))

    for name in section.few(("fp16", "bf16", "fp32")):
        section.attempt(f"self-test in {name}", functools.partial(test, name), 1)


def tests(section: Section) -> None:
    """Runs the tests of every kernel against float64, and those that compare graph replays with launches."""
    graphs = ROOT / "tests" / "gpu" / "test_graphs.py"
    kernels = [file for file in (ROOT / "tests" / "cuda").glob("test_*.py") if file.stem not in EMULATED_ONLY]
    if section.dry:  # the slower files would take minutes on the emulator
        kernels = [file for file in kernels if file.stem == QUICK and _has_emulator()]
    run_tests(section, [graphs, *kernels])


def _has_emulator() -> bool:
    """Whether the emulator is compiled from the current sources; to compile it takes half a minute or more."""
    sources = [path for folder in ("csrc", "tests/emulator") for path in (ROOT / folder).rglob("*.*")]
    return EMULATOR.exists() and EMULATOR.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def engine_tests(section: Section) -> None:
    """Runs the other tests of tests/gpu: the engine against the CPU, memory, and repeatability of the kernels."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    run_tests(section, section.few([file for file in reversed(files) if file.stem != "test_graphs"]))


def run_tests(section: Section, files: Sequence[Path]) -> None:
    """Runs each file in a process of its own, all at the same time."""
    if importlib.util.find_spec("pytest") is None:
        section.left_out("tests", "the package pytest is not installed")
        return
    # Not the project's configuration, which needs plugins and turns warnings into errors.
    settings = section.folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    # The references in float64 use all cores; processes that all do so would wait for each other.
    threads = 1 if section.dry else max(1, (os.cpu_count() or 1) // len(files))
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda file: section.attempt(file.name, lambda: _test(section, settings, file, threads)), files))


def _test(section: Section, settings: Path, file: Path, threads: int) -> None:
    start = time.monotonic()
    passed, skipped, bad = _pytest(section, settings, file, threads)
    seconds = round(time.monotonic() - start, 1)
    section.row(name=file.name, passed=passed, skipped=skipped, failed=len(bad), seconds=seconds)
    section.say(f"{file.name}: {passed} passed, {skipped} skipped, {len(bad)} failed")
    if bad:
        raise RuntimeError(f"{len(bad)} failed: {'; '.join(bad[:8])}")


def _pytest(section: Section, settings: Path, file: Path, threads: int) -> tuple[int, int, list[str]]:
    """Runs a file of tests. Returns how many passed and were skipped, and for each that failed its name and the first
    line of the reason. The log is kept in the section's folder."""
    report = section.folder / f"{file.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rs", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", "-c", str(settings), f"--rootdir={ROOT}", f"--junitxml={report}", str(file)]
    ours = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}  # so that the log names a test that hangs
    ours["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the machine may have any, some of which import other frameworks
    ours |= {} if section.dry else {"GRAMOPHONE_TEST_ON": "cuda"}
    log = section.folder / f"{file.stem}.log"
    code = _run(command, environment() | ours, log, section)
    if code is None:
        return _until_the_kill(log)
    if not report.exists():
        return 0, 0, [f"pytest ended with {code} and no report, see {log.name}: {last_line(log)}"]
    passed, skipped, bad = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if failure is not None:
            why = (failure.get("message") or "").strip().splitlines() or [""]
            bad.append(f"{case.get('name')} ({why[0][:160]})")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, bad


def _until_the_kill(log: Path) -> tuple[int, int, list[str]]:
    """As `_pytest`, of a file that exceeded its time: the tests before, from the log, and the one that was running."""
    text = log.read_text(errors="replace")
    verdicts = re.findall(r"^\S*::(\S.*?) (PASSED|SKIPPED|FAILED|ERROR)\b", text, re.MULTILINE)
    names = {verdict: [name for name, was in verdicts if was == verdict] for verdict in ("PASSED", "SKIPPED")}
    bad = [f"{name} (see {log.name})" for name, was in verdicts if was in ("FAILED", "ERROR")]
    return len(names["PASSED"]), len(names["SKIPPED"]), [*bad, f"it exceeded its time in {last_line(log)}"]


def sanitizer(section: Section) -> None:
    """Runs compute-sanitizer over all our kernels on small shapes: it finds accesses out of bounds, races, and barriers
    that not all threads reach."""
    places = [os.environ.get("PATH", os.defpath), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    tool = None if section.dry else shutil.which("compute-sanitizer", path=os.pathsep.join([*places, *TOOL_FOLDERS]))
    if tool is None:
        section.left_out("compute-sanitizer", "it needs a GPU" if section.dry else "it is not installed")
        section.attempt("small shapes without it", lambda: _small_shapes(section))
        return
    # Every family of ops in a process of its own, because a tool makes a kernel 10 to 50 times as slow.
    runs = [(check, family) for check in TOOLS for family in FAMILIES]
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(lambda run: section.attempt(" ".join(run), lambda: _sanitize(section, tool, *run)), runs))


def _small_shapes(section: Section) -> None:
    log = section.folder / "small_shapes.log"
    families = FAMILIES[1:2] if section.dry else FAMILIES
    code = _run([sys.executable, str(SMALL_SHAPES), section.device, *families], environment(), log, section)
    if code != 0:
        raise RuntimeError("it exceeded its time" if code is None else last_line(log))


def _sanitize(section: Section, tool: str, check: str, family: str) -> None:
    name = f"{check} {family}"
    log = section.folder / f"{check}_{family}.log"
    # torch and the driver's libraries make calls that may fail, which are no defects of ours.
    api = ["--report-api-errors", "no"] if check == "memcheck" else []
    command = [tool, "--tool", check, "--target-processes", "all", "--print-limit", "20", *api]
    until = time.monotonic() + max(0.0, section.seconds_left - REPORT_S)
    command += [sys.executable, str(SMALL_SHAPES), "cuda", family, "--until", str(until)]
    # Each tensor gets memory of its own, so that an access beyond its end is not within its neighbour.
    settings = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if _run(command, settings, log, section) is None:
        section.left_out(name, f"it exceeded its time: {last_line(log)}")
        return
    text = log.read_text(errors="replace")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    ran = re.search(r"all small shapes ran|the time was up after \d+ small shapes", text)
    if summary is None or ran is None:
        section.left_out(name, f"the script did not finish: {last_line(log)}")
        return
    if not ran[0].startswith("all"):
        section.left_out(f"{name}, the rest", ran[0])
    found = int((re.search(r"\d+", summary[1]) or ["0"])[0])
    section.row(name=name, found=found)
    if found:
        first = re.search(r"========= (.*(?:Invalid|hazard|Error|error|Barrier).*)", text)
        raise RuntimeError(f"{summary[1]}; first: {first[1] if first else 'see the log'}")


def _run(command: list[str], environment: Mapping[str, str], log: Path, section: Section) -> int | None:
    """Runs a command and returns its exit code, or None if the section's time is up: then its process group is killed.
    Its processes stay in the section's session, so that they end with the section if that is killed."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            process_group=0,
        )  # fmt: skip
        try:
            return process.wait(max(section.seconds_left, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
