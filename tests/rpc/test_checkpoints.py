"""Checkpoints on demand, at intervals, and at the end of a server."""

import asyncio
import time

import grpc
import pytest
from google.protobuf import duration_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from tests.support.clock import until
from tests.support.controllers import (
    FINISH,
    slow_engine,
    start_controller,
)
from tests.support.engines import CHECKPOINTS
from tests.support.serving import events_of, serving, start_detachable, watch
from tests.support.specs import detachable_spec

LIMITS = Limits()


@pytest.mark.parametrize("light", [True, False])
async def test_a_requested_checkpoint_is_valid(light):
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        answer = await controller.ask(checkpoint=pb.CheckpointCommand(light=light))
        saved = await controller.event("checkpoint")
        await controller.ask(finish=FINISH)
    assert (saved.iteration, saved.light) == (answer.iteration, light)
    read = CHECKPOINTS.read(saved.data, max_bytes=LIMITS.max_checkpoint_bytes)
    assert (read.counts["done"], read.width, read.height) == (saved.iteration, 64, 32)


async def test_a_checkpoint_that_is_too_large_is_refused_with_its_size():
    async with serving(slow_engine(), Limits(max_checkpoint_bytes=2**16)) as s:
        controller = await start_controller(s)
        errors = await controller.errors(checkpoint=pb.CheckpointCommand())
        assert not await controller.errors(checkpoint=pb.CheckpointCommand(light=True))
    assert errors.keys() == {"checkpoint"}
    assert "at most 65536 are allowed; a light one is smaller" in errors["checkpoint"]


def with_checkpoints(wanted, light=False, seconds=0):
    wanted.checkpoints.CopyFrom(pb.CheckpointOptions(light=light, min_interval=duration_pb2.Duration(seconds=seconds)))
    return wanted


async def test_each_watcher_gets_the_checkpoints_that_it_wants():
    engine = slow_engine()
    async with serving(engine) as s:
        first, job_id = await start_detachable(s, engine, with_checkpoints(detachable_spec(800)))
        light = pb.CheckpointOptions(light=True)
        second = s.stub.WatchJob(pb.WatchJobRequest(job_id=job_id, checkpoints=light))
        third = watch(s, job_id)
        await until(lambda: s.servicer.jobs.find(job_id).watchers == 3)
        started_at = time.monotonic()
        engine.go.set()
        received = await asyncio.gather(*map(events_of, (first, second, third)))
        took_s = time.monotonic() - started_at
    full, light, none = ([event.checkpoint for event in events if event.HasField("checkpoint")] for events in received)
    assert not none
    for saved, is_light in ((full, False), (light, True)):
        assert 1 <= len(saved) <= took_s + 1  # at most one a second
        assert all(one.light is is_light for one in saved)
        for one in saved:
            read = CHECKPOINTS.read(one.data, max_bytes=LIMITS.max_checkpoint_bytes)
            assert read.counts["done"] == one.iteration


@pytest.mark.parametrize("light", [True, False])
async def test_a_server_that_shuts_down_sends_picture_and_checkpoint_to_all_watchers(light):
    async with serving(slow_engine()) as s:
        controller = await start_controller(s, with_checkpoints(detachable_spec(5000), light, seconds=3600))
        watcher = watch(s, controller.job_id)
        await watcher.read()
        done = s.servicer.jobs.find(controller.job_id).progress.report.iteration
        s.scheduler.stop()
        for call in (controller.call, watcher):
            events = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while (response := await call.read()) is not grpc.aio.EOF:
                    events.append(response.event)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert caught.value.details().startswith("the server is shutting down")
            *_, frame, saved = events
            assert frame.frame.iteration == saved.checkpoint.iteration >= done
            assert saved.checkpoint.light is light
            CHECKPOINTS.read(saved.checkpoint.data, max_bytes=LIMITS.max_checkpoint_bytes)
