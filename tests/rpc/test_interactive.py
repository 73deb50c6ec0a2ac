"""One client that controls a job while others watch it, over a real connection."""

import asyncio
import contextlib
import gc
import io
import random
import time
import uuid

import grpc
import pytest
from google.protobuf import duration_pb2
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_client import Frame as Seen
from gramophone_client import FrameOptions, GramophoneClient
from gramophone_server.config import Limits
from gramophone_server.domain.commands import Done
from gramophone_server.domain.events import Frame, Picture, SavedState, Waiting
from gramophone_server.rpc.responses import Encoders, JobEventStream
from tests.support.clock import until
from tests.support.engines import CHECKPOINTS, FakeEngine, NoisyEngine
from tests.support.pictures import png
from tests.support.serving import SMALL_WINDOW, events_of, own_tasks, refused, serving, watch
from tests.support.specs import detachable_spec, spec

NAN = float("nan")
LIMITS = Limits()
PAUSE, RESUME, FINISH, FRAME = pb.PauseCommand(), pb.ResumeCommand(), pb.FinishCommand(), pb.FrameCommand()


class Controller:
    """A controller's stream, of which a test reads what it waits for; the rest is in `events` and `answers`."""

    def __init__(self, stub):
        self.call = stub.StylizeInteractive()
        self.sent = 0
        self.events, self.answers = [], {}
        self.order = []  # of what came: kinds of events, and "answer"

    async def send(self, **command):
        self.sent += 1
        await self.call.write(pb.StylizeInteractiveRequest(command_id=self.sent, **command))
        return self.sent

    async def read(self):
        """Whether there was one more message."""
        async with asyncio.timeout(10):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            return False
        if response.HasField("event"):
            self.events.append(response.event)
            self.order.append(response.event.WhichOneof("event"))
        else:
            self.answers[response.command_result.command_id] = response.command_result
            self.order.append("answer")
        return True

    async def ask(self, **command):
        """The answer to a command."""
        number = await self.send(**command)
        while number not in self.answers:
            assert await self.read(), "the stream ended without the answer"
        return self.answers[number]

    async def errors(self, **command):
        """What is wrong with a command: descriptions by field."""
        return {error.field: error.description for error in (await self.ask(**command)).field_errors}

    async def event(self, kind, **fields):
        """The next event of this kind, with these fields."""
        while await self.read():
            if self.order[-1] == kind:
                event = getattr(self.events[-1], kind)
                if all(getattr(event, name) == value for name, value in fields.items()):
                    return event
        raise AssertionError(f"the stream ended without {kind}")

    async def rest(self):
        while await self.read():
            pass

    def of(self, kind):
        return [getattr(event, kind) for event in self.events if event.HasField(kind)]

    @property
    def job_id(self):
        return self.of("accepted")[0].job_id


async def started(s, wanted=None, stub=None, **start):
    """A controller whose job has done its first iterations."""
    controller = Controller(stub or s.stub)
    await controller.send(start=pb.StartCommand(spec=wanted or detachable_spec(5000), **start))
    await controller.event("progress")
    return controller


async def attached(s, job_id, **options):
    controller = Controller(s.stub)
    await controller.send(attach=pb.AttachCommand(job_id=job_id, **options))
    return controller


def slow():
    return FakeEngine(iteration_s=0.002)


# Commands -------------------------------------------------------------------------------------------------------------


async def test_a_job_stands_still_and_goes_on_and_everybody_hears_of_it():
    async with serving(slow()) as s:
        controller = await started(s)
        watcher = asyncio.create_task(events_of(watch(s, controller.job_id)))
        paused = await controller.ask(pause=PAUSE)
        assert not paused.field_errors
        job = s.servicer.jobs.find(controller.job_id)
        await until(lambda: job.phase.name == "PAUSED")
        got = await s.stub.GetJob(pb.GetJobRequest(job_id=controller.job_id))
        assert got.job.state == pb.JOB_STATE_PAUSED
        stood = job.progress.report.iteration
        assert paused.iteration == stood + 1
        await asyncio.sleep(0.05)
        assert job.progress.report.iteration == stood
        assert not (await controller.ask(pause=PAUSE)).field_errors  # it is already
        resumed = await controller.ask(resume=RESUME)
        assert (resumed.iteration, list(resumed.field_errors)) == (stood + 1, [])
        await until(lambda: job.progress.report.iteration > stood)
        assert job.phase.name == "RUNNING"
        await controller.ask(finish=FINISH)
        await controller.rest()
        events = await watcher
    for told in (events, controller.events):
        assert [e.paused.iteration for e in told if e.HasField("paused")] == [stood]
        assert [e.resumed.iteration for e in told if e.HasField("resumed")] == [stood]
    assert next(event for event in controller.events if event.HasField("paused")) in events


async def test_other_weights_hold_from_the_iteration_that_is_told():
    async with serving(slow()) as s:
        controller = await started(s)
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
        assert replayed[0].accepted.recipe == accepted.recipe  # what was admitted stays what it was
        assert [event.changed for event in replayed if event.HasField("changed")] == [changed]


async def test_the_end_now_has_the_present_picture_and_says_why():
    engine = slow()
    async with serving(engine) as s:
        controller = await started(s)
        answer = await controller.ask(finish=FINISH)
        await controller.rest()
        (result,) = controller.of("result")
        assert controller.order[-1] == "result" and "answer" in controller.order
        assert (result.stop_reason, result.iterations) == (pb.STOP_REASON_FINISHED, answer.iteration)
        job = (await s.stub.GetJob(pb.GetJobRequest(job_id=controller.job_id))).job
        assert (job.state, job.stop_reason) == (pb.JOB_STATE_SUCCEEDED, pb.STOP_REASON_FINISHED)
    assert engine.iterations < 5000
    assert await controller.call.code() is grpc.StatusCode.OK


async def test_a_picture_now_is_whole_and_lossless_and_for_nobody_else():
    async with serving(slow()) as s:
        wanted = detachable_spec(5000, max_side=16, every_iterations=100_000, format=pb.IMAGE_FORMAT_JPEG)
        controller = await started(s, wanted)
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


@pytest.mark.parametrize("light", [True, False])
async def test_a_checkpoint_now_is_one(light):
    async with serving(slow()) as s:
        controller = await started(s)
        answer = await controller.ask(checkpoint=pb.CheckpointCommand(light=light))
        saved = await controller.event("checkpoint")
        await controller.ask(finish=FINISH)
    assert (saved.iteration, saved.light) == (answer.iteration, light)
    read = CHECKPOINTS.read(saved.data, most_bytes=LIMITS.max_checkpoint_bytes)
    assert (read.counts["done"], read.width, read.height) == (saved.iteration, 64, 32)


async def test_a_checkpoint_that_is_too_large_is_refused_with_its_size():
    async with serving(slow(), Limits(max_checkpoint_bytes=2**16)) as s:
        controller = await started(s)
        told = await controller.errors(checkpoint=pb.CheckpointCommand())
        assert not await controller.errors(checkpoint=pb.CheckpointCommand(light=True))
    assert told.keys() == {"checkpoint"}
    assert "at most 65536 are allowed; a light one is smaller" in told["checkpoint"]


LAYERS = pb.LayerWeights(layers=[pb.LayerWeight(layer="relu4_2", weight=-1.0)])
BAD = {
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


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_command_is_answered_with_the_field_and_ends_nothing(case):
    command, field, words = BAD[case]
    async with serving(slow()) as s:
        controller = await started(s)
        assert await controller.errors(**command) == {field: words}
        assert not controller.of("changed")
        await controller.event("progress")
        assert not await controller.errors(finish=FINISH)
        await controller.rest()
    assert controller.order[-1] == "result"


async def test_every_violation_of_an_update_is_told_at_once():
    async with serving(slow()) as s:
        controller = await started(s)
        assert (await controller.errors(update=pb.UpdateCommand(alpha=-1.0, step=NAN))).keys() == {
            "update.alpha",
            "update.step",
        }


async def test_fewer_iterations_than_were_done_are_refused():
    async with serving(slow()) as s:
        controller = await started(s)
        await controller.event("progress", iterations=5000)
        told = await controller.errors(update=pb.UpdateCommand(iterations=1))
    assert told["update.iterations"].startswith("must be at least the ")


async def test_a_job_that_waits_can_be_changed_and_paused_but_has_no_picture_yet():
    async with serving(slow(), Limits(max_running=1)) as s:
        ahead = await started(s)
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


async def test_commands_on_the_heels_of_the_end_are_answered_before_the_result():
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


async def test_a_picture_that_was_taken_when_the_job_ended_comes_too_late():
    async with serving(slow()) as s:
        controller = await started(s, detachable_spec(100))
        job = s.servicer.jobs.find(controller.job_id)

        async def late():
            await until(lambda: job.ended)
            return Done(100, Frame(100, Picture(None)))

        s.scheduler.command = lambda listener, command: late()
        assert await controller.errors(frame=FRAME) == {"frame": "came too late: the job has ended"}
        assert not controller.of("result")
        await controller.rest()
    assert controller.order[-1] == "result" and not controller.of("frame")


# The first message, and who may control -------------------------------------------------------------------------------


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
async def test_a_bad_first_message_ends_the_stream(first, field, words):
    async with serving(FakeEngine()) as s:
        call = s.stub.StylizeInteractive()
        if first is None:
            await call.done_writing()
        else:
            await call.write(pb.StylizeInteractiveRequest(**first))
        got = await refused(call)
    assert got.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [(v.field, v.description) for v in got.BadRequest.field_violations] == [(field, words)]


async def test_frames_are_acknowledged_on_this_stream_only():
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


async def test_a_job_has_one_controller_and_the_next_one_comes_when_it_has_left():
    async with serving(slow()) as s:
        first = await started(s)
        second = await attached(s, first.job_id)
        got = await refused(second.rest())
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_CONTROLLED")
        assert got.message == f"job '{first.job_id}' already has a controller; WatchJob can still watch it"
        job = s.servicer.jobs.find(first.job_id)
        assert job.watchers == 1
        first.call.cancel()
        await until(lambda: not job.watchers)
        third = await attached(s, first.job_id, after_sequence=1)
        assert not await third.errors(pause=PAUSE)
        assert not await third.errors(finish=FINISH)
        await third.rest()
    assert third.order[-1] == "result" and "paused" in third.order and "accepted" not in third.order


async def test_a_controller_that_closes_its_side_watches_on():
    async with serving(slow()) as s:
        first = await started(s)
        await first.call.done_writing()
        job = s.servicer.jobs.find(first.job_id)
        await until(lambda: not job.controlled)
        second = await attached(s, first.job_id)
        await second.ask(finish=FINISH)
        await asyncio.gather(first.rest(), second.rest())
    assert first.order[-1] == second.order[-1] == "result"
    assert await first.call.code() is grpc.StatusCode.OK


async def test_the_same_start_finds_its_job_again():
    start = pb.StartCommand(spec=detachable_spec(5000), request_id=str(uuid.uuid4()))
    async with serving(slow()) as s:
        first = await started(s, request_id=start.request_id)
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
        controller = await attached(s, job_id)
        await controller.rest()
    assert controller.order[0] == "accepted" and controller.order[-1] == "result"


async def test_as_many_watch_as_may():
    async with serving(slow(), Limits(max_watchers=2)) as s:
        controller = await started(s)
        second = watch(s, controller.job_id)
        assert (await second.read()).event.HasField("accepted")
        got = await refused(watch(s, controller.job_id))
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        assert got.message == "the job already has 2 watchers, and more are not allowed"
        await controller.ask(finish=FINISH)
        await controller.rest()
        assert (await events_of(watch(s, controller.job_id)))[-1].HasField("result")


# Frames that are acknowledged -----------------------------------------------------------------------------------------


async def test_no_more_frames_are_on_their_way_than_may():
    async with serving(slow()) as s:
        controller = await started(s, detachable_spec(5000, max_in_flight=2))
        job = s.servicer.jobs.find(controller.job_id)

        async def after(iterations):
            reached = job.progress.report.iteration + iterations
            while controller.of("progress")[-1].iteration < reached:
                await controller.event("progress")
            return len(controller.of("frame"))

        assert await after(300) == 2
        numbers = [event.sequence for event in controller.events if event.HasField("frame")]
        await controller.send(ack=pb.AckCommand(sequence=numbers[0] - 1))  # of none
        assert await after(100) == 2
        await controller.send(ack=pb.AckCommand(sequence=numbers[0]))
        assert await after(200) == 3
        assert controller.of("frame")[-1].dropped >= 2
        await controller.send(ack=pb.AckCommand(sequence=2**64 - 1))
        assert await after(300) == 5
        assert "answer" not in controller.order
        assert not await controller.errors(finish=FINISH)  # the result needs no credit
        await controller.rest()
    assert controller.order[-1] == "result"


async def test_a_reader_ten_times_too_slow_sees_what_is_new():
    """Its connection would hold some 8 MB, which are 80 of these frames."""
    engine = NoisyEngine(256, iteration_s=0.005)
    wanted = detachable_spec(5000, max_in_flight=1)
    wanted.recipe.size = 256
    ages = []
    async with serving(engine) as s:
        controller = Controller(s.stub)
        await controller.send(start=pb.StartCommand(spec=wanted))
        for _ in range(4):
            frame = await controller.event("frame")
            ages.append(time.monotonic() - engine.snapshot_times[frame.iteration])
            await asyncio.sleep(1.0)
            await controller.send(ack=pb.AckCommand(sequence=controller.events[-1].sequence))
    assert max(ages) < 0.3
    assert controller.of("frame")[-1].dropped >= 5


async def test_a_slow_controller_of_the_client_library_is_less_than_three_behind():
    engine, behind = NoisyEngine(64, iteration_s=0.005), []
    async with (
        serving(engine) as s,
        GramophoneClient(s.address) as client,
        client.control(png(), png(), size=64, smallest_size=0, iterations=5000) as job,
    ):
        async for update in job:
            if isinstance(update, Seen):
                behind.append(sum(iteration > update.iteration for iteration in engine.snapshot_times))
                if len(behind) == 5:
                    break
                await asyncio.sleep(0.5)
    assert max(behind) < 3, behind


async def test_a_slow_reader_of_small_frames_is_less_than_three_behind():
    """Their stream has no acknowledgements, and its connection would hold five of them."""
    engine, behind = NoisyEngine(64, iteration_s=0.005), []
    async with serving(engine) as s, GramophoneClient(s.address) as client:
        updates = client.stream(
            png(), png(), size=64, smallest_size=0, iterations=5000, frames=FrameOptions(format="png")
        )
        async with contextlib.aclosing(updates):
            while len(behind) < 5:
                if isinstance(update := await anext(updates), Seen):
                    behind.append(sum(iteration > update.iteration for iteration in engine.snapshot_times))
                    await asyncio.sleep(0.5)
    assert max(behind) < 3, behind


# Checkpoints ----------------------------------------------------------------------------------------------------------


def saving(wanted, light=False, seconds=0):
    wanted.checkpoints.CopyFrom(pb.CheckpointOptions(light=light, min_interval=duration_pb2.Duration(seconds=seconds)))
    return wanted


async def test_each_watcher_has_the_checkpoints_that_it_asked_for():
    async with serving(slow()) as s:
        first = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=saving(detachable_spec(800))))
        job_id = (await first.read()).event.accepted.job_id
        light = pb.CheckpointOptions(light=True)
        second = s.stub.WatchJob(pb.WatchJobRequest(job_id=job_id, checkpoints=light))
        told = await asyncio.gather(events_of(first), events_of(second), events_of(watch(s, job_id)))
    full, light, none = ([event.checkpoint for event in events if event.HasField("checkpoint")] for events in told)
    assert not none
    for saved, is_light in ((full, False), (light, True)):
        assert 1 <= len(saved) <= 4  # at most one a second
        assert all(one.light is is_light for one in saved)
        for one in saved:
            read = CHECKPOINTS.read(one.data, most_bytes=LIMITS.max_checkpoint_bytes)
            assert read.counts["done"] == one.iteration


async def test_a_state_is_written_once_for_all():
    written, encoders = [], Encoders()
    state = SavedState(light=True, write=lambda: written.append(1) or b"state")
    assert await asyncio.gather(*(encoders.write_checkpoint(state) for _ in range(3))) == [b"state"] * 3
    assert len(written) == 1
    encoders.close()


@pytest.mark.parametrize("light", [True, False])
async def test_a_server_that_goes_away_sends_the_picture_and_the_state_to_all(light):
    async with serving(slow()) as s:
        controller = await started(s, saving(detachable_spec(5000), light, seconds=3600))
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
            CHECKPOINTS.read(saved.checkpoint.data, most_bytes=LIMITS.max_checkpoint_bytes)


async def test_a_wait_is_told_where_one_was_measured():
    view = JobEventStream(None, None, None)
    measured, unknown = [
        (await view.response(pb.WatchJobResponse, 3, Waiting(2, wait_s))).event.waiting for wait_s in (1.5, None)
    ]
    assert measured.queue_position == unknown.queue_position == 2
    assert measured.estimated_wait.ToMilliseconds() == 1500 and not unknown.HasField("estimated_wait")


# Clients that leave, or do not read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "disconnect", "in the middle of a command"])
async def test_a_controller_that_leaves_stops_its_job(how):
    engine = slow()
    async with serving(engine) as s:
        controller = await started(s, spec(5000))
        if how == "in the middle of a command":
            await controller.send(checkpoint=pb.CheckpointCommand())
        if how == "disconnect":
            await s.channel.close()
        else:
            controller.call.cancel()
        await until(lambda: s.scheduler.running == 0)
        await s.servicer.idle()
        assert engine.iterations < 5000
        await until(lambda: not [task for task in asyncio.all_tasks() if "_read_commands" in repr(task)])


async def test_a_client_that_leaves_before_its_first_message_leaves_nothing():
    async with serving(FakeEngine()) as s:
        call = s.stub.StylizeInteractive()
        await call.wait_for_connection()
        await until(lambda: s.servicer.calls)
        call.cancel()
        await s.servicer.idle()
        assert len(s.servicer.jobs) == 0


def stingy(s):
    """A channel that takes no more than 64 KiB unread."""
    return grpc.aio.insecure_channel(s.address, options=SMALL_WINDOW)


async def test_a_controller_that_leaves_while_a_frame_is_written_stops_its_job(caplog):
    engine = NoisyEngine(512, iteration_s=0.001)
    wanted = spec(5000)
    wanted.frames.format = pb.IMAGE_FORMAT_PNG
    async with serving(engine) as s, stingy(s) as channel:
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
        await until(lambda: not [task for task in asyncio.all_tasks() if "_read_commands" in repr(task)])
    assert not [r for r in caplog.records if r.name.startswith("gramophone") and r.levelname == "ERROR"]


async def test_a_flood_of_commands_waits_at_its_own_door():
    engine = NoisyEngine(256, iteration_s=0.001)
    async with serving(engine) as s, stingy(s) as channel:
        controller = await started(s, stub=pb_grpc.StyleTransferServiceStub(channel))
        for _ in range(40):
            await controller.send(frame=FRAME)  # 200 KB each
        other = await started(s)
        assert not await other.errors(finish=FINISH)
        await asyncio.sleep(0.5)
        (job,) = [job for job in s.servicer.jobs.newest_first() if job.id == controller.job_id]
        assert len(engine.snapshot_times) <= 5 and job.unread <= 4
        assert not await controller.errors(finish=FINISH)
        await controller.rest()
    assert len(controller.of("frame")) == 40
    assert not any(answer.field_errors for answer in controller.answers.values())


async def test_a_controller_that_reads_nothing_is_dropped_and_loses_control():
    engine = NoisyEngine(512, iteration_s=0.005)
    async with serving(engine, Limits(max_blocked_s=1)) as s, stingy(s) as channel:
        controller = await started(s, stub=pb_grpc.StyleTransferServiceStub(channel))
        job = s.servicer.jobs.find(controller.job_id)
        for _ in range(5):
            await controller.send(frame=FRAME)
        await controller.send(finish=FINISH)
        await until(lambda: not job.watchers)
        assert not job.controlled
        await s.servicer.idle()
        assert not job.ended  # what it said last was never done
        got = await refused(controller.rest())
        assert (got.code, got.ErrorInfo.reason) == (grpc.StatusCode.ABORTED, "SLOW_READER")
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=job.id))


async def test_of_60_controllers_who_leave_whenever_nothing_is_left():
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
            except (TimeoutError, AssertionError):  # of `read`, or the job was quicker than the commands
                controller.call.cancel()
            return controller.order[-1:] == ["result"]

        ends = await asyncio.gather(*map(one, range(60)))
        assert all(ends[::2])
        await until(lambda: not s.scheduler.running + s.scheduler.queued + s.scheduler.paused)
        await s.servicer.idle()
        assert not s.servicer.calls
        await until(lambda: own_tasks() <= before and len(s.servicer.jobs) == 0)


async def test_cancel_job_ends_the_controllers_stream_too():
    async with serving(slow()) as s:
        controller = await started(s)
        await s.stub.CancelJob(pb.CancelJobRequest(job_id=controller.job_id))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.rest()
    assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_a_defect_in_carrying_out_a_command_ends_the_stream_with_a_status(caplog):
    async with serving(slow()) as s:
        controller = await started(s)

        def broken(listener, command):
            raise ZeroDivisionError("secret")

        s.scheduler.command = broken
        await controller.send(pause=PAUSE)
        got = None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await controller.rest()
        got = caught.value
    assert got.code() is grpc.StatusCode.INTERNAL and "secret" not in got.details()
    assert "secret" in caplog.text
