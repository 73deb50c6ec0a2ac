"""The GPU check on a CPU as it will run on the GPU machine.

It runs from a copy of what travels, with the packages of that machine and of the bundle, and without a network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_bundle import making, use
from gpu_bundle.manifest import BUNDLE, ROOT, files_in, read, sources_digest

RESULTS = ROOT / "build" / "gpu-rehearsal"


def rehearse(calls: Sequence[str]) -> int:
    """Runs the calls of the check and puts their results together. Returns 0 if all of it ended with 0."""
    if read().get("sources") != sources_digest():
        making.make()
    making.require_size()
    python = making.environment()
    shutil.rmtree(RESULTS, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as folder:
        copy, home = Path(folder) / "checkout", Path(folder) / "home"
        home.mkdir()
        copy_what_travels(copy)
        # No compiler of CUDA: an attempt to compile the ops fails.
        environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(copy / "tools")}
        lines, codes = [], []
        for call in calls:
            start = time.monotonic()
            check = ["make", "gpu-check", f"CALL={call}", f"OUT={RESULTS / call}", "ARGS=--device cpu"]
            command = [str(python), "-m", "gpu_bundle.offline", *check]
            codes.append(subprocess.run(command, cwd=copy, env=environment, check=False).returncode)
            lines.append(f"call {call}: exit code {codes[-1]}, {time.monotonic() - start:.0f} s")
        environment["PYTHONPATH"] = os.pathsep.join(str(copy / name) for name in ("gpu-bundle/site", *use.PROJECT))
        merge = [str(python), "-m", "benchmarks.gpu.check", "--merge", str(RESULTS), "--out", str(RESULTS)]
        merged = subprocess.run(merge, cwd=copy, env=environment, check=False, capture_output=True, text=True)
        print(merged.stdout, merged.stderr, sep="")
        codes.append(merged.returncode)
        lines.append(f"the merge: exit code {codes[-1]}; 1 if a section is missing")
    for line in lines:
        print(line)
    print(f"results and logs: {RESULTS.relative_to(ROOT)}")
    return max(codes, default=0)


def copy_what_travels(to: Path) -> None:
    """Copies the files of the checkout that git does not ignore, and the bundle."""
    for path in [*making.checkout_files(), *files_in(BUNDLE)]:
        copy = to / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
