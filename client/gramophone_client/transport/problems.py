"""What is wrong with a request: the checks of single values, and a collection of all that failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, get_args

from google.protobuf.duration_pb2 import Duration

from gramophone.options import MAX_STYLE_WEIGHT, MAX_UINT64
from gramophone.recipe import Range, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.values import MisfitError, choice, number, shown, shown_number, whole_number
from gramophone_client.errors import InvalidRequestError
from gramophone_client.types.picture import Format

__all__ = ["Problems", "count", "duration", "image_format", "in_range", "style_weight"]

OTHER_FORMATS: Mapping[str, str] = {"jpg": "jpeg"}


class Problems:
    """Collects what is wrong with a request, by the argument that the caller gave and its path in the request."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Violation]] = []

    def add(self, argument: str, path: str, description: str) -> None:
        """Adds one problem."""
        self._found.append((argument, Violation(path, description)))

    def add_all(self, violations: Iterable[Violation], prefix: str) -> None:
        """Adds violations whose fields are the arguments; their paths begin with the prefix."""
        for field, description in violations:
            self.add(field, f"{prefix}{field}", description)

    @contextmanager
    def of(self, argument: str, path: str) -> Iterator[None]:
        """Adds a `MisfitError` of the block, whose text follows the name of the argument."""
        try:
            yield
        except MisfitError as error:
            self.add(argument, path, str(error))

    def raise_if_any(self) -> None:
        """Raises `InvalidRequestError` if there is a problem."""
        if self._found:
            raise self.error()

    def error(self) -> InvalidRequestError:
        """The error for all problems."""
        text = "; ".join(f"{argument}: {violation.description}" for argument, violation in self._found)
        return InvalidRequestError(text, violations=tuple(violation for _, violation in self._found))


# Each of these raises `MisfitError`.


def style_weight(value: Any) -> float:
    """The weight of a style."""
    weight = number(value)
    if not 0 < weight <= MAX_STYLE_WEIGHT:  # true for NaN too
        raise MisfitError(
            f"must be above 0 and at most {MAX_STYLE_WEIGHT:g}, got {weight:g}; leave a style out to give it no weight"
        )
    return weight


def count(value: Any, high: int) -> int:
    """A whole number from 0 to `high`."""
    exact = whole_number(value)
    if not 0 <= exact <= high:
        shown_high = "2**64-1" if high == MAX_UINT64 else f"{high}"
        raise MisfitError(f"must be a whole number from 0 to {shown_high}, got {shown(exact)}")
    return exact


def in_range(value: Any, allowed: Range, *, or_zero: bool = False) -> int:
    """A whole number of a range, or 0."""
    exact = whole_number(value)
    if not (allowed.low <= exact <= allowed.high or (or_zero and exact == 0)):
        zero = ", or 0" if or_zero else ""
        raise MisfitError(f"must be {allowed.low:g} to {allowed.high:g}{zero}, got {shown_number(exact)}")
    return exact


def duration(value: Any, allowed: Range) -> Duration:
    """The message of a number of seconds."""
    seconds = number(value)
    if not allowed.low <= seconds <= allowed.high:  # true for NaN too
        raise MisfitError(f"must be {allowed.low:g} to {allowed.high:g} seconds, got {seconds:g}")
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def image_format(value: Any) -> Any:
    """The number of an image format in the proto."""
    return pb.ImageFormat.Value(f"IMAGE_FORMAT_{choice(value, get_args(Format), OTHER_FORMATS).upper()}")
