"""How messages of clients are read: within a budget and a time, decompressed within a limit, counted before parsed."""

import asyncio
import contextlib
import gzip
import os
import uuid
from dataclasses import replace

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.rpc.promptness import Standing
from gramophone_server.rpc.receiving import MAX_SMALL_BYTES
from tests.support.clock import until
from tests.support.controllers import start_controller
from tests.support.engines import FakeEngine
from tests.support.raw_http2 import connection, prefixed
from tests.support.serving import refused, serving, start_stream
from tests.support.specs import spec

PATH = "/gramophone.v1.StyleTransferService/"
MIB = 2**20
GZIP = [("grpc-encoding", "gzip")]
UPLOAD = pb.UploadImageRequest(chunk=spec().content.data).SerializeToString()
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["StyleTransferService"].methods]


def stylize(**fields):
    return pb.StylizeRequest(spec=spec(), **fields).SerializeToString()


def one_room():
    """Room for one large message at a time."""
    return Limits(
        max_message_bytes=16 * MIB, max_receiving_bytes=2**24, max_checkpoint_bytes=65536, max_image_bytes=65536
    )


async def answered(raw, method, *messages, headers=(), end=True):
    """The answer to a call that sends these bytes."""
    stream = raw.open_stream(PATH + method, headers)
    await stream.send(b"".join(messages), end=end)
    return await stream.answer(within_s=60)


# Compression ----------------------------------------------------------------------------------------------------------


async def test_a_compressed_message_is_that_message():
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        answer = await answered(raw, "Stylize", prefixed(gzip.compress(stylize()), compressed=True), headers=GZIP)
        assert answer.code == "OK" and pb.StylizeResponse.FromString(answer.messages[0]).result.image.data
        empty = await answered(raw, "GetServerInfo", prefixed(gzip.compress(b""), compressed=True), headers=GZIP)
        assert empty.code == "OK"


HELP = "; compress the message as one gzip member, or send it uncompressed"
BAD_GZIP = {
    "cut off": (gzip.compress(b"x" * 1000)[:-12], "is gzip data that is cut off after 17 bytes" + HELP),
    "only its start": (b"\x1f\x8b", "is gzip data that is cut off after 2 bytes" + HELP),
    "damaged": (b"\x1f\x8b\x08\x00" + b"\xff" * 50, "is no valid gzip data (Error -3"),
    "wrong checksum": (gzip.compress(b"abc")[:-8] + b"\0" * 8, "incorrect data check)" + HELP),
    "two members": (gzip.compress(b"") * 2, "is gzip data followed by 20 further bytes" + HELP),
    "many members": (gzip.compress(b"") * 10_000, "is gzip data followed by 199980 further bytes" + HELP),
    "trailing bytes": (gzip.compress(b"") + b"abc", "is gzip data followed by 3 further bytes" + HELP),
    "nested": (gzip.compress(gzip.compress(bytes(100))), "bytes that cannot be parsed as one"),
    "too large": (
        gzip.compress(bytes(9 * MIB)),
        (
            "expands to more than 8388608 bytes, which is the most (server setting GRAMOPHONE_MAX_MESSAGE_BYTES); "
            "upload images, in chunks, and name them by their digests"
        ),
    ),
    "many fields": (gzip.compress(b"\x0a\0" * 3 * MIB), "occurs more than 100 times"),
    "of empty blocks": (
        gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * MIB + gzip.compress(b"")[10:],
        "has 131072 bytes of gzip data with 0 bytes of content, more than a compressor makes of them" + HELP,
    ),
}


@pytest.mark.parametrize("what", BAD_GZIP)
@pytest.mark.parametrize("method", ["Stylize", "StylizeInteractive"])
async def test_bad_gzip_data_is_an_invalid_request(what, method):
    data, words = BAD_GZIP[what]
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        answer = await answered(raw, method, prefixed(data, compressed=True), headers=GZIP)
        assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        assert words in answer.message
        await until(lambda: s.servicer.receiver.requests.budget.used == 0)


async def test_a_compressed_command_is_read_and_a_bad_one_ends_the_stream():
    engine = FakeEngine(iteration_s=0.002)
    async with serving(engine) as s, connection(s.address) as raw:
        start = pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec(iterations=5000))).SerializeToString()
        bomb = gzip.compress(pb.StylizeInteractiveRequest().SerializeToString() + b"\x32\0" * 3 * MIB)
        stream = raw.open_stream(PATH + "StylizeInteractive", GZIP)
        await stream.send(prefixed(gzip.compress(start), compressed=True) + prefixed(bomb, compressed=True))
        answer = await stream.answer(within_s=60)
        assert answer.code == "INVALID_ARGUMENT"
        words = "expands to more than 65536 bytes, which is the most of a message without images; shorten its fields"
        assert words in answer.message


async def test_the_flags_of_a_message_are_answered_whatever_they_are():
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        for flag, message in ((2, b""), (255, b""), (2, b"\xff"), (255, gzip.compress(b""))):
            answer = await answered(raw, "GetJob", bytes([flag]) + prefixed(message)[1:])
            assert answer.code in ("NOT_FOUND", "INVALID_ARGUMENT")


# Sizes and numbers ----------------------------------------------------------------------------------------------------


async def test_a_message_without_images_is_small():
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.ListJobs(pb.ListJobsRequest(page_token="x" * MAX_SMALL_BYTES)))
        assert got.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "must have at most 65536 bytes, because it carries no image, got 65540" in got.message


async def test_a_message_above_the_limit_is_refused_at_its_prefix():
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        stream = raw.open_stream(PATH + "Stylize")
        await stream.send(prefixed(b"", length=9 * MIB))
        answer = await stream.answer(within_s=60)
        assert answer.code == "RESOURCE_EXHAUSTED" or answer.code == "RESET", answer


@pytest.mark.parametrize("method", METHODS)
async def test_a_client_that_ends_its_side_without_a_message_is_answered(method):
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        stream = raw.open_stream(PATH + method, end=True)
        answer = await stream.answer(within_s=60)
        assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")


@pytest.mark.parametrize("method", ["GetJob", "GetServerInfo", "Stylize"])
async def test_only_the_first_message_of_a_unary_call_counts(method):
    message = stylize() if method == "Stylize" else b""
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        answer = await answered(raw, method, prefixed(message), prefixed(b"\xff" * 100) * 20)
        assert answer.code == ("NOT_FOUND" if method == "GetJob" else "OK")


async def test_a_stream_does_not_keep_its_request():
    """Neither its bytes nor its room are kept while the job runs."""
    engine = FakeEngine()
    async with serving(engine) as s:
        call = await start_stream(s, engine)
        budget = s.servicer.receiver.requests.budget
        await until(lambda: budget.used == 0)
        kept = [m for m in _living_messages() if isinstance(m, pb.StylizeStreamRequest)]
        assert kept == []
        call.cancel()


def _living_messages():
    """Messages that a frame of a task or of a generator holds in a local variable."""
    for task in asyncio.all_tasks():
        for frame in _frames(task.get_coro()):
            yield from frame.f_locals.values()


def _frames(coroutine):
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        if frame is not None:
            yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)


# Time and room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"\0", prefixed(b"abc", length=100)], ids=["nothing", "one byte", "a part"])
async def test_a_message_that_does_not_come_ends_the_call(sent):
    async with serving(FakeEngine(), Limits(max_idle_s=1)) as s, connection(s.address) as raw:
        answers = await asyncio.gather(*(answered(raw, method, sent, end=False) for method in METHODS))
    for method, answer in zip(METHODS, answers, strict=True):
        assert (answer.code, answer.reason) == ("ABORTED", "SLOW_SENDER"), method
        assert "did not send a message for 1 s, although the server waited for it" in answer.message


async def test_an_upload_that_pauses_ends_and_gives_its_bytes_back():
    async with serving(FakeEngine(), Limits(max_idle_s=5)) as s, connection(s.address) as raw:
        budget = s.servicer.receiver.requests.budget
        chunk = prefixed(pb.UploadImageRequest(chunk=os.urandom(MIB)).SerializeToString())
        stream = raw.open_stream(PATH + "UploadImage")
        for _ in range(3):
            await stream.send(chunk)
        await until(lambda: budget.used > 11 * MIB)  # three chunks, and the room for the next message
        answer = await stream.answer(within_s=60)
        assert (answer.code, answer.reason) == ("ABORTED", "SLOW_SENDER")
        await until(lambda: budget.used == 0)


async def test_a_controller_may_be_silent_for_longer():
    engine = FakeEngine(iteration_s=0.01)
    async with serving(engine, Limits(max_idle_s=1)) as s:
        call = s.stub.StylizeInteractive()
        await call.write(pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec(iterations=5000))))
        await call.read()
        await asyncio.sleep(1.5)
        await call.write(pb.StylizeInteractiveRequest(command_id=7, finish=pb.FinishCommand()))
        async with asyncio.timeout(60):
            while not (message := await call.read()).HasField("command_result"):
                pass
        assert message.command_result.command_id == 7 and not message.command_result.field_errors
        call.cancel()
        await s.servicer.idle()
        assert s.servicer.receiver.commands.budget.used == 0


async def test_a_controller_that_reads_nothing_leaves_when_another_one_needs_its_place(monkeypatch):
    """Its job has ended, so it is none of the running ones, which are no more than there are places."""
    for module in ("calls", "receiving"):
        monkeypatch.setattr(f"gramophone_server.rpc.{module}.READING_S", 0.2)
    async with serving(FakeEngine(), Limits(max_running=1, max_queued=0)) as s, connection(s.address, window=0) as raw:
        budget = s.servicer.receiver.commands.budget
        start = pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=spec(iterations=1)))
        await raw.open_stream(PATH + "StylizeInteractive", hold=True).send(prefixed(start.SerializeToString()))
        await until(lambda: s.servicer.jobs.ended == 1)
        assert budget.used == budget.max_bytes
        second = await start_controller(s, spec(iterations=5))
        await second.rest()
        assert second.order[-1] == "result" and budget.promptness.of(raw.peer, budget.now()) is Standing.SLOW
        await until(lambda: raw.is_closed)
        await until(lambda: budget.used == 0)


@pytest.mark.parametrize("how", ["attach", "start again"])
async def test_a_controller_needs_no_place_for_a_job_that_has_ended(how):
    async with serving(FakeEngine(), Limits(max_running=1, max_queued=0)) as s, connection(s.address) as raw:
        request_id = str(uuid.uuid4())
        first = await start_controller(s, spec(iterations=5), request_id=request_id)
        await first.rest()
        job = s.servicer.jobs.find(first.job_id)
        assert job.ended
        again = (
            {"attach": pb.AttachCommand(job_id=job.id)}
            if how == "attach"
            else {"start": pb.StartCommand(spec=spec(iterations=5), request_id=request_id)}
        )
        streams = [raw.open_stream(PATH + "StylizeInteractive", hold=True) for _ in range(3)]
        for stream in streams:
            await stream.send(prefixed(pb.StylizeInteractiveRequest(**again).SerializeToString()))
        for stream in streams:
            assert (await stream.answer(within_s=10)).code == "OK"
        assert s.servicer.receiver.commands.budget.used == 0


async def test_calls_that_wait_for_the_job_of_their_request_id_give_way_to_others(monkeypatch):
    """With room for two large messages, that of a waiting call goes when a bystander needs it."""
    limits = replace(one_room(), max_receiving_bytes=2**25)
    async with contextlib.AsyncExitStack() as stack:
        s = await stack.enter_async_context(serving(FakeEngine(), limits))
        prepare, go = s.servicer.admission.prepare, asyncio.Event()

        async def prepare_later(*about):
            monkeypatch.setattr(s.servicer.admission, "prepare", prepare)
            await go.wait()
            return await prepare(*about)

        monkeypatch.setattr(s.servicer.admission, "prepare", prepare_later)
        request = pb.StylizeRequest(spec=spec(), request_id=str(uuid.uuid4()))
        first = s.stub.Stylize(request)
        await until(lambda: s.servicer.preparing == 1)
        request.spec.content.data = bytes(15 * MIB)
        streams = []
        for number in (1, 2):
            raw = await stack.enter_async_context(connection(s.address))
            streams.append(raw.open_stream(PATH + "Stylize"))
            await streams[-1].send(prefixed(request.SerializeToString()), end=True)
            await until(lambda number=number: s.servicer.receiver.requests.budget.used > number * 15 * MIB)
        bystander = await stack.enter_async_context(connection(s.address))
        answering = asyncio.create_task(answered(bystander, "Stylize", prefixed(stylize())))
        answers = [asyncio.create_task(stream.answer(within_s=60)) for stream in streams]
        assert (await answering).code == "OK"
        busy, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert {answer.result().reason for answer in busy} == {"SERVER_BUSY"} and len(busy) == 1
        go.set()
        assert (await first).result.image.data
        assert {(await answer).reason for answer in answers} == {"SERVER_BUSY", "REQUEST_ID_TAKEN"}


async def test_an_upload_whose_reply_is_not_read_keeps_no_room():
    async with serving(FakeEngine()) as s, connection(s.address, window=0) as raw:
        stream = raw.open_stream(PATH + "UploadImage", hold=True)
        await stream.send(prefixed(UPLOAD), end=True)
        await until(lambda: s.servicer.uploads.counts.bytes > 0)
        await until(lambda: s.servicer.receiver.requests.budget.used == 0)
        assert not stream.is_over


async def test_unfinished_messages_make_room_for_others():
    """With room for one message, four that do not arrive are ended one after another, and a bystander is served."""
    async with contextlib.AsyncExitStack() as stack:
        s = await stack.enter_async_context(serving(FakeEngine(), replace(one_room(), max_idle_s=3)))
        raws = [await stack.enter_async_context(connection(s.address)) for _ in range(4)]
        streams = [raw.open_stream(PATH + "Stylize") for raw in raws]
        for stream in streams:
            await stream.send(prefixed(b"abc", length=10 * MIB))
        await until(lambda: s.servicer.receiver.requests.budget.waiting == 3)
        bystander = await stack.enter_async_context(connection(s.address))
        assert (await answered(bystander, "Stylize", prefixed(stylize()))).code == "OK"
        answers = [await stream.answer(within_s=60) for stream in streams]
        budget = s.servicer.receiver.requests.budget
        assert budget.promptness.of(bystander.peer, budget.now()) is Standing.PROMPT
        standings = [budget.promptness.of(raw.peer, budget.now()) for raw in raws]
    assert {(answer.code, answer.reason) for answer in answers} <= {
        ("RESOURCE_EXHAUSTED", "SERVER_BUSY"),
        ("ABORTED", "SLOW_SENDER"),
    }
    busy = [answer for answer in answers if answer.reason == "SERVER_BUSY"]
    assert len(busy) >= 2 and all(answer.retry_after_s for answer in busy)
    assert [standing is Standing.SLOW for standing in standings] == [answer in busy for answer in answers]


async def test_nothing_more_than_a_window_arrives_of_a_message_that_waits_for_room():
    async with serving(FakeEngine(), one_room()) as s, connection(s.address) as first, connection(s.address) as second:
        await first.open_stream(PATH + "Stylize").send(prefixed(b"abc", length=10 * MIB))
        await until(lambda: s.servicer.receiver.requests.budget.used)
        waiting = second.open_stream(PATH + "Stylize")
        taken = waiting.send_now(prefixed(bytes(MIB), length=10 * MIB))
        await asyncio.sleep(0.2)
        taken += waiting.send_now(bytes(MIB))
        assert taken == 65535


async def test_small_calls_are_answered_while_large_messages_have_no_room():
    async with serving(FakeEngine(), one_room()) as s, connection(s.address) as raw:
        for _ in range(20):
            await raw.open_stream(PATH + "Stylize").send(prefixed(b"abc", length=10 * MIB))
        await until(lambda: s.servicer.receiver.requests.budget.waiting)
        async with asyncio.timeout(10):
            await s.stub.GetServerInfo(pb.GetServerInfoRequest())


# Calls ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            Limits(max_calls_per_connection=3),
            "this connection has 3 calls, which is the most (server setting GRAMOPHONE",
        ),
        (Limits(max_calls=3), "it has 3 calls, which is the most (server setting GRAMOPHONE_MAX_CALLS)"),
    ],
)
async def test_too_many_calls_are_refused_before_their_message_is_read(limits, words):
    async with serving(FakeEngine(), limits) as s, connection(s.address) as raw:
        open_calls = [raw.open_stream(PATH + "GetJob") for _ in range(3)]
        await until(lambda: len(s.servicer.calls) == 3)
        answer = await answered(raw, "GetJob", end=False)
        assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "SERVER_BUSY")
        assert words in answer.message and answer.retry_after_s
        open_calls[0].cancel()
        await until(lambda: len(s.servicer.calls) == 2)
        assert (await answered(raw, "GetServerInfo", prefixed(b""))).code == "OK"


async def test_another_connection_has_calls_of_its_own():
    limits = Limits(max_calls_per_connection=2)
    async with serving(FakeEngine(), limits) as s, connection(s.address) as raw:
        for _ in range(10):
            raw.open_stream(PATH + "Stylize")
        await s.stub.GetServerInfo(pb.GetServerInfoRequest())


async def test_a_call_that_is_cancelled_before_its_message_is_logged_as_cancelled(caplog):
    caplog.set_level("INFO", "gramophone_server")
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        streams = [raw.open_stream(PATH + method) for method in METHODS for _ in range(4)]  # none waits for room
        await until(lambda: len(s.servicer.calls) == len(streams))
        for stream in streams:
            stream.cancel()
        await s.servicer.idle()
    unary = [line for line in caplog.text.splitlines() if "code=" in line and "Interactive" not in line]
    assert unary and all("code=CANCELLED" in line for line in unary if "UploadImage" not in line)
    assert "failed" not in caplog.text


# Headers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GetServerInfo", "UploadImage", "Stylize"])
async def test_headers_are_bounded_before_a_client_has_acknowledged_the_settings(method):
    """gRPC holds only clients that have done so to 16 KiB."""
    async with serving(FakeEngine()) as s, connection(s.address) as raw:
        raw.pause_reading()  # so they are not acknowledged
        small, large = (
            raw.open_stream(PATH + method, [(f"x-{i}", "y" * 1000) for i in range(kilobytes)]) for kilobytes in (5, 20)
        )
        for stream in (small, large):
            await stream.send(prefixed(stylize() if method == "Stylize" else b""), end=True)
        raw.resume_reading()
        answer = await large.answer(within_s=60)
        assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
        assert "request: must have at most 16384 bytes of headers, got 20" in answer.message
        assert "headers" not in (await small.answer(within_s=60)).message
