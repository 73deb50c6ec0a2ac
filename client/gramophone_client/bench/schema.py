"""What the JSON file of a report must hold, so that a wrong file is told in a sentence and not found out in a chart."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["REPORT", "Value", "check"]

MOST = 1e15  # of any figure; charts and rates can draw and divide by what is below
LAST_BUCKET = 8191  # of a histogram; holds three hundred thousand years


@dataclass(frozen=True)
class Value:
    """A value by itself."""

    allowed: str  # in words
    is_allowed: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """An object of any keys."""

    form: Form  # of each value


# An object's keys, of which it may have more; or the one form of a list's items.
Form = Value | Each | Mapping[str, "Form"] | list["Form"]


def check(told: Any, form: Form, place: str = "") -> None:
    """Raises ValueError, which names the place in the file and what is allowed there, if `told` has not this form."""
    match form:
        case Value(allowed, is_allowed):
            if not is_allowed(told):
                raise _wrong(place, allowed, told)
        case list():
            if not isinstance(told, list):
                raise _wrong(place, "a list", told)
            for i, one in enumerate(told):
                check(one, form[0], f"{place}[{i}]")
        case _:
            if not isinstance(told, dict):
                raise _wrong(place, "an object", told)
            forms = dict.fromkeys(told, form.form) if isinstance(form, Each) else form
            for key, value in forms.items():
                inner = f"{place}.{key}" if place else key
                if key not in told:
                    raise ValueError(f"{inner} is missing")
                check(told[key], value, inner)


def _wrong(place: str, allowed: str, told: Any) -> ValueError:
    return ValueError(f"{place or 'the whole'} must be {allowed}, got {reprlib.repr(told)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_load(value: Any) -> bool:
    match value:
        case {"concurrency": concurrency}:
            return _is_whole(concurrency) and concurrency > 0
        case {"rate": rate}:
            return _is_number(rate) and rate > 0
    return False


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


NUMBER = Value("a number, 0 or more", _is_number)
COUNT = Value("a whole number, 0 or more", _is_whole)
TEXT = Value("a text", lambda value: isinstance(value, str))
TRUTH = Value("true or false", lambda value: isinstance(value, bool))
LOAD = Value('{"concurrency": a whole number above 0} or {"rate": a number above 0}', _is_load)
SERVER_LOAD = Value("[running, waiting] or null", lambda value: value is None or _is_pair(value))
BUCKET = Value("[bucket, durations in it]", lambda value: _is_pair(value) and value[0] <= LAST_BUCKET)

HISTOGRAM: Form = {"count": COUNT, "max": NUMBER, "total": NUMBER, "buckets": [BUCKET]}
STEP: Form = {
    "load": LOAD,
    "ending": TEXT,
    "is_warm": TRUTH,
    "began_s": NUMBER,
    "windows": [{"seconds": NUMBER, "jobs": COUNT, "p50_s": NUMBER}],
    "seconds": NUMBER,
    "due": COUNT,
    "statuses": Each(COUNT),
    "result_s": HISTOGRAM,
    "first_frame_s": HISTOGRAM,
    "frame_gap_s": HISTOGRAM,
    "by_kind": Each(HISTOGRAM),
    "failed_s": Each(HISTOGRAM),
    "frames": COUNT,
    "frames_dropped": COUNT,
    "bytes_received": COUNT,
    "megapixel_iterations": NUMBER,
    "unfinished": COUNT,
    "oldest_unfinished_s": NUMBER,
    "late_s": NUMBER,
    "client_cpu": NUMBER,
    "server_before": SERVER_LOAD,
    "server_after": SERVER_LOAD,
    "timeline": [Each(COUNT)],
}
REPORT: Form = {
    "began": TEXT,
    "client": TEXT,
    "machine": TEXT,
    "server": {"version": TEXT, "device": TEXT, "precision": TEXT, "backbone": TEXT},  # as far as it is shown
    "settings": {},
    "steps": [STEP],
}
