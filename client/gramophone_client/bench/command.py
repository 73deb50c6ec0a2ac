"""The command `gramophone bench`: its flags, the run, and the output of the report."""

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

import shtab
from rich.console import Console

from gramophone.recipe import PRESETS
from gramophone_client.async_client import AsyncGramophoneClient
from gramophone_client.bench.arrivals import ClosedLoop, LoadProfile, OpenLoop
from gramophone_client.bench.display import live_display
from gramophone_client.bench.files import check_files, write_files
from gramophone_client.bench.html.page import comparison_page, report_page
from gramophone_client.bench.pictures import synthetic
from gramophone_client.bench.report import InvalidReport, Report, read_report
from gramophone_client.bench.run import Bench, Pictures, Plan
from gramophone_client.bench.table import print_comparison, print_report
from gramophone_client.bench.workload import InvalidWorkload, JobKind, read_workload
from gramophone_client.console.arguments import CommandParser, complete, seconds, seconds_above_0, whole_number
from gramophone_client.console.outputs import UsageError
from gramophone_client.console.recipe_flags import add_recipe_flags, preset_argument, recipe_overrides
from gramophone_client.console.targets import chosen_target
from gramophone_client.types.picture import write_atomically
from gramophone_client.types.server_info import ServerInfo

__all__ = ["add_bench"]

T = TypeVar("T")

DEFAULT_CONCURRENCY = (1, 2, 4)
MAX_CONCURRENCY, MAX_RATE = 1024, 1000.0
PIPED_COLUMNS = 200  # width of a table that is not printed to a terminal
INCOMPLETE = "not all files of the report were written; the table above has the results"

EPILOG = """\
The bench runs one step for each value of --concurrency (closed loop) and --rate (open loop). A closed loop keeps that
many jobs at the server. An open loop sends jobs at random times at that rate, however slow the server is, and counts
latency from those times. Jobs are never retried: refusals count as failures.

A step starts with a warm-up and is then measured in windows of time. It ends when the last three windows agree within
10 % in latency and throughput, or when its --duration is over. Ctrl-C ends the bench and still prints the report.

The report has throughput in jobs/s and in megapixel-iterations/s (Mpx it/s: the pixels of every iteration, added up),
and latency to the first frame and to the result as p50/p95/p99/max in seconds.

examples:
  gramophone bench --concurrency 1,2,4,8 --size 256 --html report.html
  gramophone bench --rate 0.5,1,2 --mix mix.toml --json today.json
  gramophone bench --compare yesterday.json today.json --html changes.html

a mix file (recipe options on the command line override the fields of all jobs):
  [[job]]
  name = "thumbnail"
  weight = 3        # three of these jobs for each job of weight 1
  size = 128        # any field of a recipe, or preset
  cancel = 0.1      # one in ten is cancelled early and counts as LEFT

  [[job]]
  preset = "quality"
  frames = false    # the unary call; in a stream, frame_every and frame_size
  deadline_s = 300
"""


def add_bench(commands: argparse._SubParsersAction[CommandParser]) -> CommandParser:
    """Adds the command without its server flags, which the caller adds."""
    parser = commands.add_parser(
        "bench",
        help="measure the throughput and latency of a server",
        usage="gramophone bench [options] [CONTENT STYLE [STYLE ...]]",
        description="Send jobs to a server at several loads and report throughput, latency and failures.",
        epilog=EPILOG,
    )
    pictures = parser.add_argument(
        "pictures",
        metavar="CONTENT STYLE",
        type=Path,
        nargs="*",
        help="the images of every job (default: synthetic images, generated from --seed)",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=_comma_separated(_concurrency),
        metavar="N,...",
        help="closed loop: one step for each number of simultaneous jobs "
        f"(default {','.join(map(str, DEFAULT_CONCURRENCY))}, unless --rate is given)",
    )
    load.add_argument(
        "--rate", type=_comma_separated(_rate), metavar="X,...", help="open loop: one step for each rate, in jobs/s"
    )
    mix = load.add_argument(
        "--mix", type=Path, metavar="FILE", help="TOML file with the kinds of jobs (default: one kind, from the flags)"
    )
    load.add_argument(
        "--preset",
        type=preset_argument,
        choices=list(PRESETS),
        help="the recipe to start from (default fast, or that of the mix file)",
    )
    load.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        metavar="N",
        help="seed of the arrival times, the order of jobs, and the synthetic images (default 0)",
    )
    time = parser.add_argument_group("time")
    time.add_argument(
        "--warm-up",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="start of each step that is not measured (default 5)",
    )
    time.add_argument(
        "--window", type=seconds_above_0, default=5.0, metavar="SECONDS", help="minimum length of a window (default 5)"
    )
    time.add_argument(
        "--duration",
        type=seconds_above_0,
        default=60.0,
        metavar="SECONDS",
        help="maximum length of a step, including its warm-up (default 60)",
    )
    time.add_argument(
        "--deadline", type=seconds_above_0, default=120.0, metavar="SECONDS", help="deadline of each job (default 120)"
    )
    out = parser.add_argument_group("report")
    json = out.add_argument("--json", type=Path, metavar="FILE", help="write all results as JSON, for --compare")
    html = out.add_argument("--html", type=Path, metavar="FILE", help="write the report as an HTML page with charts")
    compared = out.add_argument(
        "--compare", type=Path, nargs=2, metavar="FILE", help="compare two reports written by --json; sends no jobs"
    )
    out.add_argument("--quiet", action="store_true", help="no live display, only the final table")
    add_recipe_flags(parser)
    for argument in (pictures, mix, json, html, compared):
        complete(argument, shtab.FILE)
    parser.set_defaults(run=bench)
    return parser


def bench(args: argparse.Namespace) -> None:
    """Runs the command. Raises `UsageError`, `InvalidRecipeError`, `GramophoneError`, OSError and KeyboardInterrupt."""
    outputs = {flag: path for flag, path in (("--json", args.json), ("--html", args.html)) if path}
    check_files(outputs, [*args.pictures, *([args.mix] if args.mix else ()), *(args.compare or ())])
    try:
        if args.compare:
            _compare(args)
        else:
            _measure(args)
    except (InvalidWorkload, InvalidReport) as error:
        raise UsageError(str(error)) from None


def _compare(args: argparse.Namespace) -> None:
    if args.json:
        raise UsageError("--json: a comparison can only be written with --html")
    before, after = (read_report(path) for path in args.compare)
    first, second = args.compare
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    is_complete = _output(
        lambda console: print_comparison(console, before, after, names),
        {args.html: lambda path: _write_page(path, comparison_page(before, after, names))},
    )
    if not is_complete:
        raise UsageError(INCOMPLETE)


def _measure(args: argparse.Namespace) -> None:
    running, start_time = Bench(_plan(args)), datetime.now(UTC)

    target = chosen_target(args)

    async def measure() -> None:
        async with AsyncGramophoneClient(
            target.address, timeout=args.deadline, max_retries=0, metadata=target.metadata
        ) as client:
            if args.wait:
                await client.wait_until_ready(args.wait)
            async with live_display(running, Console(stderr=True, quiet=args.quiet)):
                await running.run(client)

    is_complete = True
    try:
        asyncio.run(measure())
    finally:  # also if the bench was interrupted or the server became unreachable
        if running.server is not None and running.steps:
            report = _report(args, start_time, running, running.server)
            is_complete = _output(
                lambda console: print_report(console, report),
                {args.json: report.save, args.html: lambda path: _write_page(path, report_page(report))},
            )
    if not is_complete:
        raise UsageError(INCOMPLETE)
    if running.is_interrupted:
        raise KeyboardInterrupt


def _plan(args: argparse.Namespace) -> Plan:
    closed: Sequence[int] = args.concurrency or (() if args.rate else DEFAULT_CONCURRENCY)
    loads: list[LoadProfile] = [*map(ClosedLoop, closed), *map(OpenLoop, args.rate or ())]
    overrides = recipe_overrides(args)
    workload = read_workload(args.mix) if args.mix else [JobKind(name=args.preset or "fast")]
    # The flags override every kind of job, so that a mix file can be tried with small pictures.
    workload = [replace(k, preset=args.preset or k.preset, overrides=k.overrides | overrides) for k in workload]
    for kind in workload:
        kind.recipe()  # raises InvalidRecipeError now, instead of InvalidRequestError from the server later
    return Plan(
        loads=loads,
        workload=workload,
        pictures=_pictures(args.pictures, args.seed),
        seed=args.seed,
        warm_up_s=args.warm_up,
        window_s=args.window,
        duration_s=args.duration,
        deadline_s=args.deadline,
    )


def _pictures(paths: Sequence[Path], seed: int) -> Callable[[JobKind], Pictures]:
    if paths:
        if len(paths) == 1:
            raise UsageError(f"{paths[0]}: a content image needs at least one style image; give both or neither")
        content, *styles = (path.read_bytes() for path in paths)
        pictures = Pictures(content, tuple(styles))
        return lambda _: pictures

    @cache
    def of_size(size: int) -> Pictures:
        return Pictures(synthetic(seed, size), (synthetic(seed + 1, size, cells=24),))

    return lambda kind: of_size(kind.recipe().size)


def _report(args: argparse.Namespace, start_time: datetime, bench: Bench, server: ServerInfo) -> Report:
    plan = bench.plan
    omitted = {"presets", "layers", "running_jobs", "queued_jobs"}
    settings: dict[str, Any] = {
        "mix": [asdict(kind) for kind in plan.workload],
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
        began=start_time.isoformat(timespec="seconds"),
        client=version,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        server={key: value for key, value in asdict(server).items() if key not in omitted},
        settings=settings,
        steps=tuple(bench.steps),
    )


def _output(table: Callable[[Console], None], files: Mapping[Path | None, Callable[[Path], None]]) -> bool:
    """Prints the table, then writes the files whose path is not None. Returns False if a file cannot be written."""
    try:
        _print(table)
    finally:  # write the files even if printing fails, for example into a closed pipe
        is_complete = write_files({path: write for path, write in files.items() if path})
    return is_complete


def _write_page(path: Path, page: str) -> None:
    write_atomically(path, page.encode(errors="replace"))  # file names need not be valid Unicode


def _print(write: Callable[[Console], None]) -> None:
    """Prints to standard output, with the terminal's colours and width.

    The text is captured and then printed because a rich console would end the process if the pipe is closed. Characters
    that the output encoding lacks, for example in the name of a job or of a file, are replaced by question marks.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=PIPED_COLUMNS)
    with console.capture() as text:
        write(console)
    encoding = sys.stdout.encoding
    print(text.get().encode(encoding, errors="replace").decode(encoding), end="", flush=True)


def _comma_separated(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [parse(word) for word in text.split(",")]


def _concurrency(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_CONCURRENCY:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1 to {MAX_CONCURRENCY} like 1,2,4, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    rate = _number(text)
    if not 0 < rate <= MAX_RATE:
        raise argparse.ArgumentTypeError(f"expected jobs/s above 0, at most {MAX_RATE:g}, like 0.5,1,2, got {text!r}")
    return rate


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
