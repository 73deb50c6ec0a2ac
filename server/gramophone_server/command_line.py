"""The command line and the environment of `gramophone-server`: `--max-size 1024` is `GRAMOPHONE_MAX_SIZE=1024`.

The flag takes precedence. The settings themselves are in `config`. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from gramophone.recipe import Range
from gramophone.values import did_you_mean
from gramophone_server import memory_bound
from gramophone_server.config import Limits, Settings, env_variable, version
from gramophone_server.errors import StartupError

__all__ = ["from_command_line", "load"]

MAX_GRPC_BYTES = 2**31 - 1  # of a message: gRPC keeps the limit in a C int


def from_command_line() -> Settings:
    """The settings of this process. Ends it for `--help`, `--version` and `--print-config`, and with exit code 2 and a
    sentence on standard error for an invalid setting."""
    try:
        settings, print_only = load(sys.argv[1:], os.environ)
    except StartupError as error:
        print(f"gramophone-server: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if print_only:
        for f in fields(settings):
            print(f"{env_variable(f.name)}={getattr(settings, f.name)}")
        for line in memory_bound.comments(settings):
            print(line)
        raise SystemExit(0)
    return settings


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Settings, bool]:
    """Reads the settings from flags, then environment, then defaults; and whether `--print-config` is among the flags.

    argparse ends the process for `--help`, `--version` and a flag without its value. Raises `StartupError` with a
    sentence for each unknown flag and each value that is not allowed.
    """
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        raise StartupError("; ".join(_unknown(word) for word in unknown))
    flags = vars(parsed)
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for f in fields(Settings):
        text = flags[f.name] if flags[f.name] is not None else environment.get(env_variable(f.name))
        if text is None or text == f.default == "":
            continue
        try:
            values[f.name] = _value(text, type(f.default), f.metadata["range"], f.metadata["choices"])
        except ValueError as error:
            source = _flag(f.name) if flags[f.name] is not None else env_variable(f.name)
            wrong.append(f"{source} must be {error}, got {text!r}")
    if wrong:
        raise StartupError("; ".join(wrong))
    settings = Settings(**values)
    if settings.iter_ms != Settings.iter_ms and settings.engine != "fake":
        raise StartupError("--iter-ms is only for --engine fake; a network runs at its own speed")
    _check_responses(settings)
    _check_room_for_uploads(settings)
    _check_room_to_receive(settings)
    return settings, flags["print_config"]


def _check_responses(limits: Limits) -> None:
    """Raises `StartupError` if gRPC could not send a result or a checkpoint."""
    if limits.response_bytes > MAX_GRPC_BYTES:
        parts = (f"{_flag(name)} (now {getattr(limits, name)})" for name in ("max_size", "max_checkpoint_bytes"))
        raise StartupError(
            f"a result could have {limits.response_bytes} bytes, and a gRPC message has at most {MAX_GRPC_BYTES}; "
            f"lower {' or '.join(parts)}"
        )


def _check_room_to_receive(limits: Limits) -> None:
    """Raises `StartupError` if the largest upload could never arrive: its bytes are kept while the next ones arrive."""
    largest = min(max(limits.max_image_bytes, limits.max_checkpoint_bytes), limits.max_uploads_bytes)
    needed = largest + limits.max_message_bytes
    if needed > limits.max_receiving_bytes:
        raise StartupError(
            f"{_flag('max_receiving_bytes')} must be at least {needed}, for the largest upload and one message more, "
            f"got {limits.max_receiving_bytes}; raise it, or lower {_flag('max_image_bytes')}, "
            f"{_flag('max_checkpoint_bytes')} or {_flag('max_message_bytes')}"
        )


def _check_room_for_uploads(limits: Limits) -> None:
    """Raises `StartupError` if images and checkpoints are allowed that could not be uploaded."""
    for name in ("max_image_bytes", "max_checkpoint_bytes"):
        if 0 < limits.max_uploads_bytes < getattr(limits, name):
            raise StartupError(
                f"uploads could not hold what {_flag(name)} (now {getattr(limits, name)}) allows; raise "
                f"{_flag('max_uploads_bytes')} (now {limits.max_uploads_bytes}) to at least that, lower {_flag(name)}, "
                f"or set {_flag('max_uploads_bytes')} to 0, so that clients send only what fits in a message"
            )


def _value(text: str, kind: type, allowed: Range | None, choices: Sequence[str]) -> Any:
    """The value of a setting. Raises ValueError with what the text must be."""
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError("1 or 0")
    if choices and text not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    if kind is str:
        if not text:
            raise ValueError("a non-empty string")
        return text
    assert allowed is not None, "every number has a range"
    must = f"{'a whole number' if kind is int else 'a number'} from {allowed.low:.10g} to {allowed.high:.10g}"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(must) from None
    if not allowed.low <= value <= allowed.high:  # false for NaN too
        raise ValueError(must)
    return value


def _unknown(word: str) -> str:
    """A sentence about a word of the command line that is neither a flag nor the value of one."""
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"{word!r} does not belong to any flag; settings are given as --flag VALUE"
    flags = ["--help", "--version", "--print-config", *(_flag(f.name) for f in fields(Settings))]
    return f"there is no flag {flag}" + (did_you_mean(flag, flags, {}) or "; --help lists all flags")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gramophone-server",
        description="Neural style transfer over gRPC.",
        allow_abbrev=False,  # an abbreviation could change its meaning when a setting is added
        epilog="Every flag is also an environment variable, --max-size is GRAMOPHONE_MAX_SIZE. Flags take precedence.",
    )
    parser.add_argument("--version", action="version", version=f"gramophone-server {version()}")
    parser.add_argument("--print-config", action="store_true", help="print the values of all settings and exit")
    limits = parser.add_argument_group("limits")
    for f in fields(Settings):
        group = limits if f.name in Limits.__dataclass_fields__ else parser
        allowed, choices = f.metadata["range"], f.metadata["choices"]
        if isinstance(f.default, bool):
            group.add_argument(_flag(f.name), action="store_const", const="1", help=f.metadata["help"])
            continue
        default = f"{f.default:.10g}" if allowed else f.default
        between = f"{allowed.low:.10g} to {allowed.high:.10g}, " if allowed else ""
        group.add_argument(
            _flag(f.name),
            metavar="|".join(choices) or ("SECONDS" if f.name.endswith("_s") else "N" if allowed else "TEXT"),
            help=f"{f.metadata['help']} ({between}default {default})",
        )
    return parser
