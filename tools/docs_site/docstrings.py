"""How autodoc reads this project's docstrings.

Names are in single backticks: `stream` becomes a link if the reference has it, else code. Examples are paragraphs of
code without a marker. Fields of values are described by comments, which autodoc does not read.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
import typing
from enum import Enum
from typing import Any, ForwardRef

from docutils import nodes  # type: ignore[import-untyped]
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from gramophone.recipe import Recipe
from gramophone_client.types.options import OPTIONS, JobOptions

__all__ = ["connect", "described_fields", "examples_marked", "field_comments", "linked", "written_signature"]

# Modules of values that a caller makes.
CONSTRUCTED = ("gramophone.recipe", "gramophone_client.types.options")


def connect(app: Sphinx) -> None:
    """Connects the handlers below."""
    app.connect("autodoc-process-signature", _on_signature)
    app.connect("autodoc-process-docstring", _on_docstring)
    app.connect("missing-reference", _on_missing_reference)


def _on_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Shows signatures as they are written, and hides how a value is made that only the client makes."""
    if inspect.isfunction(value):
        return written_signature(value)
    if what not in ("class", "exception") or signature is None:
        return None
    if name.endswith("GramophoneClient"):
        return written_signature(value.__init__)[0], None
    return None if value.__module__ in CONSTRUCTED and not issubclass(value, Enum) else ("", None)


def written_signature(function: Any) -> tuple[str, str | None]:
    """The parameters of a method, without the first, and its result, with the names of types as in its source.

    Neither wrappers nor a signature that is set at run time count. A default that is a dataclass has only the arguments
    that differ from its own defaults.
    """
    function = inspect.unwrap(function)
    plain = types.FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    plain.__defaults__, plain.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    plain.__annotations__ = function.__annotations__
    signature = inspect.signature(plain)
    shown = [
        parameter.replace(annotation=_Text(parameter.annotation), default=_default(parameter.default))
        if parameter.annotation is not parameter.empty
        else parameter
        for parameter in list(signature.parameters.values())[1:]
    ]
    returns = signature.return_annotation
    return str(inspect.Signature(shown)), None if returns is signature.empty else str(returns)


class _Text(str):
    """A text without quotes in the place of an annotation or a default."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _default(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    own = {field.name: field.default for field in dataclasses.fields(value)}
    return _Text(f"{type(value).__name__}({', '.join(f'{n}={v!r}' for n, v in given.items() if v != own[n])})")


def _on_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    if lines and lines[0].startswith("Create new instance of "):  # of a named tuple, by Python
        lines.clear()
        return
    if "Options:" in lines:  # for help(); here JobOptions has them
        del lines[lines.index("Options:") :]
    lines[:] = examples_marked(lines)
    if what != "class":
        return
    for field, (annotation, comment) in described_fields(value).items():
        kind = "value" if issubclass(value, Enum) else "type"
        lines += [f".. py:attribute:: {field}", f"   :{kind}: {annotation}", "", f"   {linked(comment)}", ""]


def examples_marked(lines: list[str]) -> list[str]:
    """The docstring in reStructuredText: examples are blocks of Python, and names in backticks are links or code."""
    marked: list[str] = []
    for paragraph in re.split(r"\n(?:[ ]*\n)+", "\n".join(lines)):
        plain = textwrap.dedent(paragraph)
        if _is_code(plain):
            marked += [".. code-block:: python", "", *(f"   {line}" for line in plain.split("\n"))]
        else:
            marked += linked(paragraph).split("\n")
        marked.append("")
    return marked


def _is_code(paragraph: str) -> bool:
    """Whether a paragraph is an example: statements of Python that call something."""
    try:
        statements = ast.parse(paragraph).body
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call) for statement in statements for node in ast.walk(statement))


def linked(text: str) -> str:
    """The text with its single backticks as roles: a link for a name, code for anything else."""

    def role(quoted: re.Match[str]) -> str:
        name = re.fullmatch(r"[A-Za-z_][\w.]*(?:\(\))?", quoted[1])
        # The escaped space ends the role where a letter follows: `Frame`s.
        return f":py:obj:`{quoted[1]}`\\ " if name else f"``{quoted[1]}``\\ "

    return re.sub(r"(?<![`:])`([^`]+)`(?!`)", role, text)


def described_fields(value: type) -> dict[str, tuple[str, str]]:
    """The fields of a dataclass, a named tuple or a typed dictionary, as {name: (annotation, comment)}, as written.

    Of an enum, the members with their values; of any other class, nothing.
    """
    if issubclass(value, Enum):
        comments = field_comments(value)
        return {name: (repr(member.value), comments[name]) for name, member in value.__members__.items()}
    if value is JobOptions:
        helped = {name: option.help for name, option in OPTIONS.items()}
        helped |= {field.name: field.metadata["help"] for field in dataclasses.fields(Recipe)}
        return {name: (_as_written(value.__annotations__[name]), _sentence(text)) for name, text in helped.items()}
    if not (dataclasses.is_dataclass(value) or typing.is_typeddict(value) or hasattr(value, "_fields")):
        return {}
    comments = field_comments(value)
    if value is Recipe:
        comments |= {field.name: _sentence(field.metadata["help"]) for field in dataclasses.fields(value)}
    annotations = inspect.get_annotations(value)
    return {name: (_as_written(annotations[name]), comment) for name, comment in comments.items()}


def _as_written(annotation: Any) -> str:
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else str(annotation)


def field_comments(value: type) -> dict[str, str]:
    """The own fields of a class, each with the comment at the end of its line or above it, as a sentence."""
    source = textwrap.dedent(inspect.getsource(value))
    comments = {
        token.start[0]: (token.string.lstrip("#: "), token.line[: token.start[1]].strip() == "")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement in body.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                above: list[str] = []
                line = statement.lineno - 1
                while line in comments and comments[line][1]:
                    above.insert(0, comments[line][0])
                    line -= 1
                behind = [comments[end][0] for end in [statement.end_lineno] if end in comments]
                found[name] = _sentence(" ".join([*above, *behind]))
    return found


def _sentence(comment: str) -> str:
    if not comment:
        return ""
    return comment[0].upper() + comment[1:] + ("" if comment.endswith(".") else ".")


def _on_missing_reference(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Resolves names as docstrings and annotations write them.

    A name of a module of the client is that of the package. What Python can import, what the client defines without
    exporting it, and in prose any name without a capital letter, is left as it is. Anything else is a wrong name, of
    which Sphinx then warns.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].removesuffix("()")
    name = target.rpartition(".")[2]
    python, is_prose = env.domains.python_domain, node["reftype"] == "obj"
    documented = [known for known in python.objects if known.rpartition(".")[2] == name]
    if not name[0].isupper():  # in prose, that of a method; a field would often be another class's
        documented = [known for known in documented if is_prose and python.objects[known].objtype == "method"]
    if len(documented) == 1:
        return python.resolve_xref(env, node.get("refdoc", ""), app.builder, "obj", documented[0], node, content)
    if _can_be_imported(target) or _is_defined(name) or (is_prose and not re.match(r"[A-Z]\w*[a-z]", name)):
        return content
    return None


def _can_be_imported(target: str) -> bool:
    """Whether a name is Python's own or one of another package, which the reference does not have."""
    if hasattr(builtins, target):
        return True
    module, _, name = target.rpartition(".")
    if not module or module.partition(".")[0].startswith("gramophone"):
        return False
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def _is_defined(name: str) -> bool:
    """Whether a module of this project has the name."""
    return any(hasattr(module, name) for key, module in list(sys.modules.items()) if key.startswith("gramophone"))
