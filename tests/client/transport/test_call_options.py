"""Metadata and seconds: what fits, and the names in errors."""

import math

import numpy as np
import pytest

from gramophone_client import AsyncGramophoneClient, errors
from gramophone_client.transport.call_options import checked_max_retries, checked_metadata, checked_seconds
from tests.support.fake_service import NOWHERE, PAINTING, PHOTO


def test_metadata_is_a_mapping_or_pairs():
    pairs = (("x-tag", "a"), ("x-tag", "b"), ("trace-bin", b"\x00\xff"), ("empty", ""))
    assert checked_metadata(pairs) == checked_metadata([list(pair) for pair in pairs]) == pairs
    assert checked_metadata({"authorization": "Bearer x.y", "a_b.c-1": "~ !"}) == (
        ("authorization", "Bearer x.y"),
        ("a_b.c-1", "~ !"),
    )
    assert checked_metadata(None) == checked_metadata({}) == ()


@pytest.mark.parametrize(
    ("metadata", "field", "rule"),
    [
        ({"Authorization": "secret"}, "metadata['Authorization']", "'-' and '.'; write 'authorization'"),
        ({"a b": "secret"}, "metadata['a b']", "the key must consist of the characters"),
        ({"": "secret"}, "metadata['']", "the key must consist of the characters"),
        ({7: "secret"}, "metadata[7]", "the key must consist of the characters"),
        ({"grpc-timeout": "secret"}, "metadata['grpc-timeout']", "are gRPC's own"),
        ({"x": b"secret"}, "metadata['x']", "must be a str, got bytes; bytes need a key that ends in '-bin'"),
        ({"x": 5}, "metadata['x']", "must be a str, got int"),
        ({"x-bin": "secret"}, "metadata['x-bin']", "must be bytes, got str"),
        ({"x": "secret\n"}, "metadata['x']", "printable ASCII"),
        ({"x": " secret"}, "metadata['x']", "without spaces at the ends"),
        ({"x": "sécret"}, "metadata['x']", "others need a '-bin' key"),
        ("x=secret", "metadata", "must be a mapping or a sequence of pairs, got str"),
        (["secret"], "metadata", "must be a mapping or a sequence of pairs, got one of str"),
        ([("x", "secret", "y")], "metadata", "must be a mapping or a sequence of pairs, got one of tuple"),
        (5, "metadata", "must be a mapping or a sequence of pairs, got int"),
    ],
)
def test_wrong_metadata_is_named_without_its_value(metadata, field, rule):
    with pytest.raises(errors.InvalidRequestError) as raised:
        checked_metadata(metadata)
    (violation,) = raised.value.violations
    assert violation.field == field and rule in violation.description
    assert str(raised.value) == f"{field}: {violation.description}"
    assert "ecret" not in str(raised.value)


@pytest.mark.parametrize("seconds", [-1, -0.001, math.nan, math.inf, 1e12, True, "3", None, np.ones(2)])
def test_seconds_have_a_range(seconds):
    with pytest.raises(errors.InvalidRequestError, match="timeout: must be a number of seconds, above 0 and at most 3"):
        checked_seconds("timeout", seconds)


def test_zero_is_a_time_for_patience_alone():
    assert checked_seconds("patience", 0, or_zero=True) == 0
    with pytest.raises(errors.InvalidRequestError, match="above 0"):
        checked_seconds("timeout", 0)
    with pytest.raises(errors.InvalidRequestError, match="patience: must be a number of seconds, at least 0"):
        checked_seconds("patience", -1, or_zero=True)


async def test_methods_check_before_anything_is_sent(client, service):
    with pytest.raises(errors.InvalidRequestError, match="timeout"):
        AsyncGramophoneClient(NOWHERE, timeout=0)
    with pytest.raises(errors.InvalidRequestError, match="metadata"):
        AsyncGramophoneClient(NOWHERE, metadata={"A": "b"})
    for wrong in ({"timeout": -1}, {"metadata": {"A": "b"}}):
        (name,) = wrong
        for call in (client.get_job("j1", **wrong), client.stylize(PHOTO, PAINTING, **wrong)):
            with pytest.raises(errors.InvalidRequestError, match=name):
                await call
        for make in (client.watch, client.control_job):
            with pytest.raises(errors.InvalidRequestError, match=name):
                make("j1", **wrong)
    for make in (client.stream, client.control):
        with pytest.raises(errors.InvalidRequestError, match="patience"):
            make(PHOTO, PAINTING, patience=-1)
    assert service.metadata == []


def test_seconds_may_be_numbers_of_numpy():
    assert type(checked_seconds("timeout", np.float32(2.5))) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, 'target: must be an address, like "127.0.0.1:50051", got None'),
        ({"target": ""}, "target: must be an address, .* printable ASCII characters without spaces, got ''"),
        ({"target": "a\r\nb:1"}, "target: must be an address, .* got 'a.*b:1'"),
        ({"target": "http://gpu-1:50051"}, "got the URL 'http://gpu-1:50051'; write it without 'http://'"),
        ({"max_message_bytes": 0}, "max_message_bytes: must be 1 to 2147483647, got 0"),
        ({"max_message_bytes": 2**31}, "max_message_bytes: must be 1 to 2147483647, got 2147483648"),
        ({"max_message_bytes": "1 MB"}, "max_message_bytes: must be 1 to 2147483647, got '1 MB'"),
        ({"max_retries": np.array([1, 2])}, "max_retries: must be 0 to 4, .* got a numpy.ndarray of shape"),
        ({"credentials": "token"}, "credentials: must be of grpc.ssl_channel_credentials, or None, got 'token'"),
    ],
)
async def test_what_a_client_is_made_with_is_checked(options, message):
    with pytest.raises(errors.InvalidRequestError, match=message):
        AsyncGramophoneClient(**options)


async def test_numbers_of_numpy_fit():
    assert type(checked_max_retries(np.int64(2))) is int
    await AsyncGramophoneClient(NOWHERE, max_retries=np.int64(2), max_message_bytes=np.int32(5000)).close()
