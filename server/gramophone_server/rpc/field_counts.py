"""Counts the fields of a message in its bytes, before protobuf makes an object of each.

A message of 4 MB can have two million fields. Parsing them takes 1.2 GB and blocks the interpreter for 4 s; here, the
count stops at the first field that is too many, after a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from gramophone.recipe import Violation

__all__ = ["MAX_FIELDS", "MAX_REPEATED", "MAX_STRING_BYTES", "check_fields"]

# A request with every field set, 16 styles and 16 layers of both kinds has 150 fields.
MAX_FIELDS = 2000
MAX_REPEATED = 100  # of one field; `validation` has the limits of each, which are lower
MAX_STRING_BYTES = 2**16  # a digest has 71, the name of a layer 7; `validation` refuses less with better words
MAX_DEPTH = 100  # of messages and groups; protobuf's own limit

VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)  # wire types


class _Malformed(Exception):
    """The bytes are no message. Protobuf will find that at the same place."""


class _TooMany(Exception):
    """A limit is exceeded by the field at this path."""

    def __init__(self, path: str, description: str) -> None:
        self.violation = Violation(path, description)


def check_fields(data: bytes, kind: type[Message]) -> Iterator[Violation]:
    """A violation if a message of this type has too many fields, or too long a string, with the path of the field that
    was one too many. Bytes that are no message have none: they are left to protobuf."""
    walk = _Walk(data)
    try:
        walk.message(kind.DESCRIPTOR, len(data), "", 0)
    except _TooMany as error:
        yield error.violation
    except _Malformed:
        return


class _Walk:
    """One pass over the bytes of a message, in the order in which protobuf parses them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._fields = 0

    def message(self, descriptor: Any, end: int, path: str, depth: int, group: int = 0) -> None:
        """Counts the fields up to ``end``, or up to the end of the group of this number. ``descriptor`` is that of the
        message, None in a field that is not known."""
        if depth > MAX_DEPTH:
            raise _Malformed
        counts: dict[int, int] = {}
        by_number = {} if descriptor is None else descriptor.fields_by_number
        while self._at < end:
            tag = self._varint(end)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == END_GROUP:
                if number != group:
                    raise _Malformed
                return
            field: FieldDescriptor | None = by_number.get(number)
            name = path if field is None else f"{path}.{field.name}" if path else field.name
            self._count(name, field, counts, number)
            self._skip(wire_type, number, field, end, name, counts, depth)
        if group:
            raise _Malformed  # its end is missing

    def _count(self, path: str, field: FieldDescriptor | None, counts: dict[int, int], number: int) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise _TooMany(path or "request", f"makes the message one of more than {MAX_FIELDS} fields")
        if field is not None:
            counts[number] = counts.get(number, 0) + 1
            if counts[number] > MAX_REPEATED:
                raise _TooMany(path, f"occurs more than {MAX_REPEATED} times")

    def _skip(
        self,
        wire_type: int,
        number: int,
        field: FieldDescriptor | None,
        end: int,
        path: str,
        counts: dict[int, int],
        depth: int,
    ) -> None:
        """Goes to the end of a field's value, through its own fields if it is a message."""
        match wire_type:
            case 0:
                self._varint(end)
            case 1:
                self._at += 8
            case 2:
                size = self._varint(end)
                if self._at + size > end:
                    raise _Malformed
                if field is not None and field.message_type is not None:
                    path = f"{path}[{counts[number] - 1}]" if field.is_repeated else path
                    self.message(field.message_type, self._at + size, path, depth + 1)
                    return
                if field is not None and field.type == FieldDescriptor.TYPE_STRING and size > MAX_STRING_BYTES:
                    raise _TooMany(path, f"must have at most {MAX_STRING_BYTES} bytes, got {size}")
                self._at += size
            case 3:
                self.message(None, end, path, depth + 1, group=number)
            case 5:
                self._at += 4
            case _:
                raise _Malformed
        if self._at > end:
            raise _Malformed

    def _varint(self, end: int) -> int:
        value = shift = 0
        while self._at < end and shift < 70:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise _Malformed
