"""The exceptions of the Python client, from `gramophone_client.errors`, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from gramophone_client import errors
from gramophone_client.errors import GramophoneError

__all__ = ["exceptions_markdown"]


def exceptions_markdown() -> str:
    """The tree of the exceptions, then each with its docstring."""
    tree = [(depth, kind) for depth, kind in _tree(GramophoneError, 0) if hasattr(errors, kind.__name__)]
    names = "\n".join(f"{'    ' * depth}{kind.__name__}" for depth, kind in tree)
    entries = "\n".join(f".. autoexception:: {kind.__name__}\n   :show-inheritance:\n" for _, kind in tree)
    return f"```text\n{names}\n```\n\n```{{eval-rst}}\n.. currentmodule:: gramophone_client\n\n{entries}```\n"


def _tree(kind: type[GramophoneError], depth: int) -> Iterator[tuple[int, type[GramophoneError]]]:
    yield depth, kind
    for child in kind.__subclasses__():  # in the order of their definitions
        yield from _tree(child, depth + 1)
