"""The command line of `gramophone`."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
from collections.abc import Callable
from pathlib import Path

from gramophone.recipe import PRESETS
from gramophone_client.async_client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from gramophone_client.bench.command import add_bench
from gramophone_client.commands.control import CHANGEABLE, KEYS_HELP, change, control
from gramophone_client.commands.info import info, recipe
from gramophone_client.commands.jobs import cancel, jobs, watch
from gramophone_client.commands.stylize import CHECKPOINT_EVERY_S, stylize
from gramophone_client.console.exit_codes import EXIT_CODES
from gramophone_client.console.recipe_flags import add_recipe_flags
from gramophone_client.console.timelapse import film_format
from gramophone_client.types.picture import format_of

__all__ = ["command_line"]


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands. Each command sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="gramophone",
        allow_abbrev=False,
        description="Paint photos in the style of pictures, on a gramophone server.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gramophone {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_stylize(commands)
    _add_jobs(commands)
    _add_control(commands)
    _add_server(add_bench(commands))

    info_parser = commands.add_parser(
        "info",
        help="show the server's version, limits and load",
        description="Print version, device, network, limits and load of the server.",
    )
    _add_server(info_parser)
    info_parser.add_argument("--json", action="store_true", help="as JSON, with all layers and presets")
    info_parser.set_defaults(run=info)

    recipe_parser = commands.add_parser(
        "recipe",
        help="show how a picture was made",
        description="Print the flags of `gramophone stylize` that made this picture, from the metadata in it.",
    )
    recipe_parser.add_argument("picture", metavar="PICTURE", type=Path, help="result of `gramophone stylize`")
    recipe_parser.add_argument("--json", action="store_true", help="as JSON")
    recipe_parser.set_defaults(run=recipe)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _add_stylize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "stylize",
        help="paint a photo",
        allow_abbrev=False,
        usage="gramophone stylize [options] CONTENT STYLE [STYLE ...] -o OUT",
        description="Paint CONTENT in the style of the STYLEs. Prints the path of the picture when it is done.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("content", metavar="CONTENT", type=Path, help="photo: JPEG, PNG or WebP")
    parser.add_argument("styles", metavar="STYLE", type=Path, nargs="+", help="one or several style pictures")
    _add_out(parser)
    parser.add_argument("--preset", choices=list(PRESETS), help="a complete recipe (default fast)")
    parser.add_argument("--seed", type=_seed, metavar="N", help="seed of the noise, 0 to 2**64-1 (default: random)")
    parser.add_argument(
        "--style-weights", type=_weights, metavar="X,...", help="weights of the STYLEs (default: equal)"
    )
    parser.add_argument("--start-image", type=Path, metavar="PATH", help="picture to start from")
    parser.add_argument(
        "--result-quality", type=int, default=95, metavar="N", help="quality of .jpg and .webp, 1 to 100 (default 95)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="continue from this checkpoint of a job with the same pictures, with its recipe and seed",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=f"write the job's state to FILE every {CHECKPOINT_EVERY_S:g} s, for --resume",
    )
    add_recipe_flags(parser)

    _add_watching(parser)
    _add_detach(
        _add_server(parser),
        "how long the job continues after the connection is lost or this command ends, and how long this command "
        "looks for it (default 0)",
    )
    parser.set_defaults(run=stylize)


def _add_jobs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    watching = commands.add_parser(
        "watch",
        help="follow an existing job",
        allow_abbrev=False,
        description="Follow a job of `gramophone stylize --detach` to its end. Prints the path of the picture.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watching.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    _add_out(watching)
    _add_watching(watching)
    _add_detach(_add_server(watching))
    watching.set_defaults(run=watch)

    cancelling = commands.add_parser(
        "cancel", help="stop a job", description="Stop a job, for all of its watchers. Prints its status."
    )
    cancelling.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    _add_server(cancelling)
    cancelling.set_defaults(run=cancel)

    listing = commands.add_parser(
        "jobs",
        help="list the server's jobs",
        description="Print the server's jobs, newest first, if its operator allows it.",
    )
    listing.add_argument("--json", action="store_true", help="as JSON, with all losses and times")
    _add_server(listing)
    listing.set_defaults(run=jobs)


def _add_control(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "control",
        help="pause, change or end a job while it runs",
        allow_abbrev=False,
        description="Take control of a running job. Options are carried out in the order of this list; then the "
        f"command ends. Without options, on a terminal, single keys control the job: {KEYS_HELP}. Leaving stops a job "
        "without other watchers, unless it was started with `gramophone stylize --detach`.",
    )
    parser.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    pausing = parser.add_mutually_exclusive_group()
    pausing.add_argument("--pause", action="store_true", help="pause the job")
    pausing.add_argument("--resume", action="store_true", help="continue the job")
    parser.add_argument(
        "--set",
        dest="changes",
        type=change,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"change one of {', '.join(CHANGEABLE)}; may be given several times",
    )
    parser.add_argument("--save", type=_path_with(format_of), metavar="PATH", help="write the current picture")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the current state")
    parser.add_argument("--finish", action="store_true", help="end the job with the current picture")
    display = parser.add_mutually_exclusive_group()
    display.add_argument("--preview", action="store_true", help="with keys: draw the picture in the terminal")
    display.add_argument("--quiet", action="store_true", help="with keys: no progress, only errors")
    _add_detach(_add_server(parser))
    parser.set_defaults(run=control)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--out",
        type=_path_with(format_of),
        required=True,
        help="picture to write: .png, .jpg or .webp; replaces an existing file",
    )


def _add_watching(parser: argparse.ArgumentParser) -> None:
    watching = parser.add_argument_group("watching")
    watching.add_argument("--frames", type=Path, metavar="DIR", help="write every frame to DIR: frame-0001.jpg, ...")
    watching.add_argument(
        "--frame-every", type=int, default=0, metavar="N", help="a frame every N iterations (default: by time)"
    )
    watching.add_argument(
        "--frame-size",
        type=int,
        default=0,
        metavar="N",
        help="reduce frames to at most N pixels per side (default: full size)",
    )
    watching.add_argument(
        "--timelapse", type=_path_with(film_format), metavar="PATH", help="film of the frames, .gif or .webp"
    )
    display = watching.add_mutually_exclusive_group()
    display.add_argument("--preview", action="store_true", help="draw the picture in the terminal while it forms")
    display.add_argument("--quiet", action="store_true", help="no progress, only errors")


def _add_timeout(server: argparse._ArgumentGroup) -> None:
    server.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help=f"give up after this long (default {DEFAULT_TIMEOUT_S:g})",
    )


def _add_detach(
    server: argparse._ArgumentGroup, help: str = "how long to look for the job after the connection is lost (default 0)"
) -> None:
    _add_timeout(server)
    server.add_argument(
        "--detach",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help=help,
    )


def _add_server(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=os.environ.get("GRAMOPHONE_SERVER", DEFAULT_TARGET),
        help=f"(default: $GRAMOPHONE_SERVER, else {DEFAULT_TARGET})",
    )
    group.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait until the server is ready (default 0)",
    )
    return group


def _path_with(rule: Callable[[str], object]) -> Callable[[str], Path]:
    """Makes an argument type: a path whose name `rule` accepts."""

    def path(text: str) -> Path:
        try:
            rule(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return Path(text)

    return path


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**64-1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return seconds


def _weights(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,0.5, got {text!r}") from None
