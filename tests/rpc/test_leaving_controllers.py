"""Controllers that leave, and what they leave."""

import asyncio
import gc
import random

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server.config import Limits
from tests.support.clock import until
from tests.support.controllers import (
    FINISH,
    FRAME,
    PAUSE,
    RESUME,
    Controller,
    attach_controller,
    slow_engine,
    start_controller,
)
from tests.support.engines import FakeEngine, NoisyEngine
from tests.support.serving import SMALL_WINDOW, own_tasks, serving
from tests.support.specs import spec


@pytest.mark.parametrize("how", ["cancel", "disconnect", "during a command"])
async def test_a_controller_that_leaves_stops_its_job(how):
    engine = slow_engine()
    async with serving(engine) as s:
        tasks = own_tasks()
        controller = await start_controller(s, spec(5000))
        if how == "during a command":
            await controller.send(checkpoint=pb.CheckpointCommand())
        if how == "disconnect":
            await s.channel.close()
        else:
            controller.call.cancel()
        await until(lambda: s.scheduler.running == 0)
        await s.servicer.idle()
        assert engine.iterations < 5000
        await until(lambda: own_tasks() <= tasks)


async def test_a_client_that_leaves_before_its_first_message_leaves_nothing():
    async with serving(FakeEngine()) as s:
        call = s.stub.StylizeInteractive()
        await call.wait_for_connection()
        await until(lambda: s.servicer.calls)
        call.cancel()
        await s.servicer.idle()
        assert len(s.servicer.jobs) == 0


async def test_the_command_of_a_controller_that_has_left_is_not_executed():
    engine = slow_engine()
    async with serving(engine) as s:
        controller = await start_controller(s)
        job_id = controller.job_id
        engine.go.clear()
        engine.under_way.clear()
        await until(engine.under_way.is_set)
        before = list(engine.taken_at)
        for _ in range(3):
            await controller.send(frame=FRAME)
            await until(lambda: s.scheduler.pending_commands)
            controller.call.cancel()
            await until(lambda: not s.scheduler.pending_commands and not s.servicer.calls)
            controller = await attach_controller(s, job_id)
        engine.go.set()
        assert not (await controller.ask(checkpoint=pb.CheckpointCommand())).field_errors
        assert engine.taken_at == before
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job_id))


def small_window_channel(s):
    """A channel that buffers at most 64 KiB of unread messages."""
    return grpc.aio.insecure_channel(s.address, options=SMALL_WINDOW)


async def test_a_controller_that_leaves_while_a_frame_is_written_stops_its_job(caplog):
    engine = NoisyEngine(512, iteration_s=0.001)
    wanted = spec(5000)
    wanted.frames.format = pb.IMAGE_FORMAT_PNG
    async with serving(engine) as s, small_window_channel(s) as channel:
        tasks = own_tasks()
        controller = Controller(pb_grpc.StyleTransferServiceStub(channel))
        await controller.send(start=pb.StartCommand(spec=wanted))
        await controller.event("accepted")
        await until(lambda: len(engine.snapshot_times) >= 2)
        await controller.send(frame=FRAME)
        controller.call.cancel()
        await until(lambda: s.scheduler.running == 0)
        assert engine.iterations < 5000
        await s.servicer.idle()
        gc.collect()
        await until(lambda: own_tasks() <= tasks)
    assert not [r for r in caplog.records if r.name.startswith("gramophone") and r.levelname == "ERROR"]


async def test_60_controllers_that_leave_at_random_times_leave_nothing():
    chance = random.Random(1)
    async with serving(FakeEngine(iteration_s=0.001), Limits(max_queued=60, max_kept=0)) as s:
        before = own_tasks()

        async def one(number):
            controller = Controller(s.stub)
            try:
                async with asyncio.timeout(chance.uniform(0, 1.5) if number % 2 else None):
                    await controller.send(start=pb.StartCommand(spec=spec(50)))
                    await controller.event("accepted")
                    for command in ({"pause": PAUSE}, {"frame": FRAME}, {"resume": RESUME}, {"finish": FINISH}):
                        await controller.ask(**command)
                    await controller.rest()
            except (TimeoutError, AssertionError):  # of `read`, or the job ended before the commands
                controller.call.cancel()
            return controller.order[-1:] == ["result"]

        ends = await asyncio.gather(*map(one, range(60)))
        assert all(ends[::2])
        await until(lambda: not s.scheduler.running + s.scheduler.queued + s.scheduler.paused)
        await s.servicer.idle()
        assert not s.servicer.calls
        await until(lambda: own_tasks() <= before and len(s.servicer.jobs) == 0)


async def test_cancel_job_also_ends_the_stream_of_the_controller():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=controller.job_id))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.rest()
    assert caught.value.code() is grpc.StatusCode.ABORTED
