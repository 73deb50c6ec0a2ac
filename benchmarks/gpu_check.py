"""The GPU check: the machine, the correctness of the kernels, and their speed.

    make gpu-check
    python -m benchmarks.gpu_check --only ceilings,iteration
    python -m benchmarks.gpu_check --device cpu --minutes 3    # a dry run of all of it on small pictures

Sections run one after another, each in a process of its own and with a share of the time; time that one leaves goes to
the next. Writes benchmarks/results/GPU.json, the generated part of benchmarks/RESULTS.md and the logs in
build/gpu-check. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_correctness, gpu_engine, gpu_kernels, gpu_report
from benchmarks.measure import Row
from benchmarks.section import Section

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
LOGS = HERE.parent / "build" / "gpu-check"


class Step(NamedTuple):
    """A section of the check."""

    run: Callable[[Section], None]
    share: float  # of the time, in seconds out of eight minutes


STEPS: Mapping[str, Step] = {
    "here": Step(gpu_correctness.machine, 12),
    "tests": Step(gpu_correctness.tests, 90),
    "sanitizer": Step(gpu_correctness.sanitizer, 48),
    "ceilings": Step(gpu_kernels.ceilings, 20),
    "convolutions": Step(gpu_kernels.convolutions, 45),
    "style": Step(gpu_kernels.style_op, 35),
    "iteration": Step(gpu_engine.iteration, 110),
    "job": Step(gpu_engine.job, 40),
    "memory": Step(gpu_engine.memory, 25),
    "profile": Step(gpu_engine.profile, 20),
    "compile": Step(gpu_engine.compiled, 35),
}
GRACE = 8.0  # seconds after its time until a section is killed


def main() -> int:
    """Runs the sections and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="time limit of all sections together")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument("--only", default="", help=f"sections to run, with commas: {', '.join(STEPS)}")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run that keeps no results"
    )
    parser.add_argument("--out", type=Path, help="folder for copies of the results and for the logs")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # in the process of a section
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        so_far = read(arguments.found)["rows"]
        seconds = arguments.minutes * 60
        folder = arguments.found.parent
        section = Section(arguments.section, arguments.device, seconds, so_far, arguments.found, folder)
        section.attempt("the section", lambda: STEPS[arguments.section].run(section))
        return 0

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU with a working driver is visible; --device cpu is a dry run without one")
    names = [name for name in STEPS if not arguments.only or name in arguments.only.split(",")]
    unknown = set(filter(None, arguments.only.split(","))) - STEPS.keys()
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    if arguments.skip_tests:
        names = [name for name in names if name not in ("tests", "sanitizer")]
    LOGS.mkdir(parents=True, exist_ok=True)
    for old in LOGS.iterdir():
        old.unlink()
    found = LOGS / "found.jsonl"
    found.touch()
    results = read(found)
    for _ in run_all(names, arguments.device, arguments.minutes * 60, found):
        results = read(found)
        # After each section, as the check may be killed in the next one.
        keep(results, arguments.out, not arguments.only)
    print(gpu_report.section(results))
    for one in results["failed"]:
        print(f"FAILED {one['section']}, {one['what']}: {one['why']}")
    for goal in gpu_report.goals(results["rows"]):
        verdict = "met" if goal.met else f"MISSED by {goal.missed_by:.2f} times"
        print(f"{verdict}: {goal.what} is {goal.measured:.3g}, {goal.bound} {goal.wanted:.3g}")
    print(f"{len(results['rows'])} rows, {len(results['failed'])} failed, {len(results['left_out'])} left out")
    return 1 if results["failed"] else 0


def run_all(names: list[str], device: str, seconds: float, found: Path) -> Iterator[str]:
    """Runs every section in a process, until the shares up to and including its own are used up, and yields its name
    after its end."""
    whole, start, due = sum(STEPS[name].share for name in names), time.monotonic(), 0.0
    for name in names:
        due += STEPS[name].share / whole * seconds
        left = due - (time.monotonic() - start)
        print(f"== {name}: at {time.monotonic() - start:.0f} s, until {due:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--section", name, "--device", device]
        command += ["--minutes", str(max(left, 1.0) / 60), "--found", str(found)]
        try:
            code = subprocess.run(command, check=False, timeout=max(left, 1.0) + GRACE).returncode
            why = f"its process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = "it exceeded its time and was killed"
        if why:
            print(f"  FAILED, {why}", flush=True)
            with found.open("a") as file:
                file.write(json.dumps({"failed": {"section": name, "what": "the section", "why": why}}) + "\n")
        yield name


def read(found: Path) -> dict[str, Any]:
    """The results that the sections have written so far."""
    machine: Row = {}
    rows: list[Row] = []
    failed: list[Row] = []
    left_out: list[Row] = []
    for line in found.read_text().splitlines():
        try:
            ((kind, value),) = json.loads(line).items()
        except ValueError:  # a section was killed within a line
            continue
        if kind == "fact":
            machine |= value
        else:
            {"row": rows, "failed": failed, "left_out": left_out}[kind].append(value)
    profile = {key: machine.pop(key) for key in [*machine] if key.startswith("profile ")}
    forms = {key: machine.pop(key) for key in [*machine] if key.startswith("forms")}
    return {
        "machine": machine,
        "rows": rows,
        "profile": profile,
        "forms": forms,
        "failed": failed,
        "left_out": left_out,
    }


def keep(results: Mapping[str, Any], out: Path | None, whole: bool) -> None:
    """Writes the results to ``out`` and, if they were measured on a GPU and are ``whole``, to the results folder and to
    RESULTS.md."""
    name = str(results["machine"].get("gpu", "no-gpu")).replace(" ", "-")
    text = json.dumps(results, indent=1) + "\n"
    section = gpu_report.section(results)
    folders = [out] if out else []
    if "gpu" in results["machine"] and whole:
        folders.append(HERE / "results")
        RESULTS.write_text(gpu_report.placed(RESULTS.read_text(), name, section))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text)
    if out:
        (out / f"{name}.md").write_text(section)
        for log in LOGS.glob("*.log"):
            shutil.copy(log, out)


if __name__ == "__main__":
    sys.exit(main())
