"""The bad-input campaign in small, and requests that keep to their types and to nothing else."""

import asyncio
import math
import os
import random
import re
from types import SimpleNamespace

import pytest
from google.protobuf import duration_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.engine.fake import FakeEngine
from gramophone_server.errors import InvalidRequest
from gramophone_server.images import codec
from gramophone_server.rpc.status import refusal
from gramophone_server.rpc.validation import check_page, check_request_id, check_spec, check_watch
from tests.bad_input import campaign as campaigns
from tests.bad_input import inputs, pictures, sending
from tests.bad_input.campaign import campaign, keep
from tests.bad_input.inputs import Input
from tests.bad_input.sending import LIMITS

SEED, COUNT = 20_260, 1200


def explained(findings):
    return "\n".join(f"{sent.kind if sent else 'server'}: {failure}" for sent, failure in findings.failures)


@pytest.mark.timeout(180)
async def test_whatever_is_sent_the_server_answers_and_goes_on():
    findings = await campaign(COUNT, SEED, bombs=False)  # those that ever failed are in the corpus
    assert not findings.failures, explained(findings)
    assert findings.total == COUNT + len(inputs.corpus())
    assert 0 < findings.most_memory <= LIMITS.request_memory_bytes
    assert 0 < findings.most_memory_at_once <= LIMITS.request_memory_bytes


async def test_the_campaign_tells_what_a_server_does_wrong(tmp_path, monkeypatch):
    """Taking any memory, or any time, or ending in UNIMPLEMENTED, as a method that is not there does. And a damaged input
    is held to the limit of memory as well as those that are sent alone."""
    monkeypatch.setitem(sending.METHODS, "Paint", Method("Paint"))
    monkeypatch.setattr(campaigns, "LIMITS", SimpleNamespace(request_memory_bytes=-1))
    monkeypatch.setattr(sending, "SLOW_S", 0.0)
    paths = [tmp_path / "absent.input", tmp_path / "slow.input"]
    absent, slow = Input("wire", "Paint", (b"x",)), Input("wire", "GetServerInfo", (b"",))
    for path, sent in zip(paths, (absent, slow), strict=True):
        path.write_bytes(sent.to_file())
    monkeypatch.setattr(inputs, "inputs", lambda seed: iter([slow._replace(kind="damage")] * 16))
    findings = await campaign(16, 0, paths, bombs=False)
    told = explained(findings).splitlines()
    assert told[0] == "wire: UNIMPLEMENTED: Method not found!"
    assert re.fullmatch(r"wire: took \d+ MiB, at most -0 are allowed", told[1])
    assert re.fullmatch(r"wire: took \d\.\d s, again and again, at most 0 are allowed", told[2])
    assert re.fullmatch(r"wire: took \d+ MiB, at most -0 are allowed", told[3])
    memory = re.compile(r"damage: took \d+ MiB( with up to [1-7] others beside)?, at most -0 are allowed")
    found = [match for one in told[4:] if (match := memory.fullmatch(one))]
    assert len(found) == 16 and sum(match[1] is not None for match in found) >= sending.AT_ONCE
    assert len(told) == 4 + 2 * 16 and findings.again == 1 + 16
    said = keep(findings, tmp_path / "kept")
    again = tmp_path / "kept" / "000-wire.input"
    assert said[0].endswith(f"again with: python -m tests.bad_input {again}")
    assert Input.of_file(again) == absent


@pytest.mark.parametrize(("calls_that_hang", "is_failure"), [(1, False), (3, True)])
async def test_a_server_that_sits_on_a_call_without_working_is_found(calls_that_hang, is_failure, monkeypatch):
    """But not if it was once, which may have been the machine."""
    monkeypatch.setattr(sending, "SLOW_S", 0.2)
    server = sending.Target("127.0.0.1:9", os.getpid(), "")
    left = iter([0.4] * calls_that_hang)

    async def called(_):
        await asyncio.sleep(next(left, 0.0))
        return "OK", ""

    monkeypatch.setattr(server, "_called", called)
    outcome = await server.outcome(Input("wire", "GetJob", (b"",)))
    await server.close()
    assert outcome.seconds >= 0.4 and outcome.again == min(calls_that_hang, 2)
    assert bool(outcome.failure) == is_failure, outcome
    if is_failure:
        assert outcome.failure == "took 0.4 s, again and again, at most 0.2 are allowed"


async def test_what_a_slow_call_waits_for_a_processor_is_not_its_fault(monkeypatch):
    monkeypatch.setattr(sending, "SLOW_S", 0.2)
    server = sending.Target("127.0.0.1:9", os.getpid(), "")
    waited = iter(range(10))  # seconds more, each time that it is asked
    monkeypatch.setattr(server, "_waited_s", lambda: next(waited))

    async def called(_):
        await asyncio.sleep(0.3)
        return "OK", ""

    monkeypatch.setattr(server, "_called", called)
    outcome = await server.outcome(Input("wire", "GetJob", (b"",)))
    await server.close()
    assert outcome.failure == "" and outcome.again == 1 and outcome.seconds >= 0.3


async def test_memory_is_held_against_each_that_was_on_its_way():
    server = sending.Target("127.0.0.1:9", os.getpid(), "")
    with server.rise() as first:
        with server.rise() as second:
            del (held := [bytearray(b"x" * (64 * 2**20))])[:]  # it was there, and it is gone
        with server.rise() as third:
            pass
    await server.close()
    rises = [rise.peak - rise.before for rise in (first, second, third)]
    assert not held and rises[0] > 60 * 2**20 and rises[1] > 60 * 2**20 and rises[2] < 30 * 2**20
    assert [rise.beside for rise in (first, second, third)] == [1, 1, 1]


class Method:
    client_streaming = server_streaming = False

    def __init__(self, name):
        self.name = name


def test_inputs_are_a_function_of_their_seed():
    def first(seed):
        source = inputs.inputs(seed)
        return [next(source) for _ in range(50)]

    assert first(1) == first(1) != first(2)


def test_2000_damaged_pictures_are_pictures_or_refused():
    """In process, where a decoder that dies takes the test with it."""
    chance = random.Random(SEED)
    refused = 0
    for _ in range(2000):
        data = pictures.damaged(chance.choice(pictures.good()), chance, chance.choice(pictures.good()))
        for take in (lambda d: codec.size(d, "f", LIMITS), lambda d: codec.decode(d, "f", LIMITS, 64)):
            try:
                take(data)
            except InvalidRequest as error:
                refused += 1
                assert [violation.field for violation in error.violations] == ["f"]
                assert "PIL" not in str(error) and "object at" not in str(error)
    assert 500 < refused < 3900


numbers = st.one_of(st.floats(), st.sampled_from((0.0, 1.0, math.nan, math.inf, -math.inf, 1e300)))
whole = st.integers(-(2**31), 2**31 - 1)
texts = st.one_of(st.text(max_size=30), st.sampled_from(("relu1_1", "relu4_2", "sha256:" + "0" * 64)))
durations = st.builds(duration_pb2.Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=whole)
layers = st.builds(
    pb.LayerWeights, layers=st.lists(st.builds(pb.LayerWeight, layer=texts, weight=numbers), max_size=20)
)
recipes = st.fixed_dictionaries({}, optional={
    **dict.fromkeys(("preset", "normalisation", "pooling", "start", "optimiser", "size", "iterations"), whole),
    **dict.fromkeys(("coarse_iterations", "smallest_size"), whole),
    **dict.fromkeys(("alpha", "beta", "tv_weight", "style_scale", "step", "average", "time_budget"), numbers),
    **dict.fromkeys(("content_layers", "style_layers"), layers),
}).map(lambda fields: pb.Recipe(**fields))  # fmt: skip
sources = st.one_of(
    st.just(pb.ImageSource()),
    st.builds(pb.ImageSource, data=st.binary(max_size=20)),
    st.builds(pb.ImageSource, digest=texts),
)
frames = st.builds(
    pb.FrameOptions,
    every_iterations=whole,
    min_interval=durations,
    max_side=whole,
    format=whole,
    quality=whole,
    max_in_flight=whole,
)
checkpoints = st.builds(pb.CheckpointOptions, min_interval=durations, light=st.booleans())
specs = st.fixed_dictionaries({}, optional={
    "content": sources, "start_image": sources, "recipe": recipes, "frames": frames, "checkpoints": checkpoints,
    "styles": st.lists(st.builds(pb.StyleSource, image=sources, weight=numbers), max_size=20),
    "result_format": whole, "result_quality": whole, "seed": st.integers(0, 2**64 - 1), "detach_grace": durations,
    "resume": st.binary(max_size=20),
}).map(lambda fields: pb.JobSpec(**fields))  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(spec=specs, watch=st.builds(pb.WatchJobRequest, frames=frames, checkpoints=checkpoints), text=texts, size=whole)
def test_every_request_is_good_or_has_violations_that_fit_a_status(spec, watch, text, size):
    violations = [
        *check_spec(spec, Limits(), FakeEngine.layers),
        *check_watch(watch),
        *check_request_id(text),
        *check_page(pb.ListJobsRequest(page_size=size, page_token=text)),
    ]
    assert all(field and description for field, description in violations)
    if violations:
        _, message, trailers = refusal(InvalidRequest(violations))
        assert len(message) <= 400
        assert sum(len(value) for _, value in trailers) <= 4096 + 64


def test_the_corpus_can_be_read():
    paths = inputs.corpus()
    assert paths
    for path in paths:
        sent = Input.of_file(path)
        assert sent.method in inputs.REQUESTS and sent.messages
        assert path.stat().st_size < 64 * 1024, "the corpus is small"
