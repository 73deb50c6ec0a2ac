"""The parser of a command: its help, its errors, and the types of its arguments."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gramophone.recipe import OTHER_NAMES
from gramophone.values import did_you_mean, nearest, shown

__all__ = ["CommandParser", "complete", "number", "one_of", "path_with", "seconds", "seconds_above_0", "whole_number"]

# What other programs call our options. Those of the recipe's fields are in `OTHER_NAMES`.
OTHER_OPTIONS: Mapping[str, str] = {
    **OTHER_NAMES,
    "address": "target",
    "content_layer": "content_layers",
    "endpoint": "target",
    "host": "target",
    "init_image": "start_image",
    "layers": "style_layers",
    "output": "out",
    "output_image": "out",
    "random_seed": "seed",
    "recipe": "preset",
    "resolution": "size",
    "save_every": "frame_every",
    "save_iter": "frame_every",
    "style_blend_weights": "style_weights",
    "style_layer": "style_layers",
    "style_size": "style_scale",
    "url": "target",
    "video": "timelapse",
}
MAX_HELP_COLUMNS = 100  # longer lines are hard to read
HELP_COLUMN = 26  # where the text beside an option starts
LEAST_LENGTH = 14  # of an option; argparse forgets the indentation of commands, so that the longest would have no room


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs to the terminal, keeps indented ones as they are, and breaks lists at their commas."""

    def __init__(self, prog: str, **_: Any) -> None:
        columns = min(shutil.get_terminal_size().columns, MAX_HELP_COLUMNS)
        super().__init__(prog, max_help_position=HELP_COLUMN, width=columns - 2)
        self._action_max_length = LEAST_LENGTH

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip("\n").split("\n\n"):
            if re.search(r"^ ", paragraph, re.MULTILINE):
                paragraphs.append(textwrap.indent(paragraph, indent))
            else:
                paragraphs.append(
                    textwrap.fill(" ".join(paragraph.split()), width, initial_indent=indent, subsequent_indent=indent)
                )
        return "\n\n".join(paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in _wrapped(part, width)]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns, if possible; words that are longer break after a comma."""
    lines = [""]
    for word in text.split():
        pieces = [word] if len(word) <= width else re.findall(r"[^,]*,|[^,]+$", word)
        for piece, space in zip(pieces, [" ", *[""] * len(pieces)], strict=False):
            joined = f"{lines[-1]}{space}{piece}".lstrip()
            if len(joined) <= width or not lines[-1]:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. Its errors are one line that ends with what to do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith('?') else f'; see {self.prog} --help'}\n")

    def check_options(self, words: Sequence[str]) -> None:
        """Exits with a suggestion if the words of a command line have an option that this parser does not know.

        `parse_args` would report a missing argument first, which may be what the unknown option was meant to be.
        """
        known = self._option_string_actions
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if not re.match(r"--?[A-Za-z]", word) or " " in word or name in known:
                continue
            if not word.startswith("--") and word[:2] in known:  # as in -oout.png
                continue
            names = [option.removeprefix("--").replace("-", "_") for option in known if option.startswith("--")]
            meant = nearest(name, names, OTHER_OPTIONS)
            hint = "" if meant is None else f"; did you mean --{meant.replace('_', '-')}?"
            self.error(f"there is no option {name}{hint}")


def complete(argument: argparse.Action, candidates: Mapping[str, Any]) -> None:
    """Lets the shell complete an argument: with `shtab.FILE`, `shtab.DIRECTORY` or `shtab.cmd`."""
    argument.complete = candidates  # type: ignore[attr-defined]  # shtab looks there


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """Makes an argument type: one of some words. Give `choices` to the argument, too, for its help."""

    def choice(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(
                f"expected one of {', '.join(choices)}, got {shown(text)}{did_you_mean(text, choices, {})}"
            )
        return text

    return choice


def path_with(rule: Callable[[str], object]) -> Callable[[str], Path]:
    """Makes an argument type: a path whose name `rule` accepts; it raises ValueError for others."""

    def path(text: str) -> Path:
        try:
            rule(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return Path(text)

    return path


def number(text: str) -> float:
    """An argument type: any number; its range is checked with the recipe."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def whole_number(text: str) -> int:
    """An argument type: any whole number; its range is checked with the recipe or by the server."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def seconds(text: str) -> float:
    """An argument type: a finite number of seconds, 0 or more."""
    if not 0 <= (value := _float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return value


def seconds_above_0(text: str) -> float:
    """An argument type: a finite number of seconds above 0."""
    if not 0 < (value := _float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
