"""The bad-input campaign: hostile clients, by rule from the proto and the limits; then damaged inputs, at random.

    python -m tests.bad_input --count 20000 --seed 1            # as `make fuzz` does
    python -m tests.bad_input --only upload                     # one kind of hostile clients; --list has their names
    python -m tests.bad_input --only 'upload: 100 that pause'   # one of them, for example one that failed
    python -m tests.bad_input out/bad_input/003-picture.input   # repeats an input that failed

The exit code is 1 if anything failed. Inputs that failed are in out/bad_input; when the defect is fixed, move them to
tests/bad_input/corpus. Hostile clients need no corpus, because they are always the same.
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
from tests.bad_input.playing import describe, name_of, play_cases, print_cases, select


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="inputs to send instead of the campaign's")
    parser.add_argument(
        "--count", type=int, default=20_000, help="number of damaged inputs, sent after the corpus and the bombs"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the damage and of --per-kind")
    parser.add_argument("--only", metavar="PATTERN", help="play these hostile clients alone; send no inputs")
    parser.add_argument("--per-kind", type=int, metavar="N", help="play N hostile clients of each kind instead of all")
    parser.add_argument("--list", action="store_true", help="print the names of the hostile clients and exit")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # also ends the server, as Ctrl-C does
    console, start = Console(), time.monotonic()
    cases = [] if arguments.files else select(arguments.only or "*", arguments.per_kind, arguments.seed)
    if arguments.list:
        console.print("\n".join(map(name_of, cases)), markup=False, highlight=False, soft_wrap=True)
        return
    failures = []
    if cases:
        played = asyncio.run(play_cases(cases, show_progress=console.is_terminal))
        print_cases(played, time.monotonic() - start, console)
        failures += describe(played)
    if not arguments.only:
        failures += _send_inputs(arguments, console)
    for failure in failures[:50]:
        console.print(f"failed: {failure}", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise SystemExit(f"{len(failures)} failures")


def _send_inputs(arguments: argparse.Namespace, console: Console) -> list[str]:
    """Sends the files, or the corpus, the bombs and random inputs. Returns the failures."""
    files, start = arguments.files or None, time.monotonic()
    count = 0 if files else arguments.count
    findings = asyncio.run(
        run_campaign(count, arguments.seed, files, bombs=not files, show_progress=console.is_terminal)
    )
    print_summary(findings, time.monotonic() - start, console)
    return save_failures(findings, Path("out/bad_input"))


if __name__ == "__main__":
    main()
