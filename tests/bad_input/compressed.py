"""Compressed messages in every form, to every method, also those of the health and the reflection service.

Only `valid` forms may be accepted: they are answered as the same message is without compression.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from gramophone_server.config import Limits
from tests.bad_input.inputs import REQUESTS
from tests.bad_input.shapes import base
from tests.bad_input.target import HEALTH_CHECK, HEALTH_WATCH, REFLECTION, Case, Target, path_of
from tests.support.raw_http2 import Headers, prefixed

MIB = 2**20
BOMB_FACTOR = 100  # times the largest message
GZIP, DEFLATE = [("grpc-encoding", "gzip")], [("grpc-encoding", "deflate")]
CRC_AND_SIZE = 8  # bytes at the end of a gzip member

Form = Callable[[bytes, Limits], bytes]


@cache
def member_of_zeros(size: int) -> bytes:
    """A gzip file of zeros, a thousandth of their size."""
    packer = zlib.compressobj(6, wbits=31)
    parts = [packer.compress(bytes(min(MIB, size - at))) for at in range(0, size, MIB)]
    return b"".join(parts) + packer.flush()


def _flags(bits: int, extra: bytes, message: bytes) -> bytes:
    """A gzip file whose header has these optional parts."""
    packed = gzip.compress(message, mtime=0)
    return packed[:3] + bytes([bits]) + packed[4:10] + extra + packed[10:]


def _stored_blocks(message: bytes, limits: Limits) -> bytes:
    """A gzip file of a largest message's size that consists of empty blocks."""
    head, empty = gzip.compress(b"", mtime=0)[:10], b"\0\0\0\xff\xff"
    count = (limits.max_message_bytes - len(message) - 100) // len(empty)
    body = empty * count + b"\1" + struct.pack("<HH", len(message), len(message) ^ 0xFFFF) + message
    return head + body + struct.pack("<II", zlib.crc32(message), len(message))


VALID: Mapping[str, Form] = {
    "valid": lambda message, _: gzip.compress(message),
    "valid, stored": lambda message, _: gzip.compress(message, 0),
    "valid, with a name": lambda message, _: _flags(8, b"x\0", message),
    "valid, of two members": lambda message, _: gzip.compress(message[:9]) + gzip.compress(message[9:]),
}
INVALID: Mapping[str, Form] = {
    "cut in its header": lambda message, _: gzip.compress(message)[:7],
    "cut in its middle": lambda message, _: gzip.compress(message + bytes(99))[: -CRC_AND_SIZE - 3],
    "cut before its checksum": lambda message, _: gzip.compress(message)[:-CRC_AND_SIZE],
    "with a wrong checksum": lambda message, _: gzip.compress(message)[:-CRC_AND_SIZE] + bytes(CRC_AND_SIZE),
    "with bytes behind it": lambda message, _: gzip.compress(message) + b"x" * 99,
    "of gzip": lambda message, _: gzip.compress(gzip.compress(message)),
    "that is none": lambda message, _: message or b"x",
    "that is empty": lambda message, _: b"",
    "of one byte above the limit": lambda _, limits: member_of_zeros(limits.max_message_bytes + 1),
    "bomb": lambda _, limits: member_of_zeros(BOMB_FACTOR * limits.max_message_bytes),
    "bomb of gzip": lambda _, limits: gzip.compress(member_of_zeros(BOMB_FACTOR * limits.max_message_bytes)),
    "bomb of members": lambda _, limits: member_of_zeros(limits.max_message_bytes) * BOMB_FACTOR,
    "of empty members": lambda _, limits: (
        gzip.compress(b"", mtime=0) * (limits.max_message_bytes // len(gzip.compress(b"")))
    ),
    "of empty blocks": _stored_blocks,
    "with an endless name": lambda message, limits: _flags(
        8, b"x" * (limits.max_message_bytes - 2 * len(message) - 200) + b"\0", message
    ),
    "of empty styles": lambda _, limits: gzip.compress(
        b"\x0a" + _length(limits.max_message_bytes - 8) + b"\x12\0" * (limits.max_message_bytes // 2 - 4), 1
    ),
}
FORMS = VALID | INVALID
# Headers and flags of a message that say other things than its bytes.
WRONG: Mapping[str, tuple[Headers, Callable[[bytes], bytes]]] = {
    "deflate": (DEFLATE, lambda message: prefixed(zlib.compress(message), compressed=True)),
    "an unknown encoding": ([("grpc-encoding", "br")], lambda message: prefixed(message, compressed=True)),
    "no encoding, but the flag": ((), lambda message: prefixed(gzip.compress(message), compressed=True)),
    "identity, but the flag": (
        [("grpc-encoding", "identity")],
        lambda message: prefixed(gzip.compress(message), compressed=True),
    ),
    "gzip, but no flag": (GZIP, lambda message: prefixed(gzip.compress(message))),
    "the flag 2": (GZIP, lambda message: b"\2" + prefixed(gzip.compress(message))[1:]),
    "the flag 255": (GZIP, lambda message: b"\xff" + prefixed(gzip.compress(message))[1:]),
    "two encodings": ([*GZIP, *GZIP], lambda message: prefixed(gzip.compress(message), compressed=True)),
}


def _length(size: int) -> bytes:
    return bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])


def methods() -> dict[str, tuple[bytes, ...]]:
    """The messages of a valid call, by path, of all methods that read a message."""
    result = {path_of(method): base(method) for method in REQUESTS}
    result[HEALTH_CHECK] = result[HEALTH_WATCH] = (health_pb2.HealthCheckRequest().SerializeToString(),)
    result[REFLECTION] = (reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString(),)
    return result


def cases(limits: Limits) -> Iterator[Case]:
    """Every form, to every method."""
    for path in methods():
        name = path.rpartition("/")[2]
        for form in FORMS:
            yield _form_case(name, path, form)
        for wrong in WRONG:
            yield _wrong_case(name, path, wrong)


def _form_case(name: str, path: str, form: str) -> Case:
    async def play(target: Target) -> None:
        last = FORMS[form](methods()[path][-1], target.limits)
        if len(last) > target.limits.max_message_bytes:
            last = last[: target.limits.max_message_bytes]
        await _send(target, path, GZIP, prefixed(last, compressed=True))

    return Case("compressed", f"{name} gzip {form}", play, within_s=30)


def _wrong_case(name: str, path: str, wrong: str) -> Case:
    async def play(target: Target) -> None:
        headers, pack = WRONG[wrong]
        await _send(target, path, headers, pack(methods()[path][-1]))

    return Case("compressed", f"{name} with {wrong}", play)


async def _send(target: Target, path: str, headers: Headers, message: bytes) -> None:
    """Sends the message and ends the stream. A watch of the health service does not end by itself."""
    async with target.connection() as raw:
        if path == HEALTH_WATCH:
            stream = raw.open_stream(path, headers)
            await stream.send(message, end=True)
            await stream.wait_for_data(5, within_s=10)
            if stream.is_over:
                target.check(await stream.answer(within_s=1))
            return
        await target.call(raw, path, [message], headers=headers)
