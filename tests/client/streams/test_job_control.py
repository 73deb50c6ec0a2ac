import asyncio
import threading

import grpc
import pytest

from gramophone.recipe import LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import FrameOptions, JobControl, SyncGramophoneClient, SyncJobControl, errors
from gramophone_client.streams import recovery_states
from gramophone_server import errors as server_errors
from tests.support.fake_service import (
    HANG,
    Take,
    accepted,
    bare,
    changed,
    checkpoint,
    encoded,
    frame,
    numbered,
    picture,
    progress,
    refused,
    result,
)

PHOTO, PAINTING = encoded("red"), encoded("yellow")
NEVER = (("grpc-retry-pushback-ms", "-1"),)  # no retries by gRPC itself, for the sake of time
LOST = bare(grpc.StatusCode.UNAVAILABLE, "gone")
BUSY = bare(grpc.StatusCode.UNAVAILABLE, "still gone", NEVER)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.01, 0.05))


def kinds(told):
    return [type(update).__name__ for update in told]


def commands(service):
    return [message.WhichOneof("command") for message in service.messages]


async def test_a_job_is_controlled_while_nobody_iterates(client, service):
    paused, resumed = pb.JobEvent(paused=pb.Paused(iteration=3)), pb.JobEvent(resumed=pb.Resumed(iteration=3))
    service.scripts = [
        [accepted(), progress(3), Take(4), paused, Take(4), changed(4, beta=9.0), Take(4), resumed, Take(5), result()]
    ]
    async with client.control(PHOTO, PAINTING, frames=None, beta=2.0) as job:
        assert job.accepted.job_id == "j1"
        assert await job.pause() == 4
        assert await job.update(beta=9.0, style_layers=[LayerWeight("relu1_1", 2)], iterations=40) == 4
        assert await job.resume() == 4
        assert await job.finish() == 5
        assert (await job.result()).iterations == 300
        told = [update async for update in job]
    assert kinds(told) == ["Accepted", "Progress", "Paused", "Changed", "Resumed", "Result"]
    assert (told[2].iteration, told[3].recipe.beta, told[4].iteration) == (3, 9.0, 3)
    assert commands(service) == ["start", "pause", "update", "resume", "finish"]
    start, _, update, *_ = service.messages
    assert (start.start.spec.recipe.beta, len(start.start.request_id)) == (2.0, 36)
    assert start.start.spec.checkpoints.light and not start.start.spec.HasField("frames")
    assert update.update == pb.UpdateCommand(
        beta=9, iterations=40, style_layers=pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1", weight=2)])
    )
    assert len({message.command_id for message in service.messages[1:]}) == 4


async def test_a_job_is_controlled_while_somebody_iterates(client, service):
    service.scripts = [[accepted(), progress(1), Take(2), changed(2, beta=5.0), progress(2), result()]]
    told = []
    async with client.control(PHOTO, PAINTING) as job:
        async for update in job:
            told.append(update)
            if kinds(told[-1:]) == ["Progress"] and update.iteration == 1:
                assert await job.update(beta=5) == 2
    assert kinds(told) == ["Accepted", "Progress", "Changed", "Progress", "Result"]


async def test_a_bad_command_tells_its_fields_and_ends_nothing(client, service):
    service.scripts = [[accepted(), Take(wrong="must be between 0 and 1e+15, got -1"), Take(3), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        with pytest.raises(errors.InvalidRequest, match=r"update\.beta: must be between 0 and") as raised:
            await job.update(beta=-1)
        assert raised.value.violations == (Violation("update.beta", "must be between 0 and 1e+15, got -1"),)
        assert await job.update(beta=1) == 3
        assert (await job.result()).stop_reason == "ITERATIONS_DONE"


async def test_what_cannot_be_said_is_not_sent(client, service):
    service.scripts = [[accepted(), Take(2), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        with pytest.raises(errors.InvalidRequest, match="size cannot be changed while a job runs; alpha, beta, "):
            await job.update(size=3)
        with pytest.raises(errors.InvalidRequest, match="does not fit into the request"):
            await job.update(iterations=2**40)
        await job.pause()
    assert commands(service) == ["start", "pause"]


async def test_a_picture_and_a_state_come_to_who_asked(client, service):
    service.scripts = [
        [
            *numbered(accepted(), frame(8)),
            Take(9, taken=picture(9)),
            checkpoint(9),
            Take(10, taken=checkpoint(10, light=False)),
            result(),
        ]
    ]
    async with client.control(PHOTO, PAINTING, frames=FrameOptions()) as job:
        taken = await job.picture()
        assert (taken.iteration, taken.picture.format, taken.picture.width) == (9, "png", 24)
        state = await job.checkpoint()
        assert (state.iteration, state.light, state.data) == (10, False, b"state after 10")
        told = [update async for update in job]
    assert kinds(told) == ["Accepted", "Frame", "Checkpoint", "Result"]  # the job's own, not those that were asked for
    assert (told[1].iteration, told[2].iteration) == (8, 9)
    assert commands(service) == ["start", "frame", "checkpoint"]


async def test_frames_are_acknowledged_as_they_arrive_and_only_the_newest_waits(client, service):
    service.scripts = [[*numbered(accepted(), frame(1), frame(2)), Take(), Take(), *numbered(result())]]
    async with client.control(PHOTO, PAINTING) as job:
        while len(service.messages) < 3:  # though nobody takes one
            await asyncio.sleep(0.005)
        told = [update async for update in job]
    assert kinds(told) == ["Accepted", "Frame", "Result"]
    assert (told[1].iteration, told[1].dropped) == (2, 5)  # two each in front of them, and the older one
    assert service.messages[0].start.spec.frames.max_in_flight == 2
    assert [message.ack.sequence for message in service.messages[1:]] == [2, 3]


async def test_updates_that_nobody_takes_make_room(client, service):
    service.scripts = [
        [accepted(), *(progress(i) for i in range(1, 200)), checkpoint(3), checkpoint(7), Take(), result()]
    ]
    async with client.control(PHOTO, PAINTING) as job:
        await job.pause()
        told = [update async for update in job]
    assert kinds(told) == ["Accepted", "Progress", "Checkpoint", "Result"]
    assert (told[1].iteration, told[2].iteration) == (199, 7)


async def test_a_job_that_is_there_is_taken_over(client, service):
    service.scripts = [[accepted(attached=True), Take(8), HANG]]
    async with client.control_job("j1", frames=FrameOptions(max_side=64, max_in_flight=3)) as job:
        assert await job.pause() == 8
    attach = service.messages[0].attach
    assert (attach.job_id, attach.frames.max_side, attach.frames.max_in_flight) == ("j1", 64, 3)
    assert not attach.HasField("checkpoints")
    assert await asyncio.to_thread(service.over.wait, 5)
    assert service.cancelled  # leaving gives the job up


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (server_errors.JobControlled("j1"), "job 'j1' already has a controller"),
        (server_errors.TooManyWatchers(8), "already has 8 watchers"),
        (server_errors.JobNotFound("j1"), "there is no job 'j1'"),
    ],
)
async def test_entering_raises_what_the_server_has_against_it(client, service, error, words):
    status = refused(error)
    service.scripts = [[status]]
    with pytest.raises(errors.GramophoneError, match=words) as raised:
        async with client.control_job("j1"):
            pytest.fail("came in")
    assert type(raised.value).__name__ == type(error).__name__


async def test_an_error_of_the_job_ends_iteration_and_commands(client, service):
    service.scripts = [[accepted(), frame(4), checkpoint(4), Take(5), refused(server_errors.Diverged(5))]]
    async with client.control(PHOTO, PAINTING) as job:
        await job.pause()
        with pytest.raises(errors.Diverged, match="iteration 5") as raised:
            await job.result()
        assert (raised.value.frame.iteration, raised.value.checkpoint.iteration) == (4, 4)
        for command in (job.resume, job.picture, job.finish):
            with pytest.raises(errors.Diverged):
                await command()
        told = []
        with pytest.raises(errors.Diverged):
            async for update in job:
                told.append(update)
        assert kinds(told) == ["Accepted", "Frame", "Checkpoint"]


async def test_a_command_after_the_result_is_told_so(client, service):
    service.scripts = [[accepted(), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        await job.result()
        for command in (job.pause, job.picture):
            with pytest.raises(errors.JobEnded, match="ended with its result before it took the command"):
                await command()


async def test_a_command_under_way_gets_the_jobs_error(client, service):
    service.scripts = [[accepted(), HANG]]
    async with client.control(PHOTO, PAINTING, timeout_s=0.5) as job:
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.5 s"):
            await job.pause()


async def test_a_lost_connection_is_an_error_with_the_last_state(client, service):
    service.scripts = [[accepted(), checkpoint(6), Take(6), bare(grpc.StatusCode.UNAVAILABLE, "gone")]]
    async with client.control(PHOTO, PAINTING, patience_s=0) as job:
        await job.pause()
        with pytest.raises(errors.ConnectionFailed, match="gone") as raised:
            await job.result()
    assert raised.value.checkpoint.iteration == 6


async def test_giving_up_on_a_command_leaves_the_job_alone(client, service):
    service.scripts = [[accepted(), HANG]]
    async with client.control(PHOTO, PAINTING) as job:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job.pause(), 0.1)
        assert not service.over.is_set()


@pytest.mark.parametrize(
    ("end", "kind"),
    [(refused(server_errors.Cancelled()), errors.Cancelled), (refused(server_errors.Diverged(3)), errors.Diverged)],
    ids=["cancelled", "diverged"],
)
async def test_commands_that_race_the_end_do_not_hide_it(client, service, end, kind):
    # gRPC would forget the status when a write races it, which these do more often than not.
    for _ in range(10):
        service.scripts = [[*numbered(accepted(), frame(2)), Take(), end], [end]]
        async with client.control(PHOTO, PAINTING) as job:
            told = await asyncio.gather(*(job.update(beta=float(i)) for i in range(30)), return_exceptions=True)
            with pytest.raises(kind) as raised:
                await job.result()
        assert told[0] == 1
        assert {type(one) for one in told[1:]} == {kind}
        assert raised.value.frame.iteration == 2
    assert service.watches == []  # nobody had to ask again


async def test_a_result_that_commands_race_is_there(client, service):
    for _ in range(10):
        told = numbered(accepted(), result())
        service.scripts = [[told[0], Take(), told[1]], [told[1]]]
        async with client.control(PHOTO, PAINTING) as job:
            await asyncio.gather(*(job.update(beta=float(i)) for i in range(30)), return_exceptions=True)
            assert (await job.result()).iterations == 300


# --- a lost server, a lost connection


async def test_a_lost_job_goes_on_with_what_its_commands_had_changed(client, service):
    paused, resumed = pb.JobEvent(paused=pb.Paused(iteration=9)), pb.JobEvent(resumed=pb.Resumed(iteration=9))
    layers = [LayerWeight("relu1_1", 2), LayerWeight("relu2_1", 3)]
    service.scripts = [
        [accepted(), checkpoint(5), *(Take(6) for _ in range(5)), resumed, paused, LOST],
        [accepted(job_id="j2", resumed_at=5), Take(7), Take(7), Take(8), result()],
    ]
    async with client.control(PHOTO, PAINTING, frames=None) as job:
        await job.update(beta=9.0, alpha=2.0, style_layers=layers)
        await job.update(beta=4.0, style_layers=layers[::-1])
        await job.pause()
        await job.resume()
        await job.pause()
        while job.accepted.job_id == "j1":
            await asyncio.sleep(0.01)
        assert await job.resume() == 8
        assert (await job.result()).iterations == 300
        told = [update async for update in job]
    assert (told[-2].job_id, told[-2].resumed_at) == ("j2", 5) and kinds(told[-1:]) == ["Result"]
    assert [message.WhichOneof("command") for message in service.messages[6:]] == ["start", "update", "pause", "resume"]
    again, update = service.messages[6:8]
    assert again.start.spec.resume == b"state after 5" and not again.start.spec.HasField("recipe")
    assert again.start.request_id != service.messages[0].start.request_id
    reweighted = [pb.LayerWeight(layer=layer, weight=weight) for layer, weight in layers[::-1]]
    assert update.update == pb.UpdateCommand(alpha=2, beta=4, style_layers=pb.LayerWeights(layers=reweighted))


async def test_commands_given_meanwhile_wait_for_the_job(client, service):
    service.scripts = [
        [accepted(), checkpoint(5), Take(6, taken=None), LOST],  # the picture was promised and has not come
        [BUSY],
        [accepted(job_id="j2", resumed_at=5), Take(7, taken=picture(7)), Take(8), Take(9, wrong="is wrong"), result()],
    ]
    async with client.control(PHOTO, PAINTING, frames=None) as job:
        taking = asyncio.create_task(job.picture())
        while len(service.specs) < 2:
            await asyncio.sleep(0.005)
        changing = asyncio.create_task(job.update(beta=3.0))
        assert (await taking).iteration == 7
        assert await changing == 8
        with pytest.raises(errors.InvalidRequest, match=r"pause\.beta: is wrong"):
            await job.pause()
        await job.result()
    assert commands(service) == ["start", "frame", "start", "start", "frame", "update", "pause"]


async def test_what_had_been_changed_and_is_refused_after_a_loss_ends_the_control(client, service):
    service.scripts = [
        [accepted(), checkpoint(5), Take(6), LOST],
        [accepted(job_id="j2", resumed_at=5), Take(7, wrong="must be between 0 and 5"), HANG],
    ]
    async with client.control(PHOTO, PAINTING, frames=None) as job:
        await job.update(beta=9.0)
        with pytest.raises(
            errors.InvalidRequest, match=r"sent again, and .* refused there: update\.beta: must"
        ) as raised:
            await job.result()
    assert raised.value.checkpoint.iteration == 5


@pytest.mark.parametrize(
    "refusal", [None, server_errors.JobControlled("j1")], ids=["at once", "the server has not seen the loss"]
)
async def test_a_lost_connection_is_made_again_during_the_grace(client, service, refusal):
    first, second, *rest = numbered(accepted(), progress(1), progress(2), result())
    service.scripts = [
        [first, second, Take(3), LOST],
        *([[refused(refusal)]] if refusal is not None else []),
        [Take(3), *rest],
    ]
    async with client.control(PHOTO, PAINTING, frames=None, detach_grace=5) as job:
        assert await job.pause() == 3
        while not any(message.HasField("attach") for message in service.messages):
            await asyncio.sleep(0.005)
        assert await job.resume() == 3
        told = [update async for update in job]
    assert [update.sequence for update in told] in ([1, 3, 4], [1, 2, 3, 4])  # progress may make room
    attach = service.messages[2].attach
    assert (attach.job_id, attach.after_sequence, attach.checkpoints.light) == ("j1", 2, True)
    assert len(service.specs) == 1


async def test_a_job_that_somebody_else_has_taken_over_is_not_sent_again(client, service):
    service.scripts = [[accepted(), checkpoint(5), LOST], [refused(server_errors.JobControlled("j1"))]]
    async with client.control(PHOTO, PAINTING, detach_grace=0.3) as job:
        with pytest.raises(errors.ConnectionFailed, match="gone"):
            await job.result()
    assert len(service.specs) == 1


async def test_leaving_during_the_search_ends_it(client, service):
    service.scripts = [[accepted(), LOST], [BUSY]]
    async with client.control(PHOTO, PAINTING) as job:
        while len(service.specs) < 3:
            await asyncio.sleep(0.005)
        pausing = asyncio.create_task(job.pause())
        await asyncio.sleep(0)
    with pytest.raises(errors.Cancelled, match="the control of the job was given up"):
        await pausing
    asked = len(service.specs)
    await asyncio.sleep(0.1)
    assert len(service.specs) == asked


async def test_a_job_that_was_taken_over_is_found_again_but_never_sent(client, service):
    service.scripts = [[*numbered(accepted(attached=True)), LOST], numbered(accepted(), result())]
    async with client.control_job("j1", detach_grace=5) as job:
        await job.result()
    assert [message.attach.after_sequence for message in service.messages] == [0, 1]
    service.scripts = [[accepted(attached=True), LOST]]
    async with client.control_job("j1") as job:
        with pytest.raises(errors.ConnectionFailed, match="gone"):
            await job.result()


def test_the_synchronous_face_controls_too(service):
    service.scripts = [[accepted(), Take(4), Take(4, taken=picture(4)), Take(5), result()]]
    with SyncGramophoneClient(service.target) as client, client.control(PHOTO, PAINTING) as job:
        assert job.accepted.job_id == "j1"
        told = []
        watching = threading.Thread(target=lambda: told.extend(job))
        watching.start()
        assert job.update(beta=3.0) == 4
        assert job.picture().iteration == 4
        assert job.finish() == 5
        assert job.result().picture.width == 24
        watching.join(5)
    assert kinds(told) == ["Accepted", "Result"]


def test_the_synchronous_control_has_every_method():
    public = [name for name in vars(JobControl) if not name.startswith("_")]
    assert len(public) >= 7
    assert all(hasattr(SyncJobControl, name) for name in public)
