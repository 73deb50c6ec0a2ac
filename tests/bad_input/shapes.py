"""Messages of the largest size in every shape that the proto allows, by rule from its descriptors.

For each field of each request, however deep: the field as many times as fit into a message, and, if it may be repeated,
once, at its limit and one above it; a text or bytes that fill a message; and fields that the proto does not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.engine.fake import FakeEngine
from tests.bad_input.inputs import JOB_ID, RECIPE, REQUESTS, job, overrides_to_message
from tests.bad_input.target import Case, Target, one, path_of
from tests.support.raw_http2 import prefixed

Path: TypeAlias = tuple[Any, ...]  # field descriptors, from the request down

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)  # wire types
DIGEST = "sha256:" + "0" * 64


def varint(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def submessage(number: int, content: bytes) -> bytes:
    return tag(number, LENGTH) + varint(len(content)) + content


def nested(path: Path, content: bytes) -> bytes:
    """``content`` as the last submessage of the path."""
    for field in reversed(path):
        content = submessage(field.number, content)
    return content


def paths(descriptor: Any, above: Path = ()) -> Iterator[Path]:
    """All fields of a message and of the messages in it."""
    for field in descriptor.fields:
        yield (*above, field)
        if field.message_type is not None:
            yield from paths(field.message_type, (*above, field))


def smallest(field: Any) -> bytes:
    """The shortest encoding of a field that is set."""
    if field.message_type is not None or field.type in (field.TYPE_STRING, field.TYPE_BYTES):
        return submessage(field.number, b"")
    if field.type == field.TYPE_DOUBLE:
        return tag(field.number, FIXED64) + bytes(8)
    if field.type == field.TYPE_FLOAT:
        return tag(field.number, FIXED32) + bytes(4)
    return tag(field.number, VARINT) + b"\1"


def sample(field: Any) -> bytes:
    """An encoding of a field with all fields of its message, as a client would set them."""
    if field.message_type is not None:
        return submessage(field.number, b"".join(sample(each) for each in field.message_type.fields))
    texts = {"layer": "relu1_1", "digest": DIGEST, "job_id": JOB_ID, "request_id": JOB_ID, "page_token": "7"}
    if field.type == field.TYPE_STRING:
        return submessage(field.number, texts.get(field.name, "x").encode())
    if field.type == field.TYPE_BYTES:
        return submessage(field.number, b"x")
    return smallest(field)


def limit_of(path: Path, limits: Limits) -> int:
    """How many items of a repeated field are allowed. A new repeated field needs its limit here."""
    return {"styles": limits.max_styles, "layers": len(FakeEngine.layers)}[path[-1].name]


def name_of(method: str, path: Path) -> str:
    return ".".join([method, *(field.name for field in path)])


def base(method: str, path: Path = ()) -> tuple[bytes, ...]:
    """The messages of a valid call; the last one is to be extended by the field of the path."""
    spec = job(seed=1)
    match method:
        case "Stylize":
            return (pb.StylizeRequest(spec=spec).SerializeToString(),)
        case "StylizeStream":
            return (pb.StylizeStreamRequest(spec=spec).SerializeToString(),)
        case "StylizeInteractive":
            command = path[0].name if path and path[0].name != "command_id" else "start"
            start = pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec))
            attach = pb.StylizeInteractiveRequest(attach=pb.AttachCommand(job_id=JOB_ID))
            if command in ("start", "attach"):
                return ((start if command == "start" else attach).SerializeToString(),)
            spec.recipe.CopyFrom(overrides_to_message({**RECIPE, "iterations": 300}))
            start.start.spec.CopyFrom(spec)
            last = pb.StylizeInteractiveRequest(command_id=1)
            getattr(last, command).SetInParent()
            return start.SerializeToString(), last.SerializeToString()
        case _:
            return (b"",)


def cases(limits: Limits) -> Iterator[Case]:
    """All shapes. Their bytes are made when they are sent."""
    for method, kind in REQUESTS.items():
        for path in paths(kind.DESCRIPTOR):
            yield from _repeated(method, path, limits)
            if path[-1].type in (path[-1].TYPE_STRING, path[-1].TYPE_BYTES):
                yield from _filled(method, path)
        for name, item in UNKNOWN.items():
            yield _case("unknown", f"{method} {name}", method, (), item)
        yield _oversized(method)


UNKNOWN = {
    "numbers": tag(15, VARINT) + b"\1",
    "texts": submessage(15, b""),
    "texts of a large number": submessage(2**28, b""),
    "open groups": tag(15, START_GROUP),
    "groups": tag(15, START_GROUP) + tag(15, END_GROUP),
}


def _repeated(method: str, path: Path, limits: Limits) -> Iterator[Case]:
    field, name = path[-1], name_of(method, path)
    if not field.is_repeated:
        yield _case("again", f"{name} as often as fits", method, path[:-1], smallest(field), path=path)
        return
    limit = limit_of(path, limits)
    for count in (1, limit, limit + 1):
        yield _case("repeated", f"{name} x {count}", method, path[:-1], sample(field), count, path=path)
    for what, item in (("empty", smallest(field)), ("full", sample(field))):
        yield _case("repeated", f"{name} {what} as often as fits", method, path[:-1], item, path=path)


def _filled(method: str, path: Path) -> Iterator[Case]:
    """A text, or bytes, that fill the message."""
    field, name = path[-1], name_of(method, path)
    fillings = {"letters": b"x", "snowmen": "\N{SNOWMAN}".encode(), "not UTF-8": b"\xff"}
    for what, letter in fillings.items() if field.type == field.TYPE_STRING else [("zeros", b"\0")]:

        async def play(target: Target, letter: bytes = letter) -> None:
            *first, last = base(method, path)
            room = target.limits.max_message_bytes - len(last) - 8 * len(path)
            text = submessage(field.number, letter * (room // len(letter)))
            await _send(target, method, [*first, last + nested(path[:-1], text)])

        yield Case("filled", f"{name} of {what}", play)


def _case(
    kind: str, name: str, method: str, above: Path, item: bytes, count: int | None = None, *, path: Path = ()
) -> Case:
    """A valid call whose last message has the item this many times more, by default as often as fits."""

    async def play(target: Target) -> None:
        *first, last = base(method, path or above)
        room = target.limits.max_message_bytes - len(last) - 8 * (len(above) + 1)
        items = item * (room // len(item) if count is None else count)
        await _send(target, method, [*first, last + nested(above, items)])

    return Case(kind, name, play)


def _oversized(method: str) -> Case:
    async def play(target: Target) -> None:
        message = bytes(target.limits.max_message_bytes + 1)
        async with target.connection() as raw:
            await target.call(raw, path_of(method), one(message), allowed=("RESOURCE_EXHAUSTED",))

    return Case("oversized", f"{method} one byte above the limit", play)


async def _send(target: Target, method: str, messages: list[bytes]) -> None:
    known = (message.replace(JOB_ID.encode(), target.job_id.encode()) for message in messages)
    async with target.connection() as raw:
        await target.call(raw, path_of(method), map(prefixed, known))
