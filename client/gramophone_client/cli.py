"""The `gramophone` command: files in, files out."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from gramophone.recipe import PRESETS, InvalidRecipe, Violation
from gramophone_client import errors
from gramophone_client.bench.command import add_bench
from gramophone_client.client import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from gramophone_client.errors import GramophoneError
from gramophone_client.flags import TYPES, add_recipe_flags, as_flags, flag
from gramophone_client.job_commands import cancel, jobs, watch
from gramophone_client.note import NoNote, read_note
from gramophone_client.outputs import Unusable
from gramophone_client.picture import format_of
from gramophone_client.stylize_command import stylize
from gramophone_client.sync_client import SyncGramophoneClient
from gramophone_client.terminal import complain
from gramophone_client.timelapse import film_format
from gramophone_client.updates import ServerInfo

__all__ = ["main"]

DONE, BAD_REQUEST, NO_SERVER, NO_ROOM, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130

EXIT_CODES = f"""\
exit codes:
  {DONE:>3}  done
  {BAD_REQUEST:>3}  bad usage, a file that cannot be read or written, or a request that the server refused
  {NO_SERVER:>3}  no server there, or it is not ready, or the connection was lost
  {NO_ROOM:>3}  the server is full, the job does not fit on it, or the time is up
  {FAILED:>3}  the job failed: the loss diverged, or somebody cancelled it, or the server has a defect
  {INTERRUPTED:>3}  interrupted (Ctrl-C); the job is stopped at the server, or with --detach goes on for so long

When a job ends early and a frame had arrived, that unfinished picture is kept as OUT, or beside an older OUT.
"""

# First match wins; GramophoneError, which all of them are, comes last.
CODES: Sequence[tuple[type[GramophoneError], int]] = (
    (errors.InvalidRequest, BAD_REQUEST),
    (errors.MessageTooLarge, BAD_REQUEST),
    (errors.JobNotFound, BAD_REQUEST),
    (errors.RequestIdTaken, BAD_REQUEST),
    (errors.ListingDisabled, BAD_REQUEST),
    (errors.ConnectionFailed, NO_SERVER),
    (errors.Exhausted, NO_ROOM),
    (errors.DeadlineExceeded, NO_ROOM),
    (GramophoneError, FAILED),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
        return DONE
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except InvalidRecipe as error:
        complain(*_lines(error.violations, args))
        return BAD_REQUEST
    except GramophoneError as error:
        complain(*(_lines(error.violations, args) if error.violations else [str(error)]))
        return next(code for kind, code in CODES if isinstance(error, kind))
    except (Unusable, NoNote) as error:
        complain(str(error))
        return BAD_REQUEST
    except BrokenPipeError:  # `gramophone info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return BAD_REQUEST


def info(args: argparse.Namespace) -> None:
    """`gramophone info`."""
    with SyncGramophoneClient(args.server) as client:
        if args.wait:
            client.wait_until_ready(args.wait)
        told = client.server_info()
    print(json.dumps(asdict(told), indent=2) if args.json else _described(told))


def recipe(args: argparse.Namespace) -> None:
    """`gramophone recipe`."""
    note = read_note(args.picture)
    if args.json:
        told = {"recipe": asdict(note.recipe), "seed": note.seed, "style_weights": note.style_weights}
        print(json.dumps(told, indent=2))
    else:
        weights = ",".join(f"{weight:g}" for weight in note.style_weights)
        print(shlex.join(["--seed", str(note.seed), "--style-weights", weights, *as_flags(note.recipe)]))


def _lines(violations: Sequence[Violation], args: argparse.Namespace) -> list[str]:
    return [f"{_as_typed(violation.field, args)}: {violation.description}" for violation in violations]


FLAGS_OF_FIELDS = {
    "seed": "--seed",
    "styles": "STYLE",
    "result_quality": "--result-quality",
    "detach_grace": "--detach",
    "job_id": "JOB_ID",
    "frames.every_iterations": "--frame-every",
    "frames.max_side": "--frame-size",
}


def _as_typed(field: str, args: argparse.Namespace) -> str:
    """The path of a field of the request, in the words of whoever typed the command."""
    path = field.removeprefix("spec.")
    if path.startswith("content"):
        return str(args.content)
    if path.startswith("start_image"):
        return str(args.start_image or "--start-image")
    if style := re.match(r"styles\[(\d+)\](\.weight)?", path):
        return "--style-weights" if style[2] else str(args.styles[int(style[1])])
    name, *rest = re.split(r"(?=[.\[])", path.removeprefix("recipe."), maxsplit=1)
    if path.startswith("recipe.") or name in TYPES:
        return flag(name) + "".join(rest)
    return FLAGS_OF_FIELDS.get(path, field)


def _described(told: ServerInfo) -> str:
    limits = told.limits
    rows = {
        "version": told.version,
        "device": f"{told.device}, {told.precision}",
        "network": told.backbone,
        "weights": told.weights,
        "layers": " ".join(told.layers),
        "images": f"at most {limits.max_image_bytes / 2**20:g} MiB and {limits.max_image_pixels / 1e6:g} megapixels",
        "results": f"at most {limits.max_size} px, {limits.max_iterations} iterations, {limits.max_styles} styles",
        "jobs": f"{told.running_jobs} running, {told.queued_jobs} of at most {limits.max_queued} waiting",
        "presets": ", ".join(told.presets),
    }
    return "\n".join(f"{name:<9}{value}" for name, value in rows.items())


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--preset", choices=list(PRESETS), default="fast", help="a complete recipe (default fast)")
    parser.add_argument("--seed", type=_seed, metavar="N", help="of the noise, 0 to 2**64-1 (default: a random one)")
    parser.add_argument("--style-weights", type=_weights, metavar="X,...", help="shares of the STYLEs (default: equal)")
    parser.add_argument("--start-image", type=Path, metavar="PATH", help="picture to start from")
    parser.add_argument(
        "--result-quality", type=int, default=95, metavar="N", help="of .jpg and .webp, 1 to 100 (default 95)"
    )
    add_recipe_flags(parser)

    _add_watching(parser)
    server = _add_server(parser)
    _add_timeout(server)
    server.add_argument(
        "--detach",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="let the job go on for so long when the connection is lost or this command ends, and look for it again "
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
    server = _add_server(watching)
    _add_timeout(server)
    server.add_argument(
        "--detach",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="look for the job for so long when the connection is lost (default 0)",
    )
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


if __name__ == "__main__":
    sys.exit(main())
