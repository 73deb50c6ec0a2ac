"""Names of the last release, which still work in this one, each with a DeprecationWarning that names the new one."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["accepts_old_keywords"]

KEYWORDS = {"timeout_s": "timeout", "patience_s": "patience", "retries": "max_retries"}

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
        warnings.warn(f"{old}= is deprecated; write {advice}", DeprecationWarning, stacklevel=3)
