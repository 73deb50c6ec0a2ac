"""`python -m tests.bad_input`: see the package."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests import bad_input
from tests.bad_input.campaign import Campaign, corpus, kept
from tests.bad_input.messages import Input


def main() -> int:
    """Runs the campaign; 1 if a rule was broken."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bad_input",
        description=bad_input.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=20_000, help="inputs (default 20000)")
    parser.add_argument("--seed", type=int, default=1, help="of the nonsense (default 1)")
    parser.add_argument("--only", type=Path, metavar="FILE", help="send this one alone")
    arguments = parser.parse_args()
    if arguments.only:
        campaign, inputs = Campaign(arguments.seed), [Input.from_bytes(arguments.only.read_bytes())]
        asyncio.run(_shown(campaign, 1, inputs, bombs=False))
    else:
        campaign = Campaign(arguments.seed, keep=kept)
        asyncio.run(_shown(campaign, arguments.count, corpus(), bombs=True))
    _report(campaign)
    return 1 if campaign.failures else 0


async def _shown(campaign: Campaign, count: int, inputs: list[Input], *, bombs: bool) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("bad inputs", total=count)
        running = asyncio.create_task(campaign.run(count, inputs, bombs))
        while not (await asyncio.wait({running}, timeout=0.2))[0]:
            failed = f", {len(campaign.failures)} failed" if campaign.failures else ""
            progress.update(bar, completed=campaign.sent, description=f"bad inputs{failed}")
        await running


def _report(campaign: Campaign) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    codes = sorted({code for _, code in campaign.outcomes})
    table = Table("method", *codes, "slowest")
    for method, slowest_s in sorted(campaign.slowest.items()):
        table.add_row(method, *(str(campaign.outcomes[method, code] or "") for code in codes), f"{slowest_s:.2f} s")
    console.print(table)
    checks = sorted(campaign.checks) or [0.0]
    console.print(
        f"{campaign.sent} inputs, seed {campaign.seed}; at most {campaign.peak_bytes >> 20} MiB for one of the "
        f"{campaign.allowed_bytes >> 20} that are allowed; {len(checks)} health checks, the slowest in {checks[-1]:.2f} s"
    )
    for failure in campaign.failures[:20]:
        console.print(failure, style="red", markup=False)
    failed = len(campaign.failures)
    console.print(f"{failed} broke a rule" if failed else "every rule was kept", style="red" if failed else "green")


if __name__ == "__main__":
    sys.exit(main())
