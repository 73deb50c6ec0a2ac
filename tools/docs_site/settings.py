"""The reference of the server's limits and settings, from `gramophone_server.config`, as Markdown."""

from __future__ import annotations

import re
from dataclasses import Field, fields
from typing import Any

from gramophone_server.config import Limits, Settings, env_variable

__all__ = ["limits_markdown", "number", "prose", "settings_markdown", "size"]


def limits_markdown() -> str:
    """Every limit: flag, environment variable, default, range and meaning."""
    return "\n\n".join(_definition(field) for field in fields(Limits)) + "\n"


def settings_markdown() -> str:
    """The same for all other settings of the server."""
    limits = {field.name for field in fields(Limits)}
    return "\n\n".join(_definition(field) for field in fields(Settings) if field.name not in limits) + "\n"


def _definition(field: Field[Any]) -> str:
    default: Any = field.default
    flag = f"--{field.name.replace('_', '-')}"
    allowed, choices = field.metadata["range"], field.metadata["choices"]
    text = prose(field.metadata["help"])
    if allowed is not None:
        shown = size if field.name.endswith("_bytes") else number
        text += f" Default {shown(default)}, allowed {shown(allowed.low)} to {shown(allowed.high)}."
    elif isinstance(default, bool):
        text += " A switch: off unless it is given; as a variable 1 or 0."
    elif choices:
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}; default `{default}`."
    else:
        text += f" Default `{default}`." if default else " Empty by default."
    return f"`{flag}` · `{env_variable(field.name)}`\n: {text}"


def number(value: float) -> str:
    """A number as it can be typed: 67108864, 0.02, 1e+15."""
    return f"{value:.10g}" if value < 1e12 else f"{value:g}"


def size(value: int) -> str:
    """A number of bytes as it can be typed, and in MiB or GiB where it is a whole number of them: 67108864 (64 MiB)."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= unit and value % unit == 0:
            return f"{value} ({value // unit} {name})"
    return str(value)


def prose(text: str) -> str:
    """A help text as a sentence of Markdown: flags and names of fields are code."""
    text = re.sub(r"(?<![\w`-])(--[a-z][\w-]*|[a-z]+(?:_[a-z]+)+)", r"`\1`", text)
    return f"{text[:1].upper()}{text[1:]}."
