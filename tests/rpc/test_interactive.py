"""One client that controls a job while others watch it."""

import asyncio
import io
import uuid

import grpc
import pytest
from google.protobuf import duration_pb2
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits
from gramophone_server.domain.commands import Done
from gramophone_server.domain.events import Frame, Picture
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
from tests.support.engines import FakeEngine
from tests.support.serving import events_of, refused, serving, watch
from tests.support.specs import detachable_spec, spec

NAN = float("nan")


async def test_a_job_is_paused_and_resumed_and_all_watchers_are_notified():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        watcher = asyncio.create_task(events_of(watch(s, controller.job_id)))
        paused = await controller.ask(pause=PAUSE)
        assert not paused.field_errors
        job = s.servicer.jobs.find(controller.job_id)
        await until(lambda: job.phase.name == "PAUSED")
        got = await s.stub.GetJob(pb.GetJobRequest(job_id=controller.job_id))
        assert got.job.state == pb.JOB_STATE_PAUSED
        paused_at = job.progress.report.iteration
        assert paused.iteration == paused_at + 1
        await s.stub.Stylize(pb.StylizeRequest(spec=spec()))  # the engine iterates, but not for this job
        assert job.progress.report.iteration == paused_at
        assert not (await controller.ask(pause=PAUSE)).field_errors  # already paused
        resumed = await controller.ask(resume=RESUME)
        assert (resumed.iteration, list(resumed.field_errors)) == (paused_at + 1, [])
        await until(lambda: job.progress.report.iteration > paused_at)
        assert job.phase.name == "RUNNING"
        await controller.ask(finish=FINISH)
        await controller.rest()
        events = await watcher
    for received in (events, controller.events):
        assert [e.paused.iteration for e in received if e.HasField("paused")] == [paused_at]
        assert [e.resumed.iteration for e in received if e.HasField("resumed")] == [paused_at]
    assert next(event for event in controller.events if event.HasField("paused")) in events


async def test_an_update_takes_effect_from_the_reported_iteration():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        accepted = controller.of("accepted")[0]
        assert accepted.recipe.beta == 3.0
        update = pb.UpdateCommand(beta=50.0, tv_weight=0.0, step=0.5, iterations=4000)
        update.style_layers.layers.extend(
            pb.LayerWeight(layer=l.layer, weight=2.0) for l in accepted.recipe.style_layers.layers
        )
        answer = await controller.ask(update=update)
        assert not answer.field_errors
        await controller.event("progress", iterations=4000)
        (changed,) = controller.of("changed")
        assert (changed.iteration, changed.iterations) == (answer.iteration, 4000)
        recipe = changed.recipe
        assert (recipe.alpha, recipe.beta, recipe.tv_weight, recipe.step) == (1.0, 50.0, 0.0, 0.5)
        assert {layer.weight for layer in recipe.style_layers.layers} == {2.0}
        for progress in controller.of("progress"):
            beta = 50.0 if progress.iteration >= changed.iteration else 3.0
            assert progress.losses.style == pytest.approx(beta / progress.iteration)
        assert (await s.stub.GetJob(pb.GetJobRequest(job_id=controller.job_id))).job.iterations == 4000
        await controller.ask(finish=FINISH)
        await controller.rest()
        replayed = await events_of(watch(s, controller.job_id))
        assert replayed[0].accepted.recipe == accepted.recipe  # the recipe as admitted
        assert [event.changed for event in replayed if event.HasField("changed")] == [changed]


async def test_finish_ends_the_job_with_the_present_picture_and_its_reason():
    engine = slow_engine()
    async with serving(engine) as s:
        controller = await start_controller(s)
        answer = await controller.ask(finish=FINISH)
        await controller.rest()
        (result,) = controller.of("result")
        assert controller.order[-1] == "result" and "answer" in controller.order
        assert (result.stop_reason, result.iterations) == (pb.STOP_REASON_FINISHED, answer.iteration)
        job = (await s.stub.GetJob(pb.GetJobRequest(job_id=controller.job_id))).job
        assert (job.state, job.stop_reason) == (pb.JOB_STATE_SUCCEEDED, pb.STOP_REASON_FINISHED)
    assert engine.iterations < 5000
    assert await controller.call.code() is grpc.StatusCode.OK


async def test_a_requested_frame_is_full_size_and_lossless_and_only_for_the_controller():
    async with serving(slow_engine()) as s:
        wanted = detachable_spec(5000, max_side=16, every_iterations=100_000, format=pb.IMAGE_FORMAT_JPEG)
        controller = await start_controller(s, wanted)
        watcher = watch(s, controller.job_id, every_iterations=100_000)
        await watcher.read()
        answer = await controller.ask(frame=FRAME)
        assert not controller.of("frame")  # the answer comes first
        frame = await controller.event("frame")
        assert frame.iteration == answer.iteration
        assert (frame.image.format, frame.image.width, frame.image.height) == (pb.IMAGE_FORMAT_PNG, 64, 32)
        with Image.open(io.BytesIO(frame.image.data)) as image:
            assert image.getpixel((0, 0)) == (min(255, frame.iteration),) * 3
        await controller.ask(finish=FINISH)
        await controller.rest()
        assert not [event for event in await events_of(watcher) if event.HasField("frame")]
    numbers = [event.sequence for event in controller.events]
    assert numbers == sorted(set(numbers))


LAYERS = pb.LayerWeights(layers=[pb.LayerWeight(layer="relu4_2", weight=-1.0)])


INVALID = {
    "alpha": ({"update": pb.UpdateCommand(alpha=-1.0)}, "update.alpha", "must be between 0 and 1e+15, got -1"),
    "nan": ({"update": pb.UpdateCommand(beta=NAN)}, "update.beta", "must be between 0 and 1e+15, got nan"),
    "layers": (
        {"update": pb.UpdateCommand(style_layers=pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1")]))},
        "update.style_layers",
        "must name the job's layers, relu1_1, relu2_1, relu3_1, relu4_1, relu5_1, got relu1_1",
    ),
    "layer weight": (
        {"update": pb.UpdateCommand(content_layers=LAYERS)},
        "update.content_layers[0].weight",
        "must be between 0 and 1e+06, got -1",
    ),
    "too many": (
        {"update": pb.UpdateCommand(iterations=5001)},
        "update.iterations",
        "would make 5001 over all scales; at most 5000 are allowed (server setting GRAMOPHONE_MAX_ITERATIONS)",
    ),
    "nothing": ({"update": pb.UpdateCommand()}, "update", "changes nothing; set one of its fields"),
    "another start": (
        {"start": pb.StartCommand()},
        "start",
        "can only be the first message; open another stream for another job",
    ),
    "attach": (
        {"attach": pb.AttachCommand()},
        "attach",
        "can only be the first message; open another stream for another job",
    ),
    "of a newer client": ({}, "command", "is not known to this server; GetServerInfo reports its version"),
}


@pytest.mark.parametrize("case", INVALID)
async def test_an_invalid_command_is_answered_with_its_field_and_ends_nothing(case):
    command, field, words = INVALID[case]
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        assert await controller.errors(**command) == {field: words}
        assert not controller.of("changed")
        await controller.event("progress")
        assert not await controller.errors(finish=FINISH)
        await controller.rest()
    assert controller.order[-1] == "result"


async def test_all_violations_of_an_update_are_reported_at_once():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        assert (await controller.errors(update=pb.UpdateCommand(alpha=-1.0, step=NAN))).keys() == {
            "update.alpha",
            "update.step",
        }


async def test_fewer_iterations_than_completed_are_refused():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)
        await controller.event("progress", iterations=5000)
        errors = await controller.errors(update=pb.UpdateCommand(iterations=1))
    assert errors["update.iterations"].startswith("must be at least the ")


async def test_a_queued_job_can_be_updated_and_paused_but_has_no_picture():
    async with serving(slow_engine(), Limits(max_running=1)) as s:
        ahead = await start_controller(s)
        controller = Controller(s.stub)
        await controller.send(start=pb.StartCommand(spec=detachable_spec(5)))
        await controller.event("accepted")
        words = "the job has not started yet; wait for its first progress"
        for command in ({"frame": FRAME}, {"checkpoint": pb.CheckpointCommand()}, {"finish": FINISH}):
            assert await controller.errors(**command) == dict.fromkeys(command, words)
        assert (await controller.ask(update=pb.UpdateCommand(beta=9.0))).iteration == 1
        assert not await controller.errors(pause=PAUSE)
        await ahead.ask(finish=FINISH)
        await ahead.rest()
        job = s.servicer.jobs.find(controller.job_id)
        assert (s.scheduler.paused, job.phase.name, job.started_at) == (1, "PAUSED", None)
        assert not await controller.errors(resume=RESUME)
        await controller.rest()
    assert controller.of("changed")[0].recipe.beta == 9.0
    assert controller.order[-1] == "result"


async def test_commands_near_the_end_are_answered_before_the_result():
    for iterations in (1, 2, 3, 5, 20):
        async with serving(FakeEngine(iteration_s=0.001)) as s:
            controller = Controller(s.stub)
            await controller.send(start=pb.StartCommand(spec=detachable_spec(iterations)))
            await controller.event("accepted")
            for command in ({"frame": FRAME}, {"pause": PAUSE}, {"resume": RESUME}, {"finish": FINISH}):
                await controller.send(**command)
            await controller.rest()
            assert await controller.call.code() is grpc.StatusCode.OK
            assert controller.order.count("result") == 1 and controller.order[-1] == "result"
            answered = sorted(controller.answers)
            assert answered == list(range(2, 2 + len(answered)))  # in order, and none left out
            numbers = [event.sequence for event in controller.events]
            assert numbers == sorted(set(numbers))


async def test_a_frame_that_was_taken_when_the_job_ended_is_too_late():
    async with serving(slow_engine()) as s:
        controller = await start_controller(s, detachable_spec(100))
        job = s.servicer.jobs.find(controller.job_id)

        async def late():
            await until(lambda: job.ended)
            return Done(100, Frame(100, Picture(None, 1, 1)))

        s.scheduler.command = lambda observer, command: late()
        assert await controller.errors(frame=FRAME) == {"frame": "came too late: the job has ended"}
        assert not controller.of("result")
        await controller.rest()
    assert controller.order[-1] == "result" and not controller.of("frame")


@pytest.mark.parametrize(
    ("first", "field", "words"),
    [
        ({"pause": PAUSE}, "command", "the first message must be start or attach, got pause"),
        ({}, "command", "the first message must be start or attach, got an unknown one"),
        (None, "command", "the first message must be start or attach, got none"),
        (
            {"attach": pb.AttachCommand(frames=pb.FrameOptions(max_in_flight=17))},
            "attach.frames.max_in_flight",
            "must be 0 to 16, got 17",
        ),
        (
            {
                "attach": pb.AttachCommand(
                    checkpoints=pb.CheckpointOptions(min_interval=duration_pb2.Duration(seconds=3601))
                )
            },
            "attach.checkpoints.min_interval",
            "must be 0 to 3600 seconds, got 3601",
        ),
        (
            {"start": pb.StartCommand(spec=spec(), request_id="mine")},
            "request_id",
            "must be a UUID of 36 characters, or empty, got 'mine'",
        ),
        (
            {"start": pb.StartCommand(spec=detachable_spec(5, max_in_flight=-1))},
            "spec.frames.max_in_flight",
            "must be 0 to 16, got -1",
        ),
    ],
)
async def test_an_invalid_first_message_ends_the_stream(first, field, words):
    async with serving(FakeEngine()) as s:
        call = s.stub.StylizeInteractive()
        if first is None:
            await call.done_writing()
        else:
            await call.write(pb.StylizeInteractiveRequest(**first))
        got = await refused(call)
    assert got.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [(v.field, v.description) for v in got.BadRequest.field_violations] == [(field, words)]


async def test_a_job_has_one_controller_at_a_time():
    async with serving(slow_engine()) as s:
        first = await start_controller(s)
        second = await attach_controller(s, first.job_id)
        got = await refused(second.rest())
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_CONTROLLED")
        assert got.message == f"job '{first.job_id}' already has a controller; WatchJob can still watch it"
        job = s.servicer.jobs.find(first.job_id)
        assert job.watchers == 1
        first.call.cancel()
        await until(lambda: not job.watchers)
        third = await attach_controller(s, first.job_id, after_sequence=1)
        assert not await third.errors(pause=PAUSE)
        assert not await third.errors(finish=FINISH)
        await third.rest()
    assert third.order[-1] == "result" and "paused" in third.order and "accepted" not in third.order


async def test_a_controller_that_closes_its_side_keeps_watching():
    async with serving(slow_engine()) as s:
        first = await start_controller(s)
        first.end()
        job = s.servicer.jobs.find(first.job_id)
        await until(lambda: not job.controlled)
        second = await attach_controller(s, first.job_id)
        await second.ask(finish=FINISH)
        await asyncio.gather(first.rest(), second.rest())
    assert first.order[-1] == second.order[-1] == "result"
    assert await first.call.code() is grpc.StatusCode.OK


async def test_a_start_with_the_same_request_id_finds_its_job():
    start = pb.StartCommand(spec=detachable_spec(5000), request_id=str(uuid.uuid4()))
    async with serving(slow_engine()) as s:
        first = await start_controller(s, request_id=start.request_id)
        first.call.cancel()
        await until(lambda: not s.servicer.jobs.find(first.job_id).watchers)
        second = Controller(s.stub)
        await second.send(start=start)
        accepted = await second.event("accepted")
        assert (accepted.job_id, accepted.attached) == (first.job_id, True)
        start.spec.frames.quality = 101
        third = Controller(s.stub)
        await third.send(start=start)
        (violation,) = (await refused(third.rest())).BadRequest.field_violations
        assert (violation.field, violation.description[-7:]) == ("spec.frames.quality", "got 101")
        assert not await second.errors(finish=FINISH)


async def test_a_job_that_has_ended_can_be_attached_to():
    async with serving(FakeEngine()) as s:
        job_id = (await s.stub.Stylize(pb.StylizeRequest(spec=detachable_spec(5)))).accepted.job_id
        controller = await attach_controller(s, job_id)
        await controller.rest()
    assert controller.order[0] == "accepted" and controller.order[-1] == "result"


async def test_the_number_of_watchers_is_limited():
    async with serving(slow_engine(), Limits(max_watchers=2)) as s:
        controller = await start_controller(s)
        second = watch(s, controller.job_id)
        assert (await second.read()).event.HasField("accepted")
        got = await refused(watch(s, controller.job_id))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        assert got.message == "the job already has 2 watchers, and more are not allowed"
        await controller.ask(finish=FINISH)
        await controller.rest()
        assert (await events_of(watch(s, controller.job_id)))[-1].HasField("result")


async def test_a_defect_in_a_command_ends_the_stream_with_a_status(caplog):
    async with serving(slow_engine()) as s:
        controller = await start_controller(s)

        def broken(observer, command):
            raise ZeroDivisionError("secret")

        s.scheduler.command = broken
        await controller.send(pause=PAUSE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.rest()
        got = caught.value
    assert got.code() is grpc.StatusCode.INTERNAL and "secret" not in got.details()
    assert "secret" in caplog.text
