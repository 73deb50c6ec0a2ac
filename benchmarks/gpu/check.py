"""The GPU check in three calls of four minutes: correctness, speed, and what explains them.

    python -m benchmarks.gpu.check --call a --out FOLDER
    python -m benchmarks.gpu.check --only ceilings,iteration
    python -m benchmarks.gpu.check --call a --device cpu    # a dry run on tiny pictures, whose figures mean nothing
    python -m benchmarks.gpu.check --merge FOLDER FOLDER    # writes benchmarks/results and benchmarks/RESULTS.md

a: it loads, every kernel against float64, graph replay equals launches, ceilings, an iteration at 512 and 1024 px.
b: an iteration at 256 and 2048 px and in batches, jobs through the server, the style op, memory, jobs in process.
c: a profile, switches, compute-sanitizer, cuDNN's search, torch.compile, each convolution, the engine's other tests.
Without --call and --only: all of them.

Sections run one after another, each in a process of its own and with a share of the time, which counts from the start
of this program; time that one leaves goes to the next. The records in --out have everything that was found at any
moment; JSON, Markdown and the archive of the logs follow after each section and every ten seconds. The exit code is 1
if anything failed or was cut off. Missed goals are no failure.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import argparse
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu import records, runner
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.merge import merge
from benchmarks.gpu.output import Output, print_end
from benchmarks.gpu.runner import Step

__all__ = ["CALLS", "SECTIONS", "main"]

HERE = Path(__file__).parent.parent
OUT = HERE.parent / "build" / "gpu-check"
MINUTES = 4.0  # of a call

# Every section belongs to one call, except the first, which all need: it says which machine it is. Shares are seconds
# of the 237 that a call has for its sections. What matters most comes first, and a new section at the end.
MACHINE = "benchmarks.gpu.machine:machine"
CALLS: Mapping[str, Mapping[str, Step]] = {
    "a": {
        "here": Step(MACHINE, 14),
        "self_test": Step("benchmarks.gpu.correctness:self_test", 15),
        "tests": Step("benchmarks.gpu.correctness:tests", 80),
        "ceilings": Step("benchmarks.gpu.kernels:ceilings", 18),
        "iteration": Step("benchmarks.gpu.iteration:iteration", 110),
    },
    "b": {
        "here": Step(MACHINE, 12),
        "ceilings_b": Step("benchmarks.gpu.kernels:brief_ceilings", 8),
        "sizes": Step("benchmarks.gpu.iteration:sizes", 75),
        "service": Step("benchmarks.gpu.service:service", 60),
        "style": Step("benchmarks.gpu.kernels:style_op", 35),
        "memory": Step("benchmarks.gpu.engine:memory", 28),
        "job": Step("benchmarks.gpu.engine:job", 19),
    },
    "c": {
        "here": Step(MACHINE, 12),
        "ceilings_c": Step("benchmarks.gpu.kernels:brief_ceilings", 8),
        "profile": Step("benchmarks.gpu.engine:profile", 20),
        "switches": Step("benchmarks.gpu.switches:switches", 62),
        "sanitizer": Step("benchmarks.gpu.correctness:sanitizer", 40),
        "searching": Step("benchmarks.gpu.iteration:searching", 20),
        "compile": Step("benchmarks.gpu.iteration:compiled", 28),
        "convolutions": Step("benchmarks.gpu.kernels:convolutions", 22),
        "engine_tests": Step("benchmarks.gpu.correctness:engine_tests", 25),
    },
}
SECTIONS: Mapping[str, Step] = {name: step for call in CALLS.values() for name, step in call.items()}


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", choices=CALLS, help="a, b or c; without it and --only, all of them")
    parser.add_argument("--only", default="", help=f"sections to run, with commas: {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, help=f"time limit, {MINUTES:g} for each call by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--out", type=Path, help=f"folder for the results, {OUT.relative_to(HERE.parent)} by default")
    parser.add_argument(
        "--began", type=float, default=BEGAN, help="when the time began, by Python's monotonic clock; by default now"
    )
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="PART", help="files of records, or folders with them, to put together"
    )
    arguments = parser.parse_args()
    if arguments.merge:
        if missing := [str(path) for path in arguments.merge if not path.exists()]:
            parser.error(f"--merge: there is no {', '.join(missing)}")
        return merge(arguments.merge, list(SECTIONS), HERE / "results", HERE / "RESULTS.md", arguments.out)

    calls = [arguments.call] if arguments.call else list(CALLS)
    wanted = set(filter(None, arguments.only.split(",")))
    steps = {name: step for call in calls for name, step in CALLS[call].items()}
    if unknown := wanted - steps.keys():
        parser.error(f"--only: there is no {', '.join(sorted(unknown))} in {' or '.join(calls)}")
    if wanted:
        steps = {name: step for name, step in steps.items() if name in wanted | {records.MACHINE}}
    minutes = arguments.minutes or MINUTES * (1 if wanted else len(calls))
    name = "only" if wanted else arguments.call or "all"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are ended and results written
    return run(steps, arguments.device, Clock(arguments.began, minutes * 60), arguments.out or OUT, name)


def run(steps: Mapping[str, Step], device: str, clock: Clock, out: Path, name: str) -> int:
    """Runs the sections and prints what they found. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="gramophone-", ignore_cleanup_errors=True) as folder:
        output = Output(out, name, Path(folder), list(steps))
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        about = {"device": device, "sections": list(steps), "seconds": clock.seconds, "started": started}
        records.write(output.records, "run", name, about)
        sections = runner.run(steps, device, clock, output.records, Path(folder), output.keep)
        try:
            with closing(sections):
                for _ in sections:
                    results = output.keep()
                    # Not if it was killed: a machine that starts slowly has a GPU all the same.
                    if any(one["what"] == records.GPU for one in results["failed"]):
                        print("no GPU with a working driver is visible; --device cpu is a dry run without one")
                        break
        finally:
            results = output.keep()
    print(f"results in {out}: {output.name}.jsonl, .json, .md, {output.name}-logs.tar.gz; {clock}")
    return print_end(results, list(steps))


if __name__ == "__main__":
    sys.exit(main())
