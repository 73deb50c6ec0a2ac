"""Requests that are wrong, from the descriptors of the contract: whatever field is added there is filled with nonsense here."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gramophone.v1 import style_transfer_pb2 as pb
from tests.bad_input import pictures

__all__ = ["METHODS", "Input", "bomb", "job", "nonsense"]

SERVICE = pb.DESCRIPTOR.services_by_name["StyleTransferService"]
METHODS = {method.name: method for method in SERVICE.methods}
MAKING = ("Stylize", "StylizeStream", "StylizeInteractive")  # a job
DEEPEST = 4  # messages in messages, of nonsense
NUMBERS = (0, 1, -1, 2, 16, 255, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1, 10**6)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-300, 5e-324, 1e30, -1e30, 1e300, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "x",
    "relu1_1",
    "relu9_9",
    "\0",
    "a" * 100_000,
    "\U0001f308" * 50,
    "../../etc/passwd",
    "%s%n",
    "sha256:" + "0" * 64,
)
TEXTS = (*TEXTS, "00000000-0000-0000-0000-000000000000", "\u202e", "\r\n\r\n", "nan", "-1")


class Input(NamedTuple):
    """What is sent: the bytes of one message, or of several in a stream."""

    name: str  # what is wrong
    method: str
    messages: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """As a file: the method's name and each message behind its length."""
        parts = (self.name.encode(), self.method.encode(), *self.messages)
        return b"".join(struct.pack(">I", len(part)) + part for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Input:
        """The input that `to_bytes` wrote."""
        parts, at = [], 0
        while at < len(data):
            (length,) = struct.unpack_from(">I", data, at)
            parts.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        name, method, *messages = parts
        return cls(name.decode(), method.decode(), tuple(messages))


def job(content: bytes | None = None, style: bytes | None = None, **fields: object) -> pb.JobSpec:
    """A small one that is right, but for what is given."""
    image = pictures.good()["png"]
    return pb.JobSpec(
        content=pb.ImageSource(data=image if content is None else content),
        styles=[pb.StyleSource(image=pb.ImageSource(data=image if style is None else style))],
        **{"recipe": pb.Recipe(size=32, iterations=3, smallest_size=0)} | fields,
    )


def bomb(name: str, picture: bytes) -> Input:
    """A job whose content is this picture, and which needs all of its pixels."""
    spec = job(picture, recipe=pb.Recipe(size=1024, iterations=1, smallest_size=0))
    return Input(name, "Stylize", (pb.StylizeRequest(spec=spec).SerializeToString(),))


def nonsense(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    """An input. ``checkpoint`` is one of the server's own, and so are the ids of jobs."""
    return chance.choices(
        (_bad_picture, _bad_fields, _bad_bytes, _bad_checkpoint, _bad_upload, _bad_commands, _bad_question),
        (40, 20, 20, 5, 5, 5, 5),
    )[0](chance, checkpoint, job_ids)


# Kinds of nonsense ----------------------------------------------------------------------------------------------------


def _bad_picture(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    name, picture = pictures.damaged(chance)
    where = chance.choice(("content", "style"))
    spec = job(**{where: picture})
    if chance.random() < 0.1:
        spec.recipe.start = pb.START_IMAGE
        spec.start_image.data = picture
    return _sent(f"{where}, {name}", chance.choice(MAKING), spec)


def _bad_fields(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    """Fields of a good job, or of none, with values at random."""
    spec = job() if chance.random() < 0.7 else pb.JobSpec()
    before = spec.SerializeToString()
    while spec.SerializeToString() == before:
        _fill(chance, spec, chance.choice((0.03, 0.1, 0.5)))
    return _sent("fields at random", chance.choice(MAKING), spec)


def _bad_bytes(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    """The bytes of a good message, damaged: cut off, flipped, fields twice, fields of no number, other wire types."""
    method = chance.choice(list(METHODS.values()))
    message = GetMessageClass(method.input_type)()
    if method.name in MAKING:
        message = _request(method.name, job())
    else:
        _fill(chance, message, 0.5)
    data = message.SerializeToString()
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        data = chance.choice(
            (
                data[:at],
                data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :],
                data + data,
                data * chance.choice((2, 50)),
                data + chance.randbytes(20),
                data[:at] + b"\x0b" * chance.choice((1, 90, 10_000)) + data[at:],  # groups in groups
                _tower(chance.choice((3, 90, 5000))) + data,
                data + b"\xf8\xff\xff\xff\x0f\x01",  # the largest field number
                data + b"\x00\x01",  # field number 0
                data + b"\x0a\xff\xff\xff\xff\x0f",  # 4 GiB follow, it says
                data + b"\x0a\x02\xc3\x28",  # no UTF-8
                data + b"\x0d\x01\x02",  # a fixed32, cut
            )
        )
    return Input(f"{method.name} with damaged bytes", method.name, (data,))


def _bad_checkpoint(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    data = bytearray(checkpoint)
    for _ in range(chance.choice((1, 1, 3, 30))):
        data[chance.randrange(min(chance.choice((40, 2000, 10**9)), len(data)))] = chance.randrange(256)
    cut = chance.choice((len(data), len(data), chance.randrange(len(data))))
    spec = job(recipe=None, resume=bytes(data[:cut]) + chance.choice((b"", b"", b"more")))
    return _sent("damaged checkpoint", "Stylize", spec)


def _bad_upload(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    name, picture = pictures.damaged(chance)
    pieces = chance.choice((1, 2, 7, 1000))
    step = max(1, len(picture) // pieces)
    chunks = [picture[at : at + step] for at in range(0, len(picture), step)]
    if chance.random() < 0.2:
        chunks = [b""] * chance.choice((0, 1, 2000))
    if chance.random() < 0.1:
        chunks = [bytes(2**20 + 1)]
    messages = tuple(pb.UploadImageRequest(chunk=chunk).SerializeToString() for chunk in chunks)
    return Input(f"upload in {len(chunks)} pieces, {name}", "UploadImage", messages)


def _bad_commands(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    """Commands at random, before a job is there, or behind its start; some are no commands."""
    messages = []
    if chance.random() < 0.8:
        messages.append(_request("StylizeInteractive", job()).SerializeToString())
    for _ in range(chance.choice((1, 3, 20, 200))):
        command = pb.StylizeInteractiveRequest()
        _fill(chance, command, 0.3)
        data = command.SerializeToString()
        if chance.random() < 0.05:
            data = data[: chance.randrange(len(data) + 1)] + b"\xff"
        messages.append(data)
    return Input("commands at random", "StylizeInteractive", tuple(messages))


def _bad_question(chance: random.Random, checkpoint: bytes, job_ids: list[str]) -> Input:
    method = chance.choice(("WatchJob", "GetJob", "CancelJob", "ListJobs", "GetServerInfo"))
    message = GetMessageClass(METHODS[method].input_type)()
    _fill(chance, message, 0.7)
    if hasattr(message, "job_id") and job_ids and chance.random() < 0.7:
        message.job_id = chance.choice(job_ids)
    return Input(f"{method} at random", method, (message.SerializeToString(),))


# Helpers of theirs ----------------------------------------------------------------------------------------------------


def _sent(name: str, method: str, spec: pb.JobSpec) -> Input:
    return Input(f"{method}: {name}", method, (_request(method, spec).SerializeToString(),))


def _request(method: str, spec: pb.JobSpec) -> Message:
    if method == "StylizeInteractive":
        return pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec))
    return GetMessageClass(METHODS[method].input_type)(spec=spec)


def _tower(height: int) -> bytes:
    """Messages in messages: field 1 in field 1, and so on."""
    data = b""
    for _ in range(height):
        data = b"\x0a" + _varint(len(data)) + data
    return data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def _fill(chance: random.Random, message: Message, part: float, depth: int = 0) -> None:
    """Sets a part of the fields, and of theirs, to values at random."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() >= part:
            continue
        if field.is_repeated:
            for _ in range(chance.choice((1, 2, 5, 30, 2000 if depth < 2 and chance.random() < 0.05 else 3))):
                if field.type == FieldDescriptor.TYPE_MESSAGE:
                    _fill(chance, getattr(message, field.name).add(), 0.5, depth + 1)
                else:
                    getattr(message, field.name).append(_value(chance, field))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if depth < DEEPEST:
                _fill(chance, inner, part, depth + 1)
        else:
            setattr(message, field.name, _value(chance, field))


def _value(chance: random.Random, field: FieldDescriptor) -> object:
    kinds = FieldDescriptor
    match field.cpp_type:
        case kinds.CPPTYPE_DOUBLE | kinds.CPPTYPE_FLOAT:
            return chance.choice((*FLOATS, chance.uniform(-10, 10)))
        case kinds.CPPTYPE_BOOL:
            return chance.random() < 0.5
        case kinds.CPPTYPE_ENUM:
            return chance.choice((*range(8), 99, -1, 2**31 - 1, -(2**31)))
        case kinds.CPPTYPE_STRING if field.type == kinds.TYPE_BYTES:
            return chance.choice((b"", chance.randbytes(30), pictures.damaged(chance)[1], bytes(10_000)))
        case kinds.CPPTYPE_STRING:
            return chance.choice(TEXTS)
        case kinds.CPPTYPE_UINT32:
            return chance.choice(NUMBERS) % 2**32
        case kinds.CPPTYPE_UINT64:
            return chance.choice(NUMBERS) % 2**64
        case kinds.CPPTYPE_INT32:
            return (chance.choice(NUMBERS) + 2**31) % 2**32 - 2**31
        case _:
            return (chance.choice(NUMBERS) + 2**63) % 2**64 - 2**63
