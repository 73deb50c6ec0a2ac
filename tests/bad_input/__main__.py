"""The bad-input campaign.

    python -m tests.bad_input --count 20000 --seed 1            # as `make fuzz` does
    python -m tests.bad_input out/bad_input/003-picture.input   # repeats an input that failed

The exit code is 1 if an input failed. Such inputs are in out/bad_input; when the defect is fixed, move them to
tests/bad_input/corpus.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.bad_input.campaign import print_summary, run_campaign, save_failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="inputs to send instead of the campaign's")
    parser.add_argument(
        "--count", type=int, default=20_000, help="number of damaged inputs, sent after the corpus and the bombs"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the damage")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # also ends the server, as Ctrl-C does
    console, start = Console(), time.monotonic()
    files = arguments.files or None
    count = 0 if files else arguments.count
    findings = asyncio.run(
        run_campaign(count, arguments.seed, files, bombs=not files, show_progress=console.is_terminal)
    )
    print_summary(findings, time.monotonic() - start, console)
    failures = save_failures(findings, Path("out/bad_input"))
    for failure in failures[:50]:
        console.print(f"failed: {failure}", markup=False)
    if failures:
        raise SystemExit(f"{len(failures)} failures")


if __name__ == "__main__":
    main()
