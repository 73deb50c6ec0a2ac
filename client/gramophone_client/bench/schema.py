"""The schema of a report's JSON file, so that an invalid file fails with a clear message and not inside a chart."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["REPORT", "Value", "check"]

MAX_FIGURE = 1e15  # limit of all numbers; charts and rates can handle anything below
LAST_BUCKET = 8191  # of a histogram; its durations are about 300,000 years


@dataclass(frozen=True)
class Value:
    """A single value."""

    allowed: str  # description of the allowed values, for error messages
    is_allowed: Callable[[Any], bool]


@dataclass(frozen=True)
class MapOf:
    """An object with arbitrary keys."""

    value: Schema  # of each of its values


# A mapping is the schema of an object, which may have additional keys; a list holds the schema of the list's items.
Schema = Value | MapOf | Mapping[str, "Schema"] | list["Schema"]


def check(data: Any, schema: Schema, path: str = "") -> None:
    """Raises ValueError if `data` does not match the schema; the message has the path and the allowed values."""
    match schema:
        case Value(allowed, is_allowed):
            if not is_allowed(data):
                raise _mismatch(path, allowed, data)
        case list():
            if not isinstance(data, list):
                raise _mismatch(path, "a list", data)
            for i, item in enumerate(data):
                check(item, schema[0], f"{path}[{i}]")
        case _:
            if not isinstance(data, dict):
                raise _mismatch(path, "an object", data)
            schemas = dict.fromkeys(data, schema.value) if isinstance(schema, MapOf) else schema
            for key, inner_schema in schemas.items():
                inner_path = f"{path}.{key}" if path else key
                if key not in data:
                    raise ValueError(f"{inner_path} is missing")
                check(data[key], inner_schema, inner_path)


def _mismatch(path: str, allowed: str, data: Any) -> ValueError:
    return ValueError(f"{path or 'the file'} must be {allowed}, got {reprlib.repr(data)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_FIGURE


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
TEXT = Value("a string", lambda value: isinstance(value, str))
BOOLEAN = Value("true or false", lambda value: isinstance(value, bool))
LOAD = Value('{"concurrency": a whole number above 0} or {"rate": a number above 0}', _is_load)
SERVER_LOAD = Value("[running, waiting] or null", lambda value: value is None or _is_pair(value))
BUCKET = Value("[bucket, count]", lambda value: _is_pair(value) and value[0] <= LAST_BUCKET)

HISTOGRAM: Schema = {"count": COUNT, "max": NUMBER, "total": NUMBER, "buckets": [BUCKET]}
STEP: Schema = {
    "load": LOAD,
    "ending": TEXT,
    "is_warm": BOOLEAN,
    "began_s": NUMBER,
    "windows": [{"seconds": NUMBER, "jobs": COUNT, "p50_s": NUMBER}],
    "seconds": NUMBER,
    "due": COUNT,
    "statuses": MapOf(COUNT),
    "result_s": HISTOGRAM,
    "first_frame_s": HISTOGRAM,
    "frame_gap_s": HISTOGRAM,
    "by_kind": MapOf(HISTOGRAM),
    "failed_s": MapOf(HISTOGRAM),
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
    "timeline": [MapOf(COUNT)],
}
REPORT: Schema = {
    "began": TEXT,
    "client": TEXT,
    "machine": TEXT,
    "server": {"version": TEXT, "device": TEXT, "precision": TEXT, "backbone": TEXT},  # the keys that are displayed
    "settings": {},
    "steps": [STEP],
}
