"""The `gramophone` command."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence

from gramophone.recipe import InvalidRecipeError, Violation
from gramophone_client.commands.parser import command_line
from gramophone_client.console.display import print_errors
from gramophone_client.console.exit_codes import BAD_REQUEST, DONE, INTERRUPTED, exit_code
from gramophone_client.console.outputs import UsageError
from gramophone_client.console.recipe_flags import FIELD_TYPES, flag
from gramophone_client.errors import GramophoneError
from gramophone_client.types.recipe_metadata import NoRecipeError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = command_line().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
        return DONE
    except KeyboardInterrupt:
        print_errors("interrupted")
        return INTERRUPTED
    except InvalidRecipeError as error:
        print_errors(*_lines(error.violations, args))
        return BAD_REQUEST
    except GramophoneError as error:
        print_errors(*(_lines(error.violations, args) if error.violations else [str(error)]))
        return exit_code(error)
    except (UsageError, NoRecipeError) as error:
        print_errors(str(error))
        return BAD_REQUEST
    except BrokenPipeError:  # as in `gramophone info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        print_errors(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return BAD_REQUEST


def _lines(violations: Sequence[Violation], args: argparse.Namespace) -> list[str]:
    return [f"{_as_typed(violation.field, args)}: {violation.description}" for violation in violations]


FLAGS_OF_FIELDS = {
    "seed": "--seed",
    "styles": "STYLE",
    "result_quality": "--result-quality",
    "detach_grace": "--detach",
    "job_id": "JOB_ID",
    "resume": "--resume",
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
    if style := re.match(r"styles\[(\d+)\](\.weight)?", path):
        return "--style-weights" if style[2] else str(args.styles[int(style[1])])
    name, *rest = re.split(r"(?=[.\[])", path.removeprefix("recipe."), maxsplit=1)
    if path.startswith("recipe.") or name in FIELD_TYPES:
        return flag(name) + "".join(rest)
    return FLAGS_OF_FIELDS.get(path, field)


if __name__ == "__main__":
    sys.exit(main())
