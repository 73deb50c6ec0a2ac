"""The command line of `gramophone`."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shtab

from gramophone.recipe import PRESETS
from gramophone.values import did_you_mean
from gramophone_client.bench.command import add_bench
from gramophone_client.commands.completion import SHELLS, completion
from gramophone_client.commands.control import CHANGEABLE, KEYS_HELP, change, control
from gramophone_client.commands.info import info, recipe
from gramophone_client.commands.jobs import cancel, jobs, watch
from gramophone_client.commands.options import (
    add_detach,
    add_display,
    add_job,
    add_out,
    add_server,
    add_timeout,
    add_watching,
)
from gramophone_client.commands.stylize import CHECKPOINT_EVERY_S, stylize
from gramophone_client.commands.targets import targets
from gramophone_client.console.arguments import CommandParser, complete, one_of, path_with, whole_number
from gramophone_client.console.exit_codes import EXIT_CODES
from gramophone_client.console.recipe_flags import add_recipe_flags, preset_argument
from gramophone_client.types.picture import format_of

__all__ = ["SHORT_HELP", "command_line", "parse"]

SHORT_HELP = """\
gramophone paints photos in the style of pictures, on a gramophone server.

  gramophone stylize PHOTO PAINTING -o OUT    paint a photo
  gramophone watch JOB_ID -o OUT              follow a job that runs already
  gramophone info                             what the server is, and its limits

gramophone --help lists all commands, gramophone COMMAND --help their options.
"""
EPILOG = f"""\
{EXIT_CODES}
The server is that of --target, else of $GRAMOPHONE_TARGET or $GRAMOPHONE_SERVER, else the default of the file of named
targets; see `gramophone targets`."""
# What other programs, or other spellings, call our commands.
OTHER_COMMANDS: Mapping[str, str] = {
    "attach": "watch",
    "benchmark": "bench",
    "config": "targets",
    "follow": "watch",
    "help": "--help",
    "kill": "cancel",
    "list": "jobs",
    "ls": "jobs",
    "paint": "stylize",
    "profiles": "targets",
    "ps": "jobs",
    "run": "stylize",
    "serve": "gramophone-server",
    "server": "gramophone-server",
    "status": "info",
    "stop": "cancel",
    "style": "stylize",
    "transfer": "stylize",
    "version": "--version",
}


def parse(words: list[str]) -> argparse.Namespace:
    """Parses the words after `gramophone`; the result has `run`, a function of it. Exits with code 2, and a suggestion,
    if they are wrong."""
    return _CommandLine().parse(words)


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands, for the reference."""
    return _CommandLine().parser


class _CommandLine:
    def __init__(self) -> None:
        self.parser = CommandParser(
            prog="gramophone",
            usage="gramophone COMMAND ...",
            description="Paint photos in the style of pictures, on a gramophone server.",
            epilog=EPILOG,
        )
        self.parser.add_argument("--version", action="version", version=f"gramophone {_version()}")
        self._commands = self.parser.add_subparsers(
            required=True, title="commands", metavar="COMMAND", prog="gramophone", parser_class=CommandParser
        )
        self._add_stylize()
        self._add_jobs()
        self._add_control()
        self._add_info()
        add_server(add_bench(self._commands))
        self._add_completion()

    def parse(self, words: list[str]) -> argparse.Namespace:
        parsers: Mapping[str, CommandParser] = self._commands.choices
        if words and words[0] in parsers:
            parsers[words[0]].check_options(words[1:])
        elif words and words[0].startswith("-"):
            self.parser.check_options(words[:1])
        elif words:
            known = [*parsers, "--help", "--version", "gramophone-server"]
            self.parser.error(f"there is no command {words[0]!r}{did_you_mean(words[0], known, OTHER_COMMANDS)}")
        return self.parser.parse_args(words)

    def _add(self, name: str, run: Callable[[argparse.Namespace], None], help: str, **options: Any) -> CommandParser:
        parser: CommandParser = self._commands.add_parser(name, help=help, **options)
        parser.set_defaults(run=run)
        return parser

    def _add_stylize(self) -> None:
        parser = self._add(
            "stylize",
            stylize,
            "paint a photo",
            usage="gramophone stylize [options] CONTENT STYLE [STYLE ...] -o OUT",
            description="Paint CONTENT in the style of the STYLEs. Prints the path of the picture when it is done.",
        )
        pictures = parser.add_argument_group("pictures")
        photo = pictures.add_argument("content", metavar="CONTENT", type=Path, help="photo: JPEG, PNG or WebP")
        styles = pictures.add_argument("styles", metavar="STYLE", type=Path, nargs="+", help="one or several paintings")
        pictures.add_argument(
            "--style-weights", type=_weights, metavar="X,...", help="weights of the STYLEs (default: equal)"
        )
        start = pictures.add_argument("--start-image", type=Path, metavar="FILE", help="picture to start from")
        add_out(pictures)
        pictures.add_argument(
            "--result-quality",
            type=whole_number,
            default=95,
            metavar="N",
            help="quality of .jpg and .webp, 1 to 100 (default 95)",
        )
        base = parser.add_argument_group("recipe", "The options of the next four groups change fields of the preset.")
        base.add_argument(
            "--preset", type=preset_argument, choices=list(PRESETS), help="a complete recipe (default fast)"
        )
        base.add_argument("--seed", type=_seed, metavar="N", help="seed of the noise, 0 to 2**64-1 (default: random)")
        add_recipe_flags(parser)

        add_watching(parser)
        files = parser.add_argument_group("checkpoints")
        checkpoint = files.add_argument(
            "--checkpoint",
            type=Path,
            metavar="FILE",
            help=f"write the job's state to FILE every {CHECKPOINT_EVERY_S:g} s, for --resume",
        )
        resume = files.add_argument(
            "--resume",
            type=Path,
            metavar="FILE",
            help="continue from this checkpoint of a job with the same pictures, with its recipe and seed",
        )
        server = add_server(parser)
        server.add_argument(
            "--local", action="store_true", help="start a server on this machine for this job, and stop it at the end"
        )
        add_timeout(server)
        add_detach(
            server,
            "let the job continue this long after the connection is lost or this command ends, and look for it this "
            "long (default 0)",
        )
        for argument in (photo, styles, start, checkpoint, resume):
            complete(argument, shtab.FILE)

    def _add_jobs(self) -> None:
        watching = self._add(
            "watch",
            watch,
            "follow a job that runs already",
            usage="gramophone watch [options] JOB_ID -o OUT",
            description="Follow a job of `gramophone stylize --detach` to its end. Prints the path of the picture.",
        )
        add_out(add_job(watching))
        add_watching(watching)
        server = add_server(watching)
        add_timeout(server)
        add_detach(server)

        cancelling = self._add(
            "cancel",
            cancel,
            "stop a job",
            usage="gramophone cancel [options] JOB_ID",
            description="Stop a job, for all of its watchers. Prints its status.",
        )
        add_job(cancelling)
        add_server(cancelling)

        listing = self._add(
            "jobs",
            jobs,
            "list the server's jobs",
            usage="gramophone jobs [options]",
            description="Print the server's jobs, newest first, if its operator allows it.",
        )
        listing.add_argument("--json", action="store_true", help="as JSON, with all losses and times")
        add_server(listing)

    def _add_control(self) -> None:
        parser = self._add(
            "control",
            control,
            "pause, change or end a job while it runs",
            usage="gramophone control [options] JOB_ID",
            description="Take control of a running job. The commands are carried out in the order of this list; then "
            f"the program ends. Without them, on a terminal, single keys control the job: {KEYS_HELP}. Leaving stops a "
            "job without other watchers, unless it was started with `gramophone stylize --detach`.",
        )
        add_job(parser)
        commands = parser.add_argument_group("commands")
        pausing = commands.add_mutually_exclusive_group()
        pausing.add_argument("--pause", action="store_true", help="pause the job")
        pausing.add_argument("--resume", action="store_true", help="continue the job")
        commands.add_argument(
            "--set",
            dest="changes",
            type=change,
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help=f"change one of {', '.join(field.replace('_', '-') for field in CHANGEABLE)}; may be repeated",
        )
        picture = commands.add_argument(
            "--save", type=path_with(format_of), metavar="FILE", help="write the current picture"
        )
        state = commands.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the current state")
        commands.add_argument("--finish", action="store_true", help="end the job with the current picture")
        add_display(parser.add_argument_group("watching"), "with keys: ")
        server = add_server(parser)
        add_timeout(server)
        add_detach(server)
        for argument in (picture, state):
            complete(argument, shtab.FILE)

    def _add_info(self) -> None:
        about = self._add(
            "info",
            info,
            "show the server's version, limits and load",
            usage="gramophone info [options]",
            description="Print version, device, network, limits and load of the server.",
        )
        about.add_argument("--json", action="store_true", help="as JSON, with all layers and presets")
        add_server(about)

        made = self._add(
            "recipe",
            recipe,
            "show how a picture was made",
            usage="gramophone recipe [--json] PICTURE",
            description="Print the options of `gramophone stylize` that made this picture, from the metadata in it.",
        )
        picture = made.add_argument("picture", metavar="PICTURE", type=Path, help="result of `gramophone stylize`")
        complete(picture, shtab.FILE)
        made.add_argument("--json", action="store_true", help="as JSON")

        named = self._add(
            "targets",
            targets,
            "list the named servers, and where they are named",
            usage="gramophone targets [--json]",
            description="Print the file of named targets, its targets (* is the default), and the one that is used "
            "now. The file is $GRAMOPHONE_CONFIG, else ~/.config/gramophone/config.toml.",
        )
        named.add_argument("--json", action="store_true", help="as JSON")
        named.add_argument("--names", action="store_true", help=argparse.SUPPRESS)  # for the shells' completion
        named.set_defaults(target=None, metadata=[])

    def _add_completion(self) -> None:
        places = "\n".join(f"  {shell:<4}  {place}" for shell, place in SHELLS.items())
        parser = self._add(
            "completion",
            functools.partial(completion, self.parser),
            "print a script that completes commands in a shell",
            usage=f"gramophone completion {{{','.join(SHELLS)}}}",
            description="Print the script that completes commands, options, values and paths in a shell.",
            epilog=f"write it to:\n{places}\n\nA new shell then completes.",
        )
        parser.add_argument("shell", metavar="SHELL", type=one_of(SHELLS), choices=list(SHELLS), help=", ".join(SHELLS))


def _version() -> str:
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**64-1, got {text!r}")
    return int(text)


def _weights(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,0.5, got {text!r}") from None
