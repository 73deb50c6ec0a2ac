"""The `gramophone` command."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from gramophone.recipe import FIELD_TYPES, InvalidRecipeError, Violation
from gramophone_client.commands.local_server import LocalServerError
from gramophone_client.commands.parser import SHORT_HELP, parse
from gramophone_client.console.display import print_errors
from gramophone_client.console.exit_codes import BAD_REQUEST, DONE, INTERRUPTED, NO_SERVER, TERMINATED, exit_code
from gramophone_client.console.outputs import UsageError
from gramophone_client.console.recipe_flags import flag
from gramophone_client.errors import GramophoneError
from gramophone_client.types.recipe_metadata import NoRecipeError

__all__ = ["main"]


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends the command as Ctrl-C does, so that the terminal is restored and a picture so far is kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(SHORT_HELP, end="")
        return DONE
    args = parse(words)
    try:
        with _sigterm_raises():
            run: Callable[[argparse.Namespace], None] = args.run
            run(args)
        return DONE
    except _Terminated:
        print_errors("terminated")
        return TERMINATED
    except KeyboardInterrupt:
        print_errors("interrupted")
        return INTERRUPTED
    except InvalidRecipeError as error:
        print_errors(*_lines(error.violations, args))
        return BAD_REQUEST
    except GramophoneError as error:
        print_errors(*(_lines(error.violations, args) if error.violations else [str(error)]))
        print_errors(*getattr(error, "__notes__", ()))
        return exit_code(error)
    except LocalServerError as error:
        print_errors(*str(error).splitlines())
        return NO_SERVER
    except (UsageError, NoRecipeError) as error:
        print_errors(*str(error).splitlines())
        return BAD_REQUEST
    except BrokenPipeError:  # as in `gramophone info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        print_errors(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return BAD_REQUEST


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    """The flag or file on the command line that sets a field of the request; the field's path if there is none."""
    path = field.removeprefix("spec.")
    if path.startswith("update."):
        return f"--set {path.removeprefix('update.')}"
    if path.startswith("content."):
        return str(args.content)
    if path.startswith("start_image"):
        return str(args.start_image or "--start-image")
    if path in ("resume", "resume_digest"):
        return str(args.resume)
    if style := re.match(r"styles\[(\d+)\](\.weight)?", path):
        return "--style-weights" if style[2] else str(args.styles[int(style[1])])
    name, *rest = re.split(r"(?=[.\[])", path.removeprefix("recipe."), maxsplit=1)
    if path.startswith("recipe.") or name in FIELD_TYPES:
        return flag(name) + "".join(rest)
    return FLAGS_OF_FIELDS.get(path, field)


if __name__ == "__main__":
    sys.exit(main())
