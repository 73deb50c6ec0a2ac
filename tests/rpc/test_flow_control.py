"""Frames with acknowledgements, and clients that read slowly or not at all."""

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import AsyncGramophoneClient, FrameOptions, Paused
from gramophone_client import Frame as Seen
from gramophone_server.config import Limits
from tests.support.clock import until
from tests.support.controllers import FINISH, FRAME, Controller, slow_engine, start_controller
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.pictures import png
from tests.support.serving import SMALL_WINDOW, refused, serving, watch
from tests.support.specs import detachable_spec


async def test_only_interactive_streams_have_acknowledgements():
    words = "is only for StylizeInteractive, where frames are acknowledged, got 2"
    async with serving(FakeEngine()) as s:
        for call, field in (
            (
                s.stub.StylizeStream(pb.StylizeStreamRequest(spec=detachable_spec(5, max_in_flight=2))),
                "spec.frames.max_in_flight",
            ),
            (watch(s, "x", max_in_flight=2), "frames.max_in_flight"),
        ):
            (violation,) = (await refused(call)).BadRequest.field_violations
            assert (violation.field, violation.description) == (field, words)


async def test_the_number_of_unacknowledged_frames_is_limited():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s, detachable_spec(5000, max_in_flight=2))
        job = s.servicer.jobs.find(controller.job_id)

        async def gets(frames):
            """So many in all, and no further one during some iterations."""
            while len(controller.of("frame")) < frames:
                assert await controller.read()
            reached = job.progress.report.iteration + 200
            while controller.of("progress")[-1].iteration < reached:
                await controller.event("progress")
            return len(controller.of("frame")) == frames

        assert await gets(2)
        numbers = [event.sequence for event in controller.events if event.HasField("frame")]
        await controller.send(ack=pb.AckCommand(sequence=numbers[0] - 1))  # no frame has this number
        assert await gets(2)
        await controller.send(ack=pb.AckCommand(sequence=numbers[0]))
        assert await gets(3)
        assert controller.of("frame")[-1].dropped >= 2
        await controller.send(ack=pb.AckCommand(sequence=2**64 - 1))
        assert await gets(5)
        assert "answer" not in controller.order
        assert not await controller.errors(finish=FINISH)  # the result needs no credit
        await controller.rest()
    assert controller.order[-1] == "result"


async def test_a_reader_ten_times_too_slow_gets_new_frames():
    """Its connection could buffer 8 MB, about 80 of these frames."""
    engine = NoisyEngine(256, iteration_s=0.005)
    wanted = detachable_spec(5000, max_in_flight=1)
    wanted.recipe.size = 256
    async with serving(engine) as s:
        controller = Controller(s.stub)
        await controller.send(start=pb.StartCommand(spec=wanted))
        await controller.event("frame")
        for _ in range(3):
            await iterations_of(engine, 200)
            acknowledged_at = engine.iterations
            await controller.send(ack=pb.AckCommand(sequence=controller.events[-1].sequence))
            frame = await controller.event("frame")
            assert frame.iteration >= acknowledged_at and frame.dropped >= 5


async def unread_frames(updates, engine):
    """How many frames a client reads before it learns that its job is paused. The last of them is the newest one."""
    frames = []
    while not isinstance(update := await anext(updates), Paused):
        frames += [update.iteration] if isinstance(update, Seen) else []
    assert frames[-1] == max(engine.snapshot_times)
    return len(frames)


async def test_a_slow_controller_of_the_client_library_lags_by_less_than_three_frames():
    engine = NoisyEngine(64, iteration_s=0.005)
    async with (
        serving(engine) as s,
        AsyncGramophoneClient(s.address) as client,
        client.control(png(), png(), size=64, smallest_size=0, iterations=5000) as job,
    ):
        for _ in range(5):
            await iterations_of(engine, 100)
            await job.pause()
            assert await unread_frames(job, engine) <= 3
            await job.resume()


async def test_a_slow_reader_of_small_frames_lags_by_less_than_three():
    """The stream has no acknowledgements, and its connection could buffer five frames."""
    engine = NoisyEngine(64, iteration_s=0.005)
    async with serving(engine) as s, AsyncGramophoneClient(s.address) as client:
        updates = client.stream(
            png(), png(), size=64, smallest_size=0, iterations=5000, frames=FrameOptions(format="png")
        )
        async with updates:
            job_id = (await anext(updates)).job_id
            async with client.control_job(job_id, frames=None) as control:
                for _ in range(5):
                    await iterations_of(engine, 100)
                    await control.pause()
                    assert await unread_frames(updates, engine) <= 3
                    await control.resume()


async def iterations_of(engine, count):
    """Returns after this many further iterations."""
    reached = engine.iterations + count
    await until(lambda: engine.iterations >= reached)


def small_window_channel(s):
    """A channel that buffers at most 64 KiB of unread messages."""
    return grpc.aio.insecure_channel(s.address, options=SMALL_WINDOW)


async def test_a_flood_of_commands_delays_only_its_sender():
    engine = NoisyEngine(256, iteration_s=0.001)
    async with serving(engine) as s, small_window_channel(s) as channel:
        controller = await start_controller(s, stub=pb_grpc.StyleTransferServiceStub(channel))
        for _ in range(40):
            await controller.send(frame=FRAME)  # 200 KB each
        other = await start_controller(s)
        assert not await other.errors(finish=FINISH)
        await iterations_of(engine, 500)
        (job,) = [job for job in s.servicer.jobs.newest_first() if job.id == controller.job_id]
        assert len(engine.snapshot_times) <= 5 and job.unread <= 4
        assert not await controller.errors(finish=FINISH)
        await controller.rest()
    assert len(controller.of("frame")) == 40
    assert not any(answer.field_errors for answer in controller.answers.values())


async def test_a_controller_that_reads_nothing_is_ended_and_loses_control():
    engine = NoisyEngine(512, iteration_s=0.005)
    async with serving(engine, Limits(max_blocked_s=1)) as s, small_window_channel(s) as channel:
        controller = await start_controller(s, stub=pb_grpc.StyleTransferServiceStub(channel))
        job = s.servicer.jobs.find(controller.job_id)
        for _ in range(5):
            await controller.send(frame=FRAME)
        await controller.send(finish=FINISH)
        await until(lambda: not job.watchers)
        assert not job.controlled
        await s.servicer.idle()
        assert not job.ended  # its last command was not executed
        got = await refused(controller.rest())
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.ABORTED, "SLOW_READER")
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job.id))
