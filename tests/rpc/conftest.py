"""Fixtures of tests of the RPCs."""

import types

import pytest

from gramophone_server.config import Limits
from gramophone_server.images import codec
from gramophone_server.rpc.admission import Admission
from tests.support.engines import FakeEngine


@pytest.fixture
def admission(monkeypatch):
    """Admission with a scheduler that records its calls in `asked`, and raises errors from `raises`. `were_decoded` has
    the fields of decoded images, `recorded_decodings` their pixels and seconds."""
    asked, decoded, raises, recorded = [], [], {}, []
    decode = codec.decode

    def noted(data, limits, needed):
        decoded.append(data)
        return decode(data, limits, needed)

    def require(kind):
        def ask(*about):
            asked.append((kind, *about))
            if kind in raises:
                raise raises[kind]

        return ask

    monkeypatch.setattr(codec, "decode", noted)
    scheduler = types.SimpleNamespace(
        engine=FakeEngine(),
        require_memory=require("memory"),
        require_time=require("time"),
        record_decoding=lambda pixels, seconds: recorded.append((pixels, seconds)),
        retry_after_s=lambda: 3.0,
    )
    made = Admission(scheduler, Limits())
    made.asked, made.were_decoded, made.raises, made.recorded_decodings = asked, decoded, raises, recorded
    yield made
    made.close()
