"""What can be typed after `gramophone`."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
from collections.abc import Callable
from pathlib import Path

from gramophone.recipe import PRESETS
from gramophone_client.bench.command import add_bench
from gramophone_client.client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
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
    """The parser of all commands; each sets `run`, which takes the arguments."""
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
        help="what the server is and what it takes",
        description="Print version, device, network, limits and load of the server.",
    )
    _add_server(info_parser)
    info_parser.add_argument("--json", action="store_true", help="as JSON, with the layers and presets in full")
    info_parser.set_defaults(run=info)

    recipe_parser = commands.add_parser(
        "recipe",
        help="how a picture was made",
        description="Print the flags of `gramophone stylize` that made this picture, from what the server noted in it.",
    )
    recipe_parser.add_argument("picture", metavar="PICTURE", type=Path, help="a result of `gramophone stylize`")
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
    parser.add_argument("content", metavar="CONTENT", type=Path, help="the photo: JPEG, PNG or WebP")
    parser.add_argument("styles", metavar="STYLE", type=Path, nargs="+", help="one or several pictures to paint like")
    _add_out(parser)
    parser.add_argument("--preset", choices=list(PRESETS), help="a complete recipe (default fast)")
    parser.add_argument("--seed", type=_seed, metavar="N", help="of the noise, 0 to 2**64-1 (default: a random one)")
    parser.add_argument("--style-weights", type=_weights, metavar="X,...", help="shares of the STYLEs (default: equal)")
    parser.add_argument("--start-image", type=Path, metavar="PATH", help="picture to start from")
    parser.add_argument(
        "--result-quality", type=int, default=95, metavar="N", help="of .jpg and .webp, 1 to 100 (default 95)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="go on from this checkpoint of a job with the same pictures; its recipe and seed are the ones to go on with",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=f"keep the job's newest state there, every {CHECKPOINT_EVERY_S:g} s, for --resume",
    )
    add_recipe_flags(parser)

    _add_watching(parser)
    _add_search(
        _add_server(parser),
        "let the job go on for so long when the connection is lost or this command ends, and look for it again "
        "until then (default 0)",
    )
    parser.set_defaults(run=stylize)


def _add_jobs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    watching = commands.add_parser(
        "watch",
        help="follow a job that is there already",
        allow_abbrev=False,
        description="Follow a job of `gramophone stylize --detach` to its end. Prints the path of the picture.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watching.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    _add_out(watching)
    _add_watching(watching)
    _add_search(_add_server(watching))
    watching.set_defaults(run=watch)

    cancelling = commands.add_parser(
        "cancel", help="stop a job", description="Stop a job, for all who watch it. Prints how it stands then."
    )
    cancelling.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    _add_server(cancelling)
    cancelling.set_defaults(run=cancel)

    listing = commands.add_parser(
        "jobs",
        help="the jobs that the server has",
        description="Print the jobs that the server has, newest first, if whoever runs it allows that.",
    )
    listing.add_argument("--json", action="store_true", help="as JSON, with losses and times in full")
    _add_server(listing)
    listing.set_defaults(run=jobs)


def _add_control(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "control",
        help="pause, change or end a job while it runs",
        allow_abbrev=False,
        description="Take control of a job that runs. With options, they are done in the order of this list and the "
        f"command ends; without, on a terminal, single keys do it: {KEYS_HELP}. Leaving stops a job that nobody else "
        "watches, unless it may go on alone (`gramophone stylize --detach`).",
    )
    parser.add_argument("job_id", metavar="JOB_ID", help="as `gramophone stylize` printed it")
    standing = parser.add_mutually_exclusive_group()
    standing.add_argument("--pause", action="store_true", help="let it stand still")
    standing.add_argument("--resume", action="store_true", help="let it go on")
    parser.add_argument(
        "--set",
        dest="changes",
        type=change,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"change one of {', '.join(CHANGEABLE)}; may be given several times",
    )
    parser.add_argument("--save", type=_path_with(format_of), metavar="PATH", help="write the picture as it is now")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write its state as it is now")
    parser.add_argument("--finish", action="store_true", help="end it, with the picture as it is now")
    silence = parser.add_mutually_exclusive_group()
    silence.add_argument("--preview", action="store_true", help="with keys: draw the forming picture in the terminal")
    silence.add_argument("--quiet", action="store_true", help="with keys: no progress, only errors")
    _add_search(_add_server(parser))
    parser.set_defaults(run=control)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--out",
        type=_path_with(format_of),
        required=True,
        help="the picture to write, replacing what is there: .png, .jpg or .webp",
    )


def _add_watching(parser: argparse.ArgumentParser) -> None:
    watching = parser.add_argument_group("watching")
    watching.add_argument("--frames", type=Path, metavar="DIR", help="write every frame there: frame-0001.jpg, ...")
    watching.add_argument(
        "--frame-every", type=int, default=0, metavar="N", help="a frame every N iterations (default: by time)"
    )
    watching.add_argument(
        "--frame-size", type=int, default=0, metavar="N", help="reduce frames to N pixels (default: as they are)"
    )
    watching.add_argument(
        "--timelapse", type=_path_with(film_format), metavar="PATH", help="film of the frames, .gif or .webp"
    )
    silence = watching.add_mutually_exclusive_group()
    silence.add_argument("--preview", action="store_true", help="draw the forming picture in the terminal")
    silence.add_argument("--quiet", action="store_true", help="no progress, only errors")


def _add_timeout(server: argparse._ArgumentGroup) -> None:
    server.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help=f"give up after this long (default {DEFAULT_TIMEOUT_S:g})",
    )


def _add_search(
    server: argparse._ArgumentGroup, help: str = "look for the job for so long when the connection is lost (default 0)"
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
        "--wait", type=float, default=0.0, metavar="SECONDS", help="wait so long for the server to be ready (default 0)"
    )
    return group


def _path_with(rule: Callable[[str], object]) -> Callable[[str], Path]:
    """A path whose suffix obeys the rule."""

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
