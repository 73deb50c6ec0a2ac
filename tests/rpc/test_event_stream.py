"""Pictures and checkpoints on their way to clients: what is made once, what is kept, and for how long."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import grpc
import pytest

from gramophone.recipe import Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server.config import ENCODERS, Limits
from gramophone_server.domain.events import Answer, Changed, Finished, Frame, Picture, Saved, SavedState, StopReason
from gramophone_server.images import codec
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule, Mailbox
from gramophone_server.rpc.byte_budget import ByteBudget
from gramophone_server.rpc.encoders import Encoders
from gramophone_server.rpc.event_stream import JobEventStream
from gramophone_server.rpc.promptness import Standing
from gramophone_server.scheduling.scheduler import Scheduler
from tests.support.clock import until
from tests.support.controllers import PAUSE, start_controller
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.raw_http2 import connection, prefixed
from tests.support.serving import LARGE_MESSAGES, events_of, refused, serving, start_detachable, watch
from tests.support.specs import detachable_spec, spec

MIB = 2**20
SIDE = 1024  # pixels; a picture of noise of 1024 x 512 px is a PNG of 1.5 MiB
SENDING = Limits(max_blocked_s=1, max_sending_bytes=16 * MIB, max_watchers=64)
WATCH = "/gramophone.v1.StyleTransferService/WatchJob"


@pytest.fixture
def encodings(monkeypatch):
    """The encodings that were made, as (format, quality, max_side)."""
    made, encode = [], codec.encode

    def recorded(picture, *encoding):
        made.append(encoding[:3])
        return encode(picture, *encoding)

    monkeypatch.setattr("gramophone_server.images.codec.encode", recorded)
    return made


def noise():
    """A job whose pictures do not compress, and its engine."""
    wanted, engine = detachable_spec(5000), NoisyEngine(SIDE, iteration_s=0.002)
    wanted.recipe.size = SIDE
    engine.noise = engine.noise[: SIDE // 2].contiguous()
    return wanted, engine


@contextlib.asynccontextmanager
async def paused_job(s, wanted=None):
    """A paused job whose newest frame every watcher gets; yields its id."""
    wanted = wanted or detachable_spec(5000)
    wanted.frames.CopyFrom(pb.FrameOptions(max_side=16))
    controller = await start_controller(s, wanted)
    await controller.event("frame")
    await controller.ask(pause=PAUSE)
    yield controller.job_id
    controller.call.cancel()


async def frame_of(call):
    while not (event := (await call.read()).event).HasField("frame"):
        pass
    call.cancel()
    return event.frame


# Encodings ------------------------------------------------------------------------------------------------------------


async def test_options_that_change_nothing_make_no_other_encoding(encodings):
    async with serving(FakeEngine(iteration_s=0.002)) as s, paused_job(s) as job_id:
        encodings.clear()
        png = {"format": pb.IMAGE_FORMAT_PNG}
        options = [{**png, "quality": quality, "max_side": side} for quality in (0, 1, 99) for side in (0, 64, 5000)]
        frames = await asyncio.gather(*(frame_of(watch(s, job_id, **one)) for one in options))
        assert len({frame.image.data for frame in frames}) == 1
        assert set(encodings) == {(codec.Format.PNG, 0, 0)}
        encodings.clear()
        options = [{"quality": quality, "max_side": 32} for quality in (0, 85, 84)]  # of JPEG, whose default is 85
        first, second, third = await asyncio.gather(*(frame_of(watch(s, job_id, **one)) for one in options))
        assert first == second != third
        assert set(encodings) == {(codec.Format.JPEG, 85, 32), (codec.Format.JPEG, 84, 32)}


async def test_no_encoding_is_kept_after_its_watchers():
    async with serving(FakeEngine(iteration_s=0.002)) as s, paused_job(s) as job_id:
        job = s.servicer.jobs.find(job_id)
        ((_, frame),) = [item for item in _unread(job.watch(FrameRule())) if isinstance(item[1], Frame)]
        for quality in range(1, 81):
            await frame_of(watch(s, job_id, format=pb.IMAGE_FORMAT_WEBP, quality=quality))
        await until(lambda: job.watchers == 2)
        await until(lambda: frame.picture.encodings == {})
        assert s.servicer.sending.used == 0


def _unread(mailbox):
    while (item := mailbox.read_nowait()) is not None:
        yield item


async def test_the_result_is_encoded_once_and_its_pixels_are_released(encodings):
    async with serving(FakeEngine()) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5)))
        job = s.servicer.jobs.find(response.accepted.job_id)
        for _ in range(3):
            assert (await events_of(watch(s, job.id)))[-1].result == response.result
        assert encodings == [(codec.Format.PNG, 0, 0)]
        assert job.result.picture.wait is None and len(job.result.picture.encodings) == 1
        assert s.servicer.sending.used == 0


async def test_a_checkpoint_is_written_once_for_all_watchers_and_then_dropped():
    written = []
    state = SavedState(True, lambda: written.append(1) or b"state" * 20_000, 108_000)
    encoders, budget = Encoders(), ByteBudget(MIB)
    streams = [JobEventStream(None, None, encoders, budget, connection=f"{i}") for i in range(3)]
    messages = await asyncio.gather(*(stream.outgoing(7, Saved(5, state)) for stream in streams))
    assert len(written) == 1 and len({id(message.data) for message in messages}) == 1
    event = pb.WatchJobResponse.FromString(messages[0].data).event
    assert (event.sequence, event.checkpoint.iteration, event.checkpoint.light) == (7, 5, True)
    assert event.checkpoint.data == b"state" * 20_000
    assert budget.used == 4 * len(messages[0].data)  # the shared message, and gRPC's three copies
    for message in messages:
        message.close()
    assert budget.used == 0 and state.written == {}
    encoders.close()


async def test_frames_that_were_dropped_before_differ_and_the_picture_does_not():
    encoders, budget = Encoders(), ByteBudget(16 * MIB)
    picture = Picture(lambda: NoisyEngine(300).noise, 300, 300)
    streams = [JobEventStream(None, None, encoders, budget) for _ in range(3)]
    messages = await asyncio.gather(
        *(stream.outgoing(7, Frame(5, picture, dropped)) for stream, dropped in zip(streams, (0, 3, 0), strict=True))
    )
    frames = [pb.StylizeStreamResponse.FromString(message.data).event.frame for message in messages]
    assert [frame.dropped for frame in frames] == [message.dropped for message in messages] == [0, 3, 0]
    assert frames[0].image == frames[1].image and messages[0].data is messages[2].data
    size = len(messages[0].data)
    assert abs(budget.used - 5 * size) < 100  # shared, gRPC's three, and one message of its own
    for message in messages:
        message.close()
    assert budget.used == 0
    encoders.close()


async def test_the_time_of_a_result_is_that_of_its_encoding_and_not_of_its_wait_for_a_thread(monkeypatch):
    """All results together take no longer than the threads have. With their waits they would take eight times that."""
    recorded, encode, number = [], codec.encode, 16 * ENCODERS
    monkeypatch.setattr(codec, "encode", lambda *asked: (time.sleep(0.02), encode(*asked))[1])
    monkeypatch.setattr(Scheduler, "record_delivery", lambda _, *result: recorded.append(result))
    async with serving(FakeEngine(), Limits(max_queued=8 * number)) as s:
        request = pb.StylizeRequest(spec=spec(iterations=1))
        started_at = time.monotonic()
        await asyncio.gather(*(s.stub.Stylize(request) for _ in range(number)))
        took_s = time.monotonic() - started_at
    assert [(kind, pixels) for kind, pixels, _ in recorded] == [("PNG", 64 * 32)] * number
    assert all(seconds >= 0.02 for _, _, seconds in recorded)
    assert sum(seconds for _, _, seconds in recorded) <= ENCODERS * took_s


# The bytes of messages ------------------------------------------------------------------------------------------------


class Watcher:
    """A watcher without a job."""

    def __init__(self, encoders, budget, connection=""):
        self.mailbox = Mailbox(asyncio.get_running_loop(), FrameRule(), CheckpointRule())
        self.stream = JobEventStream(None, self.mailbox, encoders, budget, connection=connection)
        self.number = 0

    def put(self, event):
        self.number += 1
        self.mailbox.put(self.number, event)

    async def next(self):
        return await anext(self.stream.responses())


def saved(iteration, size=MIB):
    return Saved(iteration, SavedState(True, lambda: bytes(size), size + 1000))


async def test_a_reader_that_waits_for_bytes_gets_the_newest_and_keeps_nothing_meanwhile():
    encoders, budget = Encoders(), ByteBudget(4 * MIB)
    other = budget.try_take(3 * MIB)
    watcher = Watcher(encoders, budget)
    watcher.put(saved(1))
    waiting = asyncio.create_task(watcher.next())
    await until(lambda: budget.waiting == 1)
    for iteration in range(2, 10):
        watcher.put(saved(iteration))
        assert watcher.mailbox.unread == 1
    other.give_back()
    message = await waiting
    assert pb.WatchJobResponse.FromString(message.data).event.checkpoint.iteration == 9
    assert budget.used == 2 * len(message.data)
    message.close()
    assert budget.used == budget.waiting == 0
    encoders.close()


async def test_small_messages_do_not_wait_and_take_no_bytes_from_those_who_wait():
    encoders, budget = Encoders(), ByteBudget(4 * MIB)
    other = budget.try_take(4 * MIB)
    watcher = Watcher(encoders, budget)
    watcher.put(saved(1))
    waiting = asyncio.create_task(watcher.next())
    await until(lambda: budget.waiting == 1)
    watcher.put(Changed(1, Recipe(), 10))
    watcher.put(saved(2))
    other.give_back()
    assert pb.WatchJobResponse.FromString((await waiting).data).event.HasField("changed")
    assert budget.used == 0, "a slow reader of small messages would keep it"
    message = await watcher.next()
    assert pb.WatchJobResponse.FromString(message.data).event.checkpoint.iteration == 2
    encoders.close()


@pytest.mark.parametrize(
    "follows",
    [Answer(1, 0), Finished(Picture(None, 1, 1), None, 1, 0.0, StopReason.FINISHED)],
    ids=["answer", "result"],
)
async def test_bytes_that_were_waited_for_are_given_back_if_something_else_is_next(follows):
    """A controller keeps an event while it sends an answer, or waits for the last command; it may leave then."""
    encoders, budget = Encoders(), ByteBudget(4 * MIB)
    other = budget.try_take(3 * MIB)
    watcher = Watcher(encoders, budget)
    watcher.put(saved(1))
    waiting = asyncio.create_task(watcher.stream.outgoing(*await watcher.stream.read()))
    await until(lambda: budget.waiting == 1)
    watcher.put(follows)
    watcher.put(saved(2))  # takes the place of the first, after what follows that
    other.give_back()
    assert await waiting is None and budget.used > 2 * MIB
    assert (await watcher.stream.read())[1] is follows
    assert budget.used == 0
    encoders.close()


@pytest.mark.parametrize("when", ["waiting", "writing"])
async def test_a_reader_that_leaves_gives_everything_back(when):
    encoders, budget = Encoders(), ByteBudget(4 * MIB)
    other = budget.try_take(3 * MIB) if when == "waiting" else None
    watcher = Watcher(encoders, budget)
    go = asyncio.Event()
    loop = asyncio.get_running_loop()
    event = saved(1)
    event.state.write = lambda: asyncio.run_coroutine_threadsafe(go.wait(), loop).result() and bytes(MIB)
    watcher.put(event)
    waiting = asyncio.create_task(watcher.next())
    await until(lambda: budget.waiting == 1 if other else bool(event.state.written))
    waiting.cancel()
    await asyncio.wait([waiting])
    assert budget.waiting == 0 and budget.used == (3 * MIB if other else 0) and event.state.written == {}
    go.set()
    encoders.close()


async def test_a_message_larger_than_the_budget_takes_all_of_it():
    encoders, budget = Encoders(), ByteBudget(MIB)
    watcher = Watcher(encoders, budget)
    watcher.put(saved(1, size=5 * MIB))
    message = await watcher.next()
    assert len(message.data) > 5 * MIB and budget.used <= MIB
    message.close()
    assert budget.used == 0
    encoders.close()


# Many watchers --------------------------------------------------------------------------------------------------------


async def test_small_jobs_do_not_wait_behind_the_large_pictures_of_watchers(monkeypatch):
    """However many there are, in encodings of their own and on connections of their own: here none of them ends."""
    encode, go, begun = codec.encode, threading.Event(), []

    def slow(picture, *encoding):
        if max(picture.shape) > 256:
            begun.append(encoding)
            assert go.wait(60), "the test did not set `go`"
        return encode(picture, *encoding)

    wanted, engine = noise()
    async with serving(engine, Limits(max_watchers=64)) as s, paused_job(s, wanted) as job_id:
        monkeypatch.setattr("gramophone_server.images.codec.encode", slow)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(go.set)
            for quality in range(1, 11):
                raw = await stack.enter_async_context(connection(s.address))
                options = pb.FrameOptions(format=pb.IMAGE_FORMAT_WEBP, quality=quality)
                request = pb.WatchJobRequest(job_id=job_id, frames=options)
                await raw.open_stream(WATCH).send(prefixed(request.SerializeToString()), end=True)
            await until(lambda: len(begun) >= ENCODERS)
            engine.noise = NoisyEngine(64).noise
            async with asyncio.timeout(60):
                for _ in range(3):
                    response = await s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(3)))
                    assert response.result.image.width == 64
            assert len(begun) == ENCODERS


async def test_the_watchers_of_one_connection_leave_others_a_part_of_the_bytes():
    async with serving(FakeEngine()) as s:
        budget, taken = s.servicer.sending, []
        while (share := budget.try_take(MIB, "one")) is not None:
            taken.append(share)
        assert budget.used <= 0.75 * budget.max_bytes
        assert budget.try_take(budget.max_bytes // 4, "other") is not None


# Readers that do not read ---------------------------------------------------------------------------------------------


async def watch_frames(raw, job_id, *, hold=False):
    """A watcher of a job's frames. ``hold``: it reads the small events, and then no byte of a frame."""
    stream = raw.open_stream(WATCH, hold=hold)
    request = pb.WatchJobRequest(job_id=job_id, frames=pb.FrameOptions(format=pb.IMAGE_FORMAT_PNG))
    await stream.send(prefixed(request.SerializeToString()), end=True)
    return stream


async def test_the_bytes_of_a_message_count_until_grpc_has_dropped_it():
    wanted, engine = noise()
    async with serving(engine, SENDING) as s, paused_job(s, wanted) as job_id:
        budget, job = s.servicer.sending, s.servicer.jobs.find(job_id)
        async with connection(s.address) as raw:
            await watch_frames(raw, job_id, hold=True)
            await until(lambda: job.watchers == 2)
            await until(lambda: job.watchers == 1)  # dropped as a slow reader
            await until(lambda: 1.5 * MIB <= budget.used < 1.6 * MIB)  # one copy, gRPC's
            assert len(s.servicer.calls.unread) == 1
            assert budget.promptness.of(raw.peer, budget.now()) is Standing.SLOW
        await until(lambda: budget.used == 0 and not s.servicer.calls.unread)


async def test_who_reads_a_message_is_prompt():
    wanted, engine = noise()
    async with serving(engine, SENDING) as s, paused_job(s, wanted) as job_id, connection(s.address) as raw:
        budget = s.servicer.sending
        assert budget.promptness.of(raw.peer, budget.now()) is Standing.UNKNOWN
        stream = await watch_frames(raw, job_id)
        await until(lambda: budget.promptness.of(raw.peer, budget.now()) is Standing.PROMPT)
        stream.cancel()


async def test_readers_that_do_not_read_cannot_keep_the_bytes_that_others_need(monkeypatch):
    """The connections of those that were dropped and still do not read are closed."""
    for module in ("servicer", "calls"):
        monkeypatch.setattr(f"gramophone_server.rpc.{module}.READING_S", 0.2)
    wanted, engine = noise()
    async with serving(engine, replace(SENDING, max_blocked_s=30)) as s, paused_job(s, wanted) as job_id:
        budget = s.servicer.sending
        async with contextlib.AsyncExitStack() as stack:
            silent = [await stack.enter_async_context(connection(s.address)) for _ in range(16)]
            for raw in silent:
                await watch_frames(raw, job_id, hold=True)
            await until(lambda: budget.used > 10 * MIB)
            async with asyncio.timeout(60), grpc.aio.insecure_channel(s.address, options=LARGE_MESSAGES) as channel:
                honest = pb_grpc.StyleTransferServiceStub(channel)
                options = pb.FrameOptions(format=pb.IMAGE_FORMAT_PNG)
                for _ in range(8):
                    frame = await frame_of(honest.WatchJob(pb.WatchJobRequest(job_id=job_id, frames=options)))
                    assert len(frame.image.data) > 1.5 * MIB
                    assert budget.used <= budget.max_bytes
            standings = [budget.promptness.of(raw.peer, budget.now()) for raw in silent]
            assert {raw.is_closed for raw in silent} == {True, False}
            assert set(standings) == {Standing.SLOW, Standing.UNKNOWN}
        await until(lambda: budget.used == 0)


async def test_a_unary_response_that_is_not_read_ends_its_call():
    async with (
        serving(FakeEngine(), Limits(max_blocked_s=1)) as s,
        connection(s.address, window=0) as raw,
    ):
        for method, request in (
            ("GetServerInfo", pb.GetServerInfoRequest()),
            ("Stylize", pb.StylizeRequest(spec=detachable_spec(3))),
        ):
            stream = raw.open_stream(f"/gramophone.v1.StyleTransferService/{method}", hold=True)
            await stream.send(prefixed(request.SerializeToString()), end=True)
            await until(lambda: len(s.servicer.calls) == 1)
            await until(lambda: len(s.servicer.calls) == 0 and s.servicer.calls.unread)
            stream.cancel()
            await until(lambda: not s.servicer.calls.unread)


async def test_calls_whose_responses_are_not_read_cannot_keep_the_places_of_others():
    engine = FakeEngine()
    async with (
        serving(engine, Limits(max_blocked_s=1, max_calls=2)) as s,
        connection(s.address, window=0) as raw,
    ):
        for _ in range(2):
            stream = raw.open_stream("/gramophone.v1.StyleTransferService/GetServerInfo", hold=True)
            await stream.send(prefixed(b""), end=True)
        await until(lambda: len(s.servicer.calls.unread) == 2 and not s.servicer.calls)
        first, _ = await start_detachable(s, engine)  # the first call of a connection always has a place
        got = await refused(s.stub.GetServerInfo(pb.GetServerInfoRequest()))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER_BUSY")
        await until(lambda: raw.is_closed and not s.servicer.calls.unread)
        assert (await s.stub.GetServerInfo(pb.GetServerInfoRequest())).version
        first.cancel()


async def test_a_watcher_with_a_closed_window_from_the_start_leaves_its_place_to_others():
    engine = FakeEngine()
    async with serving(engine, Limits(max_blocked_s=1, max_watchers=2)) as s, connection(s.address, window=0) as raw:
        _, job_id = await start_detachable(s, engine)
        stream = await watch_frames(raw, job_id, hold=True)
        job = s.servicer.jobs.find(job_id)
        await until(lambda: job.watchers == 2)
        assert (await refused(watch(s, job_id))).ErrorInfo.reason == "TOO_MANY_WATCHERS"
        await until(lambda: job.watchers == 1)
        watcher = watch(s, job_id)
        assert (await watcher.read()).event.HasField("accepted")
        stream.cancel()
        engine.go.set()
