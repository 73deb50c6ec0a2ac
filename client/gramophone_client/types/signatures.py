"""Signatures and docstrings of methods that take the options of a job as `**job: Unpack[JobOptions]`.

Type checkers and editors expand these by themselves, but `help()`, `inspect` and a notebook's Shift-Tab do not.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, ForwardRef, TypeVar, get_args

from gramophone.recipe import FIELD_TYPES, PRESETS, field_help
from gramophone_client.types.options import OPTIONS, JobOptions

__all__ = ["shows_options"]

DOC_WIDTH = 100  # characters

F = TypeVar("F", bound=Callable[..., Any])


class _Text(str):
    """A text that `help()` shows without quotes: an annotation as it is written, or what stands for a default."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class _Signature(inspect.Signature):
    """A signature of many parameters, which `help()` shows on a line each."""

    def __str__(self) -> str:
        shown = [str(parameter) for parameter in self.parameters.values()]
        kinds = [parameter.kind for parameter in self.parameters.values()]
        if inspect.Parameter.KEYWORD_ONLY in kinds:
            shown.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        returned = (
            "" if self.return_annotation is self.empty else f" -> {inspect.formatannotation(self.return_annotation)}"
        )
        return "".join(["(\n", *(f"    {line},\n" for line in shown), ")", returned])


OF_THE_PRESET = _Text("<of the preset>")
UNCHANGED = _Text("<unchanged>")


def shows_options(function: F) -> F:
    """Replaces `**name: Unpack[SomeTypedDict]` by its keys, as keyword-only parameters with annotations and defaults.

    This changes only what `inspect.signature` returns, and adds a line for each option to the docstring. For
    `JobOptions` and for typed dictionaries of a recipe's fields.
    """
    signature = inspect.signature(function)
    *parameters, packed = signature.parameters.values()
    if packed.kind is not packed.VAR_KEYWORD:
        raise TypeError(f"{function.__name__} has no **{packed.name}: Unpack[...] as its last parameter")
    options = _typed_dict(packed.annotation, inspect.unwrap(function).__globals__)
    names = sorted(options.__annotations__, key=lambda name: name not in OPTIONS)  # the order is else kept
    parameters = [parameter.replace(annotation=_text(parameter.annotation)) for parameter in parameters]
    parameters += [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(name) if options is JobOptions else UNCHANGED,
            annotation=_text(options.__annotations__[name]),
        )
        for name in names
    ]
    shown = _Signature(parameters, return_annotation=_text(signature.return_annotation))
    function.__signature__ = shown  # type: ignore[attr-defined]
    if function.__doc__:
        lines = (_line(name) for name in names)
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__), "", "Options:", "", *lines])
    return function


def _typed_dict(annotation: Any, names: dict[str, Any]) -> Any:
    """The typed dictionary of `Unpack[...]`, which may be a text."""
    (options,) = get_args(eval(annotation, names) if isinstance(annotation, str) else annotation)
    return options


def _text(annotation: Any) -> Any:
    if isinstance(annotation, ForwardRef):
        return _Text(annotation.__forward_arg__)
    return _Text(annotation) if isinstance(annotation, str) else annotation


def _default(name: str) -> Any:
    if name in OPTIONS:
        return OPTIONS[name].default
    values = [getattr(recipe, name) for recipe in PRESETS.values()]
    if values.count(values[0]) < len(values):
        return OF_THE_PRESET
    if name.endswith("_layers"):
        return dict(values[0])
    return str(values[0]) if isinstance(values[0], str) else values[0]


def _line(name: str) -> str:
    text = field_help(name) if name in FIELD_TYPES else f"{OPTIONS[name].help} (default {OPTIONS[name].default})"
    return textwrap.fill(f"- `{name}`: {text}", DOC_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
