"""The bad-input campaign by hand.

    python -m tests.bad_input --count 20000 --seed 1      # make fuzz
    python -m tests.bad_input out/bad_input/003-picture.input   # one that failed, again

Ends with 1 if anything failed; what did lies in out/bad_input then, and belongs into tests/bad_input/corpus once mended.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.bad_input.campaign import campaign, keep, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="inputs to send instead of the campaign's")
    parser.add_argument("--count", type=int, default=20_000, help="damaged inputs, behind the corpus and the bombs")
    parser.add_argument("--seed", type=int, default=1, help="of the damage")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # as Ctrl-C does, with its server
    console, began = Console(), time.monotonic()
    files = arguments.files or None
    count = 0 if files else arguments.count
    work = campaign(count, arguments.seed, files, bombs=not files, loud=console.is_terminal)
    findings = asyncio.run(work)
    show(findings, began, console)
    failures = keep(findings, Path("out/bad_input"))
    for failure in failures[:50]:
        console.print(f"failed: {failure}", markup=False)
    if failures:
        raise SystemExit(f"{len(failures)} failures")


if __name__ == "__main__":
    main()
