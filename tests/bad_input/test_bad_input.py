"""A short bad-input campaign, and random requests whose fields have valid types but arbitrary values."""

import asyncio
import math
import os
import random
import re
import time

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from gramophone.recipe import FIELD_TYPES, LayerWeight
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.engine.fake import FakeEngine
from gramophone_server.errors import InvalidRequest
from gramophone_server.images import codec, decoding
from gramophone_server.images.containers import UnusableImage
from gramophone_server.memory_bound import request_memory_bytes
from gramophone_server.rpc.status import abort_status
from gramophone_server.rpc.validation import check_page_options, check_request_id, check_spec, check_watch_options
from tests.bad_input import campaign, inputs, sending
from tests.bad_input.campaign import run_campaign, save_failures
from tests.bad_input.inputs import Input
from tests.bad_input.sending import LIMITS
from tests.support import bad_pictures
from tests.support.clock import ManualClock, until

SEED, COUNT = 20_260, 1200


def describe(findings):
    return "\n".join(f"{sent.kind if sent else 'server'}: {failure}" for sent, failure in findings.failures)


@pytest.mark.timeout(180)
async def test_the_server_survives_bad_inputs():
    findings = await run_campaign(COUNT, SEED, bombs=False)  # the bombs that ever failed are in the corpus
    assert not findings.failures, describe(findings)
    assert findings.total == COUNT + len(inputs.corpus())
    assert 0 < findings.max_memory <= request_memory_bytes(LIMITS)
    assert 0 < findings.max_memory_concurrent <= request_memory_bytes(LIMITS)


async def test_the_campaign_reports_failures_of_the_server(tmp_path, monkeypatch):
    """With limits that forbid all use of memory and time, and a method that does not exist. The limit of memory applies
    to damaged inputs as well as to those that are sent alone."""
    monkeypatch.setitem(sending.METHODS, "Paint", Method("Paint"))
    monkeypatch.setattr(campaign, "request_memory_bytes", lambda limits: -1)
    monkeypatch.setattr(sending, "SLOW_S", 0.0)
    paths = [tmp_path / "absent.input", tmp_path / "slow.input"]
    absent, slow = Input("wire", "Paint", (b"x",)), Input("wire", "GetServerInfo", (b"",))
    for path, sent in zip(paths, (absent, slow), strict=True):
        path.write_bytes(sent.to_file())
    monkeypatch.setattr(inputs, "inputs", lambda seed: iter([slow._replace(kind="damage")] * 16))
    findings = await run_campaign(16, 0, paths, bombs=False)
    failures = describe(findings).splitlines()
    assert failures[0] == "wire: UNIMPLEMENTED: Method not found!"
    assert re.fullmatch(r"wire: took \d+ MiB, at most -0 are allowed", failures[1])
    assert re.fullmatch(r"wire: took \d\.\d s in every repeat, at most 0 are allowed", failures[2])
    assert re.fullmatch(r"wire: took \d+ MiB, at most -0 are allowed", failures[3])
    memory = re.compile(r"damage: took \d+ MiB( with up to [1-7] other requests)?, at most -0 are allowed")
    matches = [match for failure in failures[4:] if (match := memory.fullmatch(failure))]
    assert len(matches) == 16 and sum(match[1] is not None for match in matches) >= sending.CONCURRENCY
    assert len(failures) == 4 + 2 * 16 and findings.repeated == 1 + 16
    messages = save_failures(findings, tmp_path / "saved")
    path = tmp_path / "saved" / "000-wire.input"
    assert messages[0].endswith(f"repeat with: python -m tests.bad_input {path}")
    assert Input.from_file(path) == absent


@pytest.mark.parametrize(("slow_calls", "is_failure"), [(1, False), (3, True)])
async def test_a_call_that_is_slow_in_every_repeat_is_a_failure(slow_calls, is_failure, monkeypatch):
    """A single slow call is not, because the machine may have been the cause."""
    monkeypatch.setattr(sending, "SLOW_S", 0.2)
    clock = ManualClock()
    server = sending.ServerUnderTest("127.0.0.1:9", os.getpid(), "", clock)
    durations_s = iter([0.4] * slow_calls)

    async def call(_):
        clock.advance(next(durations_s, 0.0))
        return "OK", ""

    monkeypatch.setattr(server, "call_once", call)
    outcome = await server.send(Input("wire", "GetJob", (b"",)))
    await server.close()
    assert outcome.seconds >= 0.4 and outcome.repeats == min(slow_calls, 2)
    assert bool(outcome.failure) == is_failure, outcome
    if is_failure:
        assert outcome.failure == "took 0.4 s in every repeat, at most 0.2 are allowed"


async def test_waiting_for_a_processor_does_not_count_as_slow(monkeypatch):
    monkeypatch.setattr(sending, "SLOW_S", 0.2)
    clock = ManualClock()
    server = sending.ServerUnderTest("127.0.0.1:9", os.getpid(), "", clock)
    waited_s = iter(range(10))  # grows by a second with each reading
    monkeypatch.setattr(server, "waited_s", lambda: next(waited_s))

    async def call(_):
        clock.advance(0.3)
        return "OK", ""

    monkeypatch.setattr(server, "call_once", call)
    outcome = await server.send(Input("wire", "GetJob", (b"",)))
    await server.close()
    assert outcome.failure == "" and outcome.repeats == 1 and outcome.seconds >= 0.3


async def test_a_health_check_takes_no_longer_when_the_machine_stands_still(monkeypatch):
    class Health(health_pb2_grpc.HealthServicer):
        async def Check(self, request, context):
            for _ in range(5):
                await asyncio.sleep(0.1)
            time.sleep(1.0)  # noqa: ASYNC251 - stops client and server
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    answering = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(Health(), answering)
    port = answering.add_insecure_port("127.0.0.1:0")
    await answering.start()
    server = sending.ServerUnderTest(f"127.0.0.1:{port}", os.getpid(), "")
    monkeypatch.setattr(server, "waited_s", lambda: 0.0)
    await sending.watch_health_during(until(lambda: server.slowest_health_s), server)
    await server.close()
    await answering.stop(0)
    assert 0.3 < server.slowest_health_s < 1.0 and not server.health_failures


async def test_a_rise_of_memory_counts_for_each_concurrent_call():
    server = sending.ServerUnderTest("127.0.0.1:9", os.getpid(), "")
    with server.watch_memory() as first:
        with server.watch_memory() as second:
            del (held := [bytearray(b"x" * (64 * 2**20))])[:]  # allocated and freed
        with server.watch_memory() as third:
            pass
    await server.close()
    rises = [watch.peak - watch.before for watch in (first, second, third)]
    assert not held and rises[0] > 60 * 2**20 and rises[1] > 60 * 2**20 and rises[2] < 30 * 2**20
    assert [watch.others for watch in (first, second, third)] == [1, 1, 1]


class Method:
    client_streaming = server_streaming = False

    def __init__(self, name):
        self.name = name


def test_inputs_depend_on_the_seed_alone():
    def first(seed):
        source = inputs.inputs(seed)
        return [next(source) for _ in range(50)]

    assert first(1) == first(1) != first(2)


def test_2000_damaged_pictures_are_decoded_or_refused():
    """In this process, so that a crash of a decoder also ends the test."""
    rng = random.Random(SEED)
    refused = 0
    for _ in range(2000):
        data = bad_pictures.damaged(
            rng.choice(bad_pictures.valid_pictures()), rng, rng.choice(bad_pictures.valid_pictures())
        )
        for read in (
            lambda d: decoding.upright_size(d, decoding.read_header(d, LIMITS)),
            lambda d: codec.decode(d, LIMITS, 64),
        ):
            try:
                read(data)
            except UnusableImage as error:
                refused += 1
                assert "PIL" not in str(error) and "object at" not in str(error)
    assert 500 < refused < 3900


numbers = st.one_of(st.floats(), st.sampled_from((0.0, 1.0, math.nan, math.inf, -math.inf, 1e300)))
whole = st.integers(-(2**31), 2**31 - 1)
texts = st.one_of(st.text(max_size=30), st.sampled_from(("relu1_1", "relu4_2", "sha256:" + "0" * 64)))
durations = st.builds(duration_pb2.Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=whole)
layers = st.builds(
    pb.LayerWeights, layers=st.lists(st.builds(pb.LayerWeight, layer=texts, weight=numbers), max_size=20)
)
VALUES = {int: whole, float: numbers, tuple[LayerWeight, ...]: layers}  # else a number of an enum
recipes = st.fixed_dictionaries(
    {}, optional={"preset": whole, **{name: VALUES.get(kind, whole) for name, kind in FIELD_TYPES.items()}}
).map(lambda fields: pb.Recipe(**fields))
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
def test_every_request_is_valid_or_has_violations_that_fit_into_a_status(spec, watch, text, size):
    violations = [
        *check_spec(spec, Limits(), FakeEngine.layers),
        *check_watch_options(watch),
        *check_request_id(text),
        *check_page_options(pb.ListJobsRequest(page_size=size, page_token=text)),
    ]
    assert all(field and description for field, description in violations)
    if violations:
        _, message, trailers = abort_status(InvalidRequest(violations))
        assert len(message) <= 400
        assert sum(len(value) for _, value in trailers) <= 4096 + 64


def test_the_corpus_can_be_read():
    paths = inputs.corpus()
    assert paths
    for path in paths:
        sent = Input.from_file(path)
        assert sent.method in inputs.REQUESTS and sent.messages
        assert path.stat().st_size < 64 * 1024, "the corpus is small"
