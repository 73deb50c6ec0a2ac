"""Messages with too many fields are refused by their bytes; what is refused has a path and a limit."""

import time

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.rpc.field_counts import MAX_FIELDS, MAX_REPEATED, MAX_STRING_BYTES, check_fields
from tests.support.specs import spec

MANY = 200_000


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def nested(number, data):
    """A field with a length: a message, a string or bytes."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def violations(data, kind=pb.StylizeRequest):
    return list(check_fields(data, kind))


SHAPES = {
    "styles": (nested(1, nested(2, b"") * MANY), "spec.styles", f"occurs more than {MAX_REPEATED} times"),
    "layers": (
        nested(1, nested(3, nested(2, nested(1, b"") * MANY))),
        "spec.recipe.content_layers.layers",
        f"occurs more than {MAX_REPEATED} times",
    ),
    "a message that is merged": (nested(1, b"") * MANY, "spec", f"occurs more than {MAX_REPEATED} times"),
    "a number that is replaced": (nested(1, b"\x30\x01" * MANY), "spec.result_format", "occurs more than 100 times"),
    "fields that are not known": (b"\xf8\x3f\x01" * MANY, "request", f"one of more than {MAX_FIELDS} fields"),
    "unknown fields of a style": (
        nested(1, nested(2, b"\xf8\x3f\x01" * MANY)),
        "spec.styles[0]",
        f"one of more than {MAX_FIELDS} fields",
    ),
    "groups": (b"\xfb\x3f\xfc\x3f" * MANY, "request", f"one of more than {MAX_FIELDS} fields"),
    "many of several kinds": (
        nested(1, (nested(2, nested(1, nested(1, b"x"))) * 90 + b"\xf8\x3f\x01" * 2000)),
        "spec",
        f"one of more than {MAX_FIELDS} fields",
    ),
    "a long string": (nested(2, b"x" * 70_000), "request_id", f"must have at most {MAX_STRING_BYTES} bytes, got 70000"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_too_many_fields_are_refused_with_their_path_and_limit(shape):
    data, path, description = SHAPES[shape]
    (violation,) = violations(data)
    assert violation.field == path and description in violation.description


def test_the_count_stops_at_the_limit():
    """What follows is never read, so the time does not grow with the message."""

    def best_of_five(data):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert violations(data)
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = (nested(1, b"\xf8\x3f\x01" * count) for count in (3_000, 2_000_000))
    assert best_of_five(large) < 10 * best_of_five(small)


def test_ordinary_requests_have_no_violations():
    full = spec()
    full.recipe.content_layers.layers.extend(pb.LayerWeight(layer="relu4_2", weight=1) for _ in range(16))
    full.recipe.style_layers.layers.extend(pb.LayerWeight(layer="relu4_2", weight=1) for _ in range(16))
    full.styles.extend(pb.StyleSource(image=pb.ImageSource(data=bytes(10_000)), weight=1) for _ in range(15))
    assert violations(pb.StylizeRequest(spec=full, request_id="x" * 36).SerializeToString()) == []


def test_bytes_are_not_strings():
    assert violations(nested(1, nested(1, nested(1, bytes(2**20))))) == []


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\x0a\x7fcut", b"\x0b" * 200, b"\x0b\x14", b"\x0b", b"\x0d\x01", b"\x09\x01", b"\x0f", b"\xff" * 11],
    ids=["no tag", "cut off", "a tower", "another end", "no end", "half of 4", "half of 8", "type 7", "a long number"],
)
def test_bytes_that_are_no_message_are_left_to_protobuf(data):
    assert violations(data) == []
    with pytest.raises(DecodeError):
        pb.StylizeRequest.FromString(data)


def counted(message):
    """The fields of a parsed message, by a walk over its values."""
    count = 0
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        count += len(values)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            count += sum(map(counted, values))
    return count


@given(styles=st.integers(0, MAX_REPEATED + 2), layers=st.integers(0, MAX_REPEATED + 2), weighted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_count_is_that_of_the_parsed_message(styles, layers, weighted):
    wanted = spec()
    del wanted.styles[:]
    wanted.styles.extend(pb.StyleSource(weight=1.0 if weighted else None) for _ in range(styles))
    wanted.recipe.style_layers.layers.extend(pb.LayerWeight(layer="x") for _ in range(layers))
    request = pb.StylizeRequest(spec=wanted)
    refused = max(styles, layers) > MAX_REPEATED or counted(request) > MAX_FIELDS
    assert bool(violations(request.SerializeToString())) == refused
