"""`gramophone bench`: its flags, and the way from them to a report."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from gramophone.recipe import PRESETS
from gramophone_client.bench.arrivals import ClosedLoop, Load, OpenLoop
from gramophone_client.bench.display import shown
from gramophone_client.bench.files import check_files, write_files
from gramophone_client.bench.html.page import comparison_page, report_page
from gramophone_client.bench.pictures import synthetic
from gramophone_client.bench.report import BadReport, Report, read_report
from gramophone_client.bench.run import Bench, Pictures, Plan
from gramophone_client.bench.table import print_comparison, print_report
from gramophone_client.bench.workload import BadMix, Kind, read_mix
from gramophone_client.client import GramophoneClient
from gramophone_client.console.outputs import UsageError
from gramophone_client.console.recipe_flags import add_recipe_flags, recipe_overrides
from gramophone_client.types.picture import write_whole
from gramophone_client.types.server_info import ServerInfo

__all__ = ["add_bench"]

T = TypeVar("T")

DEFAULT_CONCURRENCY = (1, 2, 4)
MOST_CONCURRENCY, MOST_RATE = 1024, 1000.0
PIPED_COLUMNS = 200  # of a table that no terminal bounds
NOT_WHOLE = "not all files of the report are written; the table above has its figures"

EXAMPLES = """\
A closed loop keeps so many jobs at the server at a time; an open loop sends them at random moments whatever the server
does, and counts latency from those moments. A step ends when three windows in a row agree within 10 %, or its time is
up; Ctrl-C ends the bench, and what was measured is still told. Jobs are never retried: a refusal is counted.

examples:
  gramophone bench --concurrency 1,2,4,8 --size 256 --html report.html
  gramophone bench --rate 0.5,1,2 --mix mix.toml --json today.json
  gramophone bench --compare yesterday.json today.json --html changes.html

a mix file:
  [[job]]
  name = "thumbnail"
  weight = 3            # three of these for one of weight 1
  size = 128            # any field of a recipe, or preset
  cancel = 0.1          # one in ten is left before its end

  [[job]]
  preset = "quality"
  frames = false        # the unary call; frame_every and frame_size thin out frames
  deadline_s = 300
"""


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The command, still without the flags that say which server."""
    parser = commands.add_parser(
        "bench",
        help="measure how much a server carries",
        allow_abbrev=False,
        usage="gramophone bench [options] [CONTENT STYLE [STYLE ...]]",
        description="Send jobs at several loads and tell throughput, latency and failures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "pictures", metavar="CONTENT STYLE", type=Path, nargs="*", help="what to paint (default: made from --seed)"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=_listed(_concurrency),
        metavar="N,...",
        help=f"a step of a closed loop for each (default {','.join(map(str, DEFAULT_CONCURRENCY))}, without --rate)",
    )
    load.add_argument("--rate", type=_listed(_rate), metavar="X,...", help="a step of an open loop for each, in jobs/s")
    load.add_argument("--mix", type=Path, metavar="FILE", help="the kinds of jobs (default: one kind, by the flags)")
    load.add_argument("--preset", choices=list(PRESETS), help="a complete recipe (default fast, or the mix's)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of moments, mix and pictures (default 0)")
    time = parser.add_argument_group("time")
    time.add_argument("--warm-up", type=_seconds, default=5.0, metavar="SECONDS", help="not measured (default 5)")
    time.add_argument("--window", type=_above_0, default=5.0, metavar="SECONDS", help="at least (default 5)")
    time.add_argument("--duration", type=_above_0, default=60.0, metavar="SECONDS", help="most of a step (default 60)")
    time.add_argument("--deadline", type=_above_0, default=120.0, metavar="SECONDS", help="of a job (default 120)")
    out = parser.add_argument_group("report")
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures, for --compare")
    out.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts")
    out.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="show two reports of --json side by side")
    out.add_argument("--quiet", action="store_true", help="only the table, at the end")
    add_recipe_flags(parser)
    parser.set_defaults(run=bench)
    return parser


def bench(args: argparse.Namespace) -> None:
    """Runs the command. Raises `UsageError`, `InvalidRecipe`, `GramophoneError`, OSError and KeyboardInterrupt."""
    written = {flag: path for flag, path in (("--json", args.json), ("--html", args.html)) if path}
    check_files(written, [*args.pictures, *([args.mix] if args.mix else ()), *(args.compare or ())])
    try:
        if args.compare:
            _compare(args)
        else:
            _measure(args)
    except (BadMix, BadReport) as error:
        raise UsageError(str(error)) from None


def _compare(args: argparse.Namespace) -> None:
    if args.json:
        raise UsageError("--json: a comparison is told as text and with --html")
    before, after = (read_report(path) for path in args.compare)
    first, second = args.compare
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    is_whole = _tell(
        lambda console: print_comparison(console, before, after, names),
        {args.html: lambda path: _write_page(path, comparison_page(before, after, names))},
    )
    if not is_whole:
        raise UsageError(NOT_WHOLE)


def _measure(args: argparse.Namespace) -> None:
    running, began = Bench(_plan(args)), datetime.now(UTC)

    async def measure() -> None:
        async with GramophoneClient(args.server, timeout_s=args.deadline, retries=False) as client:
            if args.wait:
                await client.wait_until_ready(args.wait)
            async with shown(running, Console(stderr=True, quiet=args.quiet)):
                await running.run(client)

    is_whole = True
    try:
        asyncio.run(measure())
    finally:  # also of a bench that was interrupted, or whose server went away
        if running.server is not None and running.steps:
            report = _report(args, began, running, running.server)
            is_whole = _tell(
                lambda console: print_report(console, report),
                {args.json: report.save, args.html: lambda path: _write_page(path, report_page(report))},
            )
    if not is_whole:
        raise UsageError(NOT_WHOLE)
    if running.is_interrupted:
        raise KeyboardInterrupt


def _plan(args: argparse.Namespace) -> Plan:
    closed: Sequence[int] = args.concurrency or (() if args.rate else DEFAULT_CONCURRENCY)
    loads: list[Load] = [*map(ClosedLoop, closed), *map(OpenLoop, args.rate or ())]
    overrides = recipe_overrides(args)
    mix = read_mix(args.mix) if args.mix else [Kind(name=args.preset or "fast")]
    # The flags change every kind, so that a mix can be tried with small pictures.
    mix = [replace(k, preset=args.preset or k.preset, overrides=k.overrides | overrides) for k in mix]
    for kind in mix:
        kind.recipe()  # raises; the server would say the same, but later
    return Plan(
        loads=loads,
        mix=mix,
        pictures=_pictures(args.pictures, args.seed),
        seed=args.seed,
        warm_up_s=args.warm_up,
        window_s=args.window,
        duration_s=args.duration,
        deadline_s=args.deadline,
    )


def _pictures(paths: Sequence[Path], seed: int) -> Callable[[Kind], Pictures]:
    if paths:
        if len(paths) == 1:
            raise UsageError(f"{paths[0]}: a content needs a style after it; name both, or neither")
        content, *styles = (path.read_bytes() for path in paths)
        pictures = Pictures(content, tuple(styles))
        return lambda _: pictures

    @cache
    def made(size: int) -> Pictures:
        return Pictures(synthetic(seed, size), (synthetic(seed + 1, size, cells=24),))

    return lambda kind: made(kind.recipe().size)


def _report(args: argparse.Namespace, began: datetime, bench: Bench, server: ServerInfo) -> Report:
    plan, told = bench.plan, asdict(server)
    left_out = {"presets", "layers", "running_jobs", "queued_jobs"}
    settings: dict[str, Any] = {
        "mix": [asdict(kind) for kind in plan.mix],
        "pictures": [path.name for path in args.pictures],
        "seed": plan.seed,
        "warm_up_s": plan.warm_up_s,
        "window_s": plan.window_s,
        "duration_s": plan.duration_s,
        "deadline_s": plan.deadline_s,
    }
    try:
        version = importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    return Report(
        began=began.isoformat(timespec="seconds"),
        client=version,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        server={key: value for key, value in told.items() if key not in left_out},
        settings=settings,
        steps=tuple(bench.steps),
    )


def _tell(table: Callable[[Console], None], files: Mapping[Path | None, Callable[[Path], None]]) -> bool:
    """Prints, then writes the files that are asked for; False if not all of them could be."""
    try:
        _print(table)
    finally:  # a pipe may break, and the files are worth having
        is_whole = write_files({path: write for path, write in files.items() if path})
    return is_whole


def _write_page(path: Path, page: str) -> None:
    write_whole(path, page.encode(errors="replace"))  # names of files need not be text


def _print(write: Callable[[Console], None]) -> None:
    """On standard output, in the terminal's colours and width; a console of its own would end the process when a pipe
    breaks. What that cannot say, as a name in other letters or a file's that is no text, becomes question marks."""
    console = Console()
    console = console if console.is_terminal else Console(width=PIPED_COLUMNS)
    with console.capture() as text:
        write(console)
    encoding = sys.stdout.encoding
    print(text.get().encode(encoding, errors="replace").decode(encoding), end="", flush=True)


def _listed(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [one(word) for word in text.split(",")]


def _concurrency(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_CONCURRENCY:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 1 to {MOST_CONCURRENCY} like 1,2,4, got {text!r}"
        )
    return int(text)


def _rate(text: str) -> float:
    rate = _number(text)
    if not 0 < rate <= MOST_RATE:
        raise argparse.ArgumentTypeError(f"expected jobs/s above 0, at most {MOST_RATE:g}, like 0.5,1,2, got {text!r}")
    return rate


def _seconds(text: str) -> float:
    if not 0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return float(text)


def _above_0(text: str) -> float:
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return float(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
