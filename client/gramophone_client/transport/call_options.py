"""Checks what a caller sets for the client and its calls beside the job: metadata, seconds, retries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import grpc

from gramophone.options import MAX_INT32
from gramophone.recipe import Violation
from gramophone.values import MisfitError, number, shown, whole_number
from gramophone_client.errors import InvalidRequestError

__all__ = [
    "DEFAULT_MAX_RETRIES",
    "MAX_RETRIES",
    "Metadata",
    "checked_credentials",
    "checked_max_message_bytes",
    "checked_max_retries",
    "checked_metadata",
    "checked_seconds",
    "checked_target",
]

DEFAULT_MAX_RETRIES = 3
MAX_RETRIES = 4  # gRPC makes at most 5 attempts, whatever a service config says
MAX_SECONDS = 366 * 24 * 3600.0  # gRPC takes infinity, and times after about 292 years, for times in the past

Metadata = Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
"""What is sent with a call beside its request: a mapping, or pairs if a key has several values.

A key consists of the characters a-z, 0-9, "_", "-" and ".", and does not begin with "grpc-". Its value is a str of
printable ASCII characters; if the key ends in "-bin", it is bytes.
"""

# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. gRPC refuses other keys and values with an error that
# names neither, sends bytes as text, and drops spaces at both ends.
KEY = re.compile(r"[0-9a-z_.-]+")
TEXT = re.compile(r"([!-~]([ -~]*[!-~])?)?")
PRINTABLE = re.compile(r"[!-~]+")
WEB = re.compile(r"(https?|grpcs?)://", re.IGNORECASE)


def checked_metadata(metadata: Metadata | None) -> tuple[tuple[str, str | bytes], ...]:
    """The pairs of `metadata`. Raises `InvalidRequestError`, which names the key but never the value."""
    if metadata is None:
        return ()
    if isinstance(metadata, str | bytes) or not isinstance(metadata, Iterable):
        _refuse("metadata", f"must be a mapping or a sequence of pairs, got {type(metadata).__name__}")
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
    return tuple(_checked_pair(pair) for pair in pairs)


def _checked_pair(pair: tuple[str, str | bytes]) -> tuple[str, str | bytes]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        _refuse("metadata", f"must be a mapping or a sequence of pairs, got one of {type(pair).__name__}")
    key, value = pair
    name = f"metadata[{key!r}]"
    if not isinstance(key, str) or not KEY.fullmatch(key):
        lower = f"; write {key.lower()!r}" if isinstance(key, str) and KEY.fullmatch(key.lower()) else ""
        _refuse(name, f"the key must consist of the characters a-z, 0-9, '_', '-' and '.'{lower}")
    if key.startswith("grpc-"):
        _refuse(name, "keys that begin with 'grpc-' are gRPC's own")
    if key.endswith("-bin"):
        if not isinstance(value, bytes):
            _refuse(name, f"the value of a key that ends in '-bin' must be bytes, got {type(value).__name__}")
    elif not isinstance(value, str):
        _refuse(name, f"must be a str, got {type(value).__name__}; bytes need a key that ends in '-bin'")
    elif not TEXT.fullmatch(value):
        _refuse(name, "must consist of printable ASCII characters without spaces at the ends; others need a '-bin' key")
    return key, value


def checked_seconds(name: str, seconds: float, *, or_zero: bool = False) -> float:
    """The seconds. Raises `InvalidRequestError` unless they are a number above 0, `or_zero`, and at most a year."""
    try:
        exact = number(seconds)
    except MisfitError:
        exact = math.nan
    if not (0 < exact <= MAX_SECONDS or (or_zero and exact == 0)):
        least = "at least 0" if or_zero else "above 0"
        _refuse(name, f"must be a number of seconds, {least} and at most {MAX_SECONDS:.0f}, got {shown(seconds)}")
    return exact


def checked_max_retries(max_retries: Any) -> int:
    """The number of retries. Raises `InvalidRequestError` if gRPC does not make so many."""
    exact = _whole_number_or(-1, max_retries)
    if exact not in range(MAX_RETRIES + 1):
        limit = f"because gRPC makes at most {MAX_RETRIES + 1} attempts"
        _refuse("max_retries", f"must be 0 to {MAX_RETRIES}, {limit}, got {shown(max_retries)}")
    return exact


def checked_max_message_bytes(max_message_bytes: Any) -> int:
    """The size of a message. Raises `InvalidRequestError` unless gRPC can have it as a limit."""
    exact = _whole_number_or(0, max_message_bytes)
    if not 0 < exact <= MAX_INT32:
        _refuse("max_message_bytes", f"must be 1 to {MAX_INT32}, got {shown(max_message_bytes)}")
    return exact


def checked_target(target: Any) -> str:
    """The address. Raises `InvalidRequestError` for what gRPC cannot take for one: it would raise AttributeError, or
    call an address invalid that the caller has not written."""
    rule = 'must be an address, like "127.0.0.1:50051"'
    if not isinstance(target, str):
        _refuse("target", f"{rule}, got {shown(target)}")
    if scheme := WEB.match(target):
        _refuse("target", f"{rule}, got the URL {shown(target)}; write it without {scheme[0]!r}")
    if not PRINTABLE.fullmatch(target):
        _refuse("target", f"{rule}, of printable ASCII characters without spaces, got {shown(target)}")
    return target


def checked_credentials(credentials: Any) -> grpc.ChannelCredentials | None:
    """The credentials. Raises `InvalidRequestError` for other objects."""
    if credentials is not None and not isinstance(credentials, grpc.ChannelCredentials):
        _refuse("credentials", f"must be of grpc.ssl_channel_credentials, or None, got {shown(credentials)}")
    return credentials


def _whole_number_or(other: int, value: Any) -> int:
    try:
        return whole_number(value)
    except MisfitError:
        return other


def _refuse(name: str, rule: str) -> NoReturn:
    raise InvalidRequestError(f"{name}: {rule}", violations=(Violation(name, rule),))
