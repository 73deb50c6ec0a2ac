"""The reference of the proto: its services, messages and enums with their comments, as Markdown."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc  # type: ignore[import-untyped]

__all__ = ["Proto", "load", "messages", "rpcs"]

FOLDER = Path(__file__).parents[2] / "proto"
NAME = "gramophone/v1/style_transfer.proto"
# Field numbers of FileDescriptorProto and of what is in it: the parts of a location's path.
MESSAGE, ENUM, SERVICE, METHOD, FIELD, VALUE = 4, 5, 6, 2, 2, 2
TYPES = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}  # "double", "bytes", ...


class Proto:
    """A parsed proto file and its comments."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self._comments = {
            tuple(location.path): (location.leading_comments + location.trailing_comments).strip()
            for location in file.source_code_info.location
        }
        self.types = {item.name for item in file.message_type} | {item.name for item in file.enum_type}
        self._rpcs = {method.name for service in file.service for method in service.method}
        self._owners = {value.name: enum.name for enum in file.enum_type for value in enum.value}

    def comment(self, *path: int) -> str:
        """The comment of what is at a path, as Markdown; "" if it has none."""
        paragraphs = re.split(r"\n\s*\n", self._comments.get(path, ""))
        return "\n\n".join(self._markdown(" ".join(paragraph.split()), self._name(path)) for paragraph in paragraphs)

    def _name(self, path: tuple[int, ...]) -> str:
        """The name of the message, enum or service that a path leads into."""
        names = {
            MESSAGE: [message.name for message in self.file.message_type],
            ENUM: [enum.name for enum in self.file.enum_type],
            SERVICE: [service.name for service in self.file.service],
        }
        return names[path[0]][path[1]]

    def _markdown(self, text: str, at: str) -> str:
        """Links names of types, RPCs and enum values, except to where they are, marks other names as code, and escapes
        the rest."""
        parts = re.split(r"(`[^`]*`|https?://[^\s)]+|\b[A-Za-z]\w*(?:\.[a-z]\w*)?)", text)
        return "".join(self._part(part, at) for part in parts)

    def _part(self, part: str, at: str) -> str:
        if part.startswith("`"):
            return part
        if part.startswith("http"):
            return f"<{part}>"
        owner, _, field = part.partition(".")
        if part in self._owners:
            return link(part, self._owners[part]) if at != self._owners[part] else f"`{part}`"
        # A word such as Result or Job is a type only in code; one with two capitals or a field is no English word.
        if owner in self.types and (field or re.search(r"[a-z][A-Z]", owner)):
            return link(part, owner) if at != owner else f"`{part}`"
        if part in self._rpcs and re.search(r"[a-z][A-Z]", part):
            return link(part, f"{part}-rpc")
        if re.fullmatch(r"[A-Z]+_[A-Z_]+|[a-z]+(_[a-z0-9]+)+|[A-Z]\w+\.[a-z]\w+", part):
            return f"`{part}`"
        return re.sub(r"([\\*_<>\[\]#|~^$])", r"\\\1", part)


def link(text: str, owner: str) -> str:
    """A link to the definition of a type of the proto."""
    return f"[`{text}`](#{label(owner)})"


def label(name: str) -> str:
    """The label of a type or an RPC on its page."""
    return f"proto-{name.lower()}"


def load() -> Proto:
    """Compiles the proto of this checkout, with its comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptor"
        well_known = Path(protoc.__file__).parent / "_proto"
        arguments = ["protoc", f"-I{FOLDER}", f"-I{well_known}", "--include_source_info", f"-o{out}", NAME]
        if protoc.main(arguments):
            raise RuntimeError(f"protoc cannot compile {NAME}")
        (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    return Proto(file)


def rpcs(proto: Proto) -> str:
    """The service and its RPCs."""
    return "\n\n".join(_rpcs(proto)) + "\n"


def _rpcs(proto: Proto) -> Iterator[str]:
    for i, service in enumerate(proto.file.service):
        yield f"The service is `{proto.file.package}.{service.name}`."
        yield proto.comment(SERVICE, i)
        for j, method in enumerate(service.method):
            request = f"{'stream ' if method.client_streaming else ''}{_name(method.input_type)}"
            response = f"{'stream ' if method.server_streaming else ''}{_name(method.output_type)}"
            yield f"({label(method.name + '-rpc')})=\n## {method.name}"
            yield f"```proto\nrpc {method.name}({request}) returns ({response})\n```"
            yield proto.comment(SERVICE, i, METHOD, j)
            types = (_name(method.input_type), _name(method.output_type))
            yield f"Messages: {link(types[0], types[0])}, {link(types[1], types[1])}."


def messages(proto: Proto) -> str:
    """All messages, then all enums, in the order of the file."""
    parts = ["## Messages"]
    for i, message in enumerate(proto.file.message_type):
        parts += _message(proto, i, message)
    parts.append("## Enums")
    for i, enum in enumerate(proto.file.enum_type):
        parts += _enum(proto, i, enum)
    return "\n\n".join(parts) + "\n"


def _message(proto: Proto, index: int, message: DescriptorProto) -> Iterable[str]:
    yield f"({label(message.name)})=\n### {message.name}"
    yield proto.comment(MESSAGE, index)
    for j, field in enumerate(message.field):
        choice = ""
        if field.HasField("oneof_index") and not field.proto3_optional:
            choice = f" · one of `{message.oneof_decl[field.oneof_index].name}`"
        yield _definition(
            f"`{field.name}` · {_type(proto, field)} · {field.number}{choice}", proto.comment(MESSAGE, index, FIELD, j)
        )


def _type(proto: Proto, field: FieldDescriptorProto) -> str:
    name = _name(field.type_name) if field.type_name else TYPES[field.type]
    text = link(name, name) if name in proto.types else f"`{field.type_name.lstrip('.') or name}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {text}"
    return f"optional {text}" if field.proto3_optional else text


def _enum(proto: Proto, index: int, enum: EnumDescriptorProto) -> Iterable[str]:
    yield f"({label(enum.name)})=\n### {enum.name}"
    yield proto.comment(ENUM, index)
    for j, value in enumerate(enum.value):
        yield _definition(f"`{value.name}` · {value.number}", proto.comment(ENUM, index, VALUE, j))


def _definition(term: str, text: str) -> str:
    """A term of a definition list; its name says all if it has no text."""
    return f"{term}\n: {text or '<!-- -->'}".replace("\n\n", "\n\n  ")


def _name(type_name: str) -> str:
    """The short name of a type: ".gramophone.v1.JobSpec" -> "JobSpec"."""
    return type_name.rpartition(".")[2]
