"""Converts what a Python caller gives to exact numbers and choices. Standard library only.

Every function raises `MisfitError` with a text that follows the name of a field: what fits, and what came.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping, Sized
from dataclasses import fields
from enum import StrEnum
from typing import Any

__all__ = [
    "MisfitError",
    "choice",
    "did_you_mean",
    "nearest",
    "number",
    "own_values",
    "shown",
    "shown_number",
    "whole_number",
]

MAX_SHOWN = 60  # characters of a value in an error
MAX_WORD = 32  # characters of a word that are compared; every known word is shorter, and comparing long texts is slow


class MisfitError(ValueError):
    """A value that does not fit. The text follows the name of what it was given for."""


def number(value: Any) -> float:
    """A number as a float: also a scalar of numpy, `Decimal` or `Fraction`, but neither a bool nor a text."""
    if _is_scalar(value) and (hasattr(value, "__float__") or hasattr(value, "__index__")):
        try:
            return float(value)
        except OverflowError:  # a whole number of more than 308 digits
            return math.inf if value > 0 else -math.inf
        except (TypeError, ValueError):
            pass
    raise MisfitError(f"must be a number, got {shown(value)}")


def whole_number(value: Any) -> int:
    """A whole number as an int: also an integer scalar of numpy, but neither a bool nor a float, such as 3.0."""
    if _is_scalar(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise MisfitError(f"must be a whole number, got {shown(value)}")


def choice(value: Any, choices: Iterable[str], others: Mapping[str, str]) -> str:
    """The value, if it is one of the choices. `others` are as in `nearest`."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    hint = did_you_mean(value, choices, others) if isinstance(value, str) else ""
    raise MisfitError(f"must be one of {', '.join(choices)}, got {shown(value)}{hint}")


def nearest(word: str, known: Iterable[str], others: Mapping[str, str]) -> str | None:
    """The known word that is meant by an unknown one: the same in other letters, one that `others` maps it to, or one
    with a similar spelling; None if there is none."""
    known = list(known)
    meant = {_plain(other): name for other, name in others.items() if name in known}
    meant |= {_plain(name): name for name in known}
    close = difflib.get_close_matches(_plain(word[:MAX_WORD]), meant, n=1, cutoff=0.65)
    return meant[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str], others: Mapping[str, str]) -> str:
    """The end of an error that proposes the nearest known word; "" if no word is near."""
    name = nearest(word, known, others)
    return "" if name is None else f"; did you mean {name}?"


def shown(value: Any) -> str:
    """A value in an error: itself if it is short, else what it is."""
    if value is None or isinstance(value, bool | str | int | float | complex):
        if isinstance(value, int) and value.bit_length() > 3 * MAX_SHOWN:
            return shown_number(value)  # Python writes no number of more than 4300 digits
        text = repr(str(value)) if isinstance(value, StrEnum) else repr(value)
        return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__qualname__
    if type(value).__module__ not in ("builtins", "__main__"):
        kind = f"{type(value).__module__.partition('.')[0].lstrip('_')}.{kind}"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    article = "an" if kind[0] in "aeiouAEIOU" else "a"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{article} {kind} of shape {tuple(shape)}"
    length = f" of {len(value)}" if isinstance(value, Sized) and type(value).__module__ == "builtins" else ""
    return f"{article} {kind}{length}"


def shown_number(value: float) -> str:
    """A number in an error."""
    try:
        return f"{value:g}"
    except OverflowError:  # a whole number of more than 308 digits
        return f"a number of {int(value).bit_length()} bits"


def own_values(value: Any) -> str:
    """The text of a frozen dataclass as it can be written in Python, with only the fields that differ from their
    defaults."""
    given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    texts = (f"{name}={repr(str(own)) if isinstance(own, StrEnum) else repr(own)}" for name, own in given.items())
    return f"{type(value).__name__}({', '.join(texts)})"


def _plain(word: str) -> str:
    return word.strip().strip("-").lower().replace("-", "_").replace(" ", "_")


def _is_scalar(value: Any) -> bool:
    """False for a bool, also one of numpy or torch, and for an array with axes."""
    is_bool = str(getattr(value, "dtype", type(value).__name__)).endswith("bool")
    return not is_bool and not len(getattr(value, "shape", ()) or ())
