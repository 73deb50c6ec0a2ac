"""Names of the last release, which still work in this one, each with a DeprecationWarning that names the new one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, cast

__all__ = ["CLASSES", "accepts_old_keywords", "of_old_name", "warn_of_old_name"]

KEYWORDS = {"timeout_s": "timeout", "patience_s": "patience", "retries": "max_retries"}

CLASSES = {
    "SyncGramophoneClient": "GramophoneClient",
    "SyncJobControl": "JobControl",
    "Cancelled": "CallCancelledError",
    "ConnectionFailed": "ConnectionFailedError",
    "DeadlineExceeded": "DeadlineExceededError",
    "DeadlineUnattainable": "DeadlineUnattainableError",
    "Diverged": "DivergedError",
    "Exhausted": "ExhaustedError",
    "ImageNotFound": "ImageNotFoundError",
    "InvalidRequest": "InvalidRequestError",
    "JobControlled": "JobControlledError",
    "JobEnded": "JobEndedError",
    "JobNotFound": "JobNotFoundError",
    "ListingDisabled": "ListingDisabledError",
    "MessageTooLarge": "MessageTooLargeError",
    "NotReady": "NotReadyError",
    "OutOfDeviceMemory": "OutOfDeviceMemoryError",
    "QueueFull": "QueueFullError",
    "RequestIdTaken": "RequestIdTakenError",
    "ServerFailed": "ServerFailedError",
    "ShuttingDown": "ShuttingDownError",
    "SlowReader": "SlowReaderError",
    "TooManyWatchers": "TooManyWatchersError",
}
# Files of frames that are between the caller and a warning.
BETWEEN = (os.path.dirname(__file__) + os.sep, os.path.dirname(asyncio.__file__) + os.sep, contextlib.__file__)

F = TypeVar("F", bound=Callable[..., Any])


def accepts_old_keywords(function: F) -> F:
    """Lets a function be called with the old names of its keyword arguments."""
    parameters = inspect.signature(function).parameters
    renamed = {old: new for old, new in KEYWORDS.items() if new in parameters}

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            if not renamed.keys().isdisjoint(kwargs):
                _rename(function.__name__, renamed, kwargs)
            return await function(*args, **kwargs)

        return cast(F, asynchronous)

    @functools.wraps(function)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        if not renamed.keys().isdisjoint(kwargs):
            _rename(function.__name__, renamed, kwargs)
        return function(*args, **kwargs)

    return cast(F, synchronous)


def _rename(name: str, renamed: dict[str, str], kwargs: dict[str, Any]) -> None:
    """Renames the old keywords among `kwargs`. Raises TypeError if the new one is there as well."""
    for old, new in renamed.items():
        if old not in kwargs:
            continue
        value = kwargs.pop(old)
        if new in kwargs:
            raise TypeError(f"{name}() got {old}={value!r} and {new}={kwargs[new]!r}; {old} is the old name of {new}")
        advice = f"{new}={value!r}"
        if old == "retries":
            value = 3 if value else 0
            advice = f"{new}={value}"
        kwargs[new] = value
        warn_of_old_name(f"{old}= is deprecated; write {advice}")


def of_old_name(module: str, name: str) -> Any:
    """What `name` was in `module` before, for the module's `__getattr__`. Raises AttributeError for other names."""
    value = getattr(sys.modules[module], CLASSES[name], None) if name in CLASSES else None
    if value is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn_of_old_name(f"{name} is deprecated; write {CLASSES[name]}")
    return value


def warn_of_old_name(message: str) -> None:
    """Warns at the line of the caller of this package."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DeprecationWarning, stacklevel=level)
