import asyncio

import grpc
import pytest

from gramophone.recipe import LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import FrameOptions, errors
from gramophone_client.transport.connection import Connection
from gramophone_server import errors as server_errors
from tests.support.clock import WITHIN_S, until
from tests.support.fake_service import (
    HANG,
    LOST,
    NO_RETRIES,
    PAINTING,
    PHOTO,
    Answer,
    accepted,
    changed,
    checkpoint,
    frame,
    numbered,
    picture,
    progress,
    refused,
    result,
    rpc_status,
)
from tests.support.updates import collected, kinds

pytestmark = pytest.mark.usefixtures("short_pauses")


STILL_LOST = rpc_status(grpc.StatusCode.UNAVAILABLE, "still gone", NO_RETRIES)


async def test_a_job_is_controlled_without_an_iteration(client, service):
    paused, resumed = pb.JobEvent(paused=pb.Paused(iteration=3)), pb.JobEvent(resumed=pb.Resumed(iteration=3))
    service.scripts = [
        [
            accepted(),
            progress(3),
            Answer(4),
            paused,
            Answer(4),
            changed(4, beta=9.0),
            Answer(4),
            resumed,
            Answer(5),
            result(),
        ]
    ]
    async with client.control(PHOTO, PAINTING, frames=None, beta=2.0) as job:
        assert job.accepted.job_id == "j1"
        assert await job.pause() == 4
        assert await job.update(beta=9.0, style_layers=[LayerWeight("relu1_1", 2)], iterations=40) == 4
        assert await job.resume() == 4
        assert await job.finish() == 5
        assert (await job.result()).iterations == 300
        updates = await collected(job)
    assert kinds(updates) == ["Accepted", "Progress", "Paused", "Changed", "Resumed", "Result"]
    assert (updates[2].iteration, updates[3].recipe.beta, updates[4].iteration) == (3, 9.0, 3)
    assert service.commands == ["start", "pause", "update", "resume", "finish"]
    start, _, update, *_ = service.messages
    assert (start.start.spec.recipe.beta, len(start.start.request_id)) == (2.0, 36)
    assert start.start.spec.checkpoints.light and not start.start.spec.HasField("frames")
    assert update.update == pb.UpdateCommand(
        beta=9, iterations=40, style_layers=pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1", weight=2)])
    )
    assert len({message.command_id for message in service.messages[1:]}) == 4


async def test_a_job_is_controlled_during_an_iteration(client, service):
    service.scripts = [[accepted(), progress(1), Answer(2), changed(2, beta=5.0), progress(2), result()]]
    updates = []
    async with client.control(PHOTO, PAINTING) as job:
        async for update in job:
            updates.append(update)
            if kinds(updates[-1:]) == ["Progress"] and update.iteration == 1:
                assert await job.update(beta=5) == 2
    assert kinds(updates) == ["Accepted", "Progress", "Changed", "Progress", "Result"]


async def test_a_bad_command_names_its_fields_and_ends_nothing(client, service):
    service.scripts = [[accepted(), Answer(error="is too large for this server"), Answer(3), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        with pytest.raises(errors.InvalidRequestError, match=r"update\.beta: is too large") as raised:
            await job.update(beta=2)
        assert raised.value.violations == (Violation("update.beta", "is too large for this server"),)
        assert await job.update(beta=1) == 3
        assert (await job.result()).stop_reason == "ITERATIONS_DONE"


async def test_values_that_do_not_fit_are_not_sent(client, service):
    service.scripts = [[accepted(), Answer(2), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        with pytest.raises(errors.InvalidRequestError, match=r"^size: cannot be changed while a job runs; .*; beta: "):
            await job.update(size=3, beta=-1)
        await job.pause()
    assert service.commands == ["start", "pause"]


async def test_pictures_and_states_are_returned_to_their_caller(client, service):
    service.scripts = [
        [
            *numbered(accepted(), frame(8)),
            Answer(9, output=picture(9)),
            checkpoint(9),
            Answer(10, output=checkpoint(10, light=False)),
            result(),
        ]
    ]
    async with client.control(PHOTO, PAINTING, frames=FrameOptions()) as job:
        taken = await job.picture()
        assert (taken.iteration, taken.picture.format, taken.picture.width) == (9, "png", 24)
        state = await job.checkpoint()
        assert (state.iteration, state.light, state.data) == (10, False, b"state after 10")
        with pytest.raises(errors.InvalidRequestError, match="light: must be True or False, got 'no'"):
            await job.checkpoint(light="no")
        updates = await collected(job)
    # Without the outputs of commands.
    assert kinds(updates) == ["Accepted", "Frame", "Checkpoint", "Result"]
    assert (updates[1].iteration, updates[2].iteration) == (8, 9)
    assert service.commands == ["start", "frame", "checkpoint"]


async def test_frames_are_acknowledged_as_they_arrive_and_only_the_newest_waits(client, service):
    service.scripts = [[*numbered(accepted(), frame(1), frame(2)), Answer(), Answer(), *numbered(result())]]
    async with client.control(PHOTO, PAINTING) as job:
        await until(lambda: len(service.messages) == 3)  # without an iteration that takes them
        updates = await collected(job)
    assert kinds(updates) == ["Accepted", "Frame", "Result"]
    assert (updates[1].iteration, updates[1].dropped) == (2, 5)  # two per frame by the server, and the older frame
    assert service.messages[0].start.spec.frames.max_in_flight == 2
    assert [message.ack.sequence for message in service.messages[1:]] == [2, 3]


async def test_updates_that_are_not_taken_are_replaced(client, service):
    service.scripts = [
        [accepted(), *(progress(i) for i in range(1, 200)), checkpoint(3), checkpoint(7), Answer(), result()]
    ]
    async with client.control(PHOTO, PAINTING) as job:
        await job.pause()
        updates = await collected(job)
    assert kinds(updates) == ["Accepted", "Progress", "Checkpoint", "Result"]
    assert (updates[1].iteration, updates[2].iteration) == (199, 7)


async def test_an_existing_job_is_controlled(client, service):
    service.scripts = [[accepted(attached=True), Answer(8), HANG]]
    async with client.control_job("j1", frames=FrameOptions(max_side=64, max_in_flight=3)) as job:
        assert await job.pause() == 8
    attach = service.messages[0].attach
    assert (attach.job_id, attach.frames.max_side, attach.frames.max_in_flight) == ("j1", 64, 3)
    assert not attach.HasField("checkpoints")
    assert await asyncio.to_thread(service.call_ended.wait, 5)
    assert service.cancelled  # leaving ends the call


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (server_errors.JobControlled("j1"), "job 'j1' already has a controller"),
        (server_errors.TooManyWatchers(8), "already has 8 watchers"),
        (server_errors.JobNotFound("j1"), "there is no job 'j1'"),
    ],
)
async def test_entering_raises_the_servers_refusal(client, service, error, words):
    status = refused(error)
    service.scripts = [[status]]
    with pytest.raises(errors.GramophoneError, match=words) as raised:
        async with client.control_job("j1"):
            pytest.fail("the block was entered")
    assert type(raised.value).__name__ == f"{type(error).__name__}Error"


async def test_an_error_of_the_job_ends_iteration_and_commands(client, service):
    service.scripts = [[accepted(), frame(4), checkpoint(4), Answer(5), refused(server_errors.Diverged(5))]]
    async with client.control(PHOTO, PAINTING) as job:
        await job.pause()
        with pytest.raises(errors.DivergedError, match="iteration 5") as raised:
            await job.result()
        assert (raised.value.frame.iteration, raised.value.checkpoint.iteration) == (4, 4)
        for command in (job.resume, job.picture, job.finish):
            with pytest.raises(errors.DivergedError):
                await command()
        updates = []
        with pytest.raises(errors.DivergedError):
            async for update in job:
                updates.append(update)
        assert kinds(updates) == ["Accepted", "Frame", "Checkpoint"]


async def test_a_command_after_the_result_is_an_error(client, service):
    service.scripts = [[accepted(), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        await job.result()
        for command in (job.pause, job.picture):
            with pytest.raises(errors.JobEndedError, match="ended with its result before it took the command"):
                await command()


async def test_a_pending_command_raises_the_jobs_error(client, service):
    service.scripts = [[accepted(), HANG]]
    async with client.control(PHOTO, PAINTING, timeout=3.0) as job:
        with pytest.raises(errors.DeadlineExceededError, match=r"\b3 s"):
            await job.pause()


async def test_a_lost_connection_is_an_error_with_the_last_state(client, service):
    service.scripts = [[accepted(), checkpoint(6), Answer(6), LOST]]
    async with client.control(PHOTO, PAINTING, patience=0) as job:
        await job.pause()
        with pytest.raises(errors.ConnectionFailedError, match="gone") as raised:
            await job.result()
    assert raised.value.checkpoint.iteration == 6


async def test_giving_up_on_a_command_leaves_the_job_alone(client, service):
    service.scripts = [[accepted(), HANG]]
    async with client.control(PHOTO, PAINTING) as job:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job.pause(), 0.1)
        assert not service.call_ended.is_set()


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (refused(server_errors.Cancelled()), errors.CallCancelledError),
        (refused(server_errors.Diverged(3)), errors.DivergedError),
    ],
    ids=["cancelled", "diverged"],
)
async def test_commands_that_race_the_end_do_not_hide_it(client, service, end, kind):
    # Most of these writes race the end of the call, and with gRPC's own way to send would replace its status.
    for _ in range(10):
        service.scripts = [[*numbered(accepted(), frame(2)), Answer(), end], [end]]
        async with client.control(PHOTO, PAINTING) as job:
            outcomes = await asyncio.gather(*(job.update(beta=float(i)) for i in range(30)), return_exceptions=True)
            with pytest.raises(kind) as raised:
                await job.result()
        assert outcomes[0] == 1
        assert {type(outcome) for outcome in outcomes[1:]} == {kind}
        assert raised.value.frame.iteration == 2
    assert service.watches == []  # no second call was needed


async def test_commands_that_race_the_result_do_not_hide_it(client, service):
    for _ in range(10):
        first, last = numbered(accepted(), result())
        service.scripts = [[first, Answer(), last], [last]]
        async with client.control(PHOTO, PAINTING) as job:
            await asyncio.gather(*(job.update(beta=float(i)) for i in range(30)), return_exceptions=True)
            assert (await job.result()).iterations == 300


# --- a lost server, a lost connection


async def test_a_lost_job_continues_with_the_changes_of_its_commands(client, service):
    paused, resumed = pb.JobEvent(paused=pb.Paused(iteration=9)), pb.JobEvent(resumed=pb.Resumed(iteration=9))
    layers = [LayerWeight("relu1_1", 2), LayerWeight("relu2_1", 3)]
    service.scripts = [
        [accepted(), checkpoint(5), *(Answer(6) for _ in range(5)), resumed, paused, LOST],
        [accepted(job_id="j2", resumed_at=5), Answer(7), Answer(7), Answer(8), result()],
    ]
    async with client.control(PHOTO, PAINTING, frames=None) as job:
        await job.update(beta=9.0, alpha=2.0, style_layers=layers)
        await job.update(beta=4.0, style_layers=layers[::-1])
        await job.pause()
        await job.resume()
        await job.pause()
        await until(lambda: job.accepted.job_id == "j2")
        assert await job.resume() == 8
        assert (await job.result()).iterations == 300
        updates = await collected(job)
    assert (updates[-2].job_id, updates[-2].resumed_at) == ("j2", 5) and kinds(updates[-1:]) == ["Result"]
    assert [message.WhichOneof("command") for message in service.messages[6:]] == ["start", "update", "pause", "resume"]
    again, update = service.messages[6:8]
    assert again.start.spec.resume == b"state after 5" and not again.start.spec.HasField("recipe")
    assert again.start.request_id != service.messages[0].start.request_id
    reweighted = [pb.LayerWeight(layer=layer, weight=weight) for layer, weight in layers[::-1]]
    assert update.update == pb.UpdateCommand(alpha=2, beta=4, style_layers=pb.LayerWeights(layers=reweighted))


async def test_commands_given_during_the_recovery_wait_for_the_job(client, service):
    service.scripts = [
        [accepted(), checkpoint(5), Answer(6, output=None), LOST],  # answered, but without the picture
        [STILL_LOST],
        [
            accepted(job_id="j2", resumed_at=5),
            Answer(7, output=picture(7)),
            Answer(8),
            Answer(9, error="is wrong"),
            result(),
        ],
    ]
    async with client.control(PHOTO, PAINTING, frames=None) as job:
        taking = asyncio.create_task(job.picture())
        await until(lambda: len(service.specs) == 2)
        changing = asyncio.create_task(job.update(beta=3.0))
        assert (await taking).iteration == 7
        assert await changing == 8
        with pytest.raises(errors.InvalidRequestError, match=r"pause\.beta: is wrong"):
            await job.pause()
        await job.result()
    assert service.commands == ["start", "frame", "start", "start", "frame", "update", "pause"]


async def test_changes_that_are_refused_after_a_loss_end_the_control(client, service):
    service.scripts = [
        [accepted(), checkpoint(5), Answer(6), LOST],
        [accepted(job_id="j2", resumed_at=5), Answer(7, error="must be between 0 and 5"), HANG],
    ]
    async with client.control(PHOTO, PAINTING, frames=None) as job:
        await job.update(beta=9.0)
        with pytest.raises(
            errors.InvalidRequestError,
            match=r"sent again, and its earlier changes are refused there: update\.beta: must",
        ) as raised:
            await job.result()
    assert raised.value.checkpoint.iteration == 5


@pytest.mark.parametrize(
    "refusal", [None, server_errors.JobControlled("j1")], ids=["at once", "the server has not seen the loss"]
)
async def test_a_lost_connection_is_made_again_during_the_grace(client, service, refusal):
    first, second, *rest = numbered(accepted(), progress(1), progress(2), result())
    service.scripts = [
        [first, second, Answer(3), LOST],
        *([[refused(refusal)]] if refusal is not None else []),
        [Answer(3), *rest],
    ]
    async with client.control(PHOTO, PAINTING, frames=None, detach_grace=5) as job:
        assert await job.pause() == 3
        await until(lambda: any(message.HasField("attach") for message in service.messages))
        assert await job.resume() == 3
        updates = await collected(job)
    # The first progress may have been replaced by the second.
    assert [update.sequence for update in updates] in ([1, 3, 4], [1, 2, 3, 4])
    attach = service.messages[2].attach
    assert (attach.job_id, attach.after_sequence, attach.checkpoints.light) == ("j1", 2, True)
    assert len(service.specs) == 1


async def test_a_job_that_another_client_controls_is_not_sent_again(client, service, clock_ahead):
    service.scripts = [[accepted(), checkpoint(5), LOST], [refused(server_errors.JobControlled("j1"))]]
    clock_ahead(20, lambda: any(message.HasField("attach") for message in service.messages))
    async with client.control(PHOTO, PAINTING, timeout=60, detach_grace=20) as job:
        with pytest.raises(errors.ConnectionFailedError, match="gone"):
            await job.result()
    assert len(service.specs) == 1


async def test_leaving_during_the_search_ends_it(client, service):
    service.scripts = [[accepted(), LOST], [STILL_LOST]]
    tasks_before = asyncio.all_tasks()
    async with client.control(PHOTO, PAINTING) as job:
        await until(lambda: len(service.specs) >= 3)
        pausing = asyncio.create_task(job.pause())
        await asyncio.sleep(0)  # the task starts
    with pytest.raises(errors.CallCancelledError, match="control of the job was given up"):
        await pausing
    await until(lambda: asyncio.all_tasks() <= tasks_before)  # no task is left that could send the job


async def test_leaving_ends_the_control_of_a_call_that_fails_at_the_same_time(client, monkeypatch):
    class Call:
        async def __aiter__(self):
            yield pb.StylizeInteractiveResponse(event=accepted())
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:  # gRPC raises the status of an ended call in its place
                raise errors.ConnectionFailedError("gone", code=grpc.StatusCode.UNAVAILABLE) from None

        def cancel(self):
            calls.append(self)

    calls = []
    monkeypatch.setattr(Connection, "start_with_stream", lambda *_: Call())
    async with asyncio.timeout(WITHIN_S), client.control(PHOTO, PAINTING):
        pass
    assert len(calls) == 1  # the job is not sent again


async def test_an_existing_job_is_found_again_but_never_sent(client, service):
    service.scripts = [[*numbered(accepted(attached=True)), LOST], numbered(accepted(), result())]
    async with client.control_job("j1", detach_grace=5) as job:
        await job.result()
    assert [message.attach.after_sequence for message in service.messages] == [0, 1]
    service.scripts = [[accepted(attached=True), LOST]]
    async with client.control_job("j1") as job:
        with pytest.raises(errors.ConnectionFailedError, match="gone"):
            await job.result()


# --- the control as an object


async def test_control_that_was_given_up_says_so(client, service):
    service.scripts = [[accepted(), HANG]]
    async with client.control(PHOTO, PAINTING) as job:
        assert job.job_id == "j1"
        pending = asyncio.create_task(job.pause())
        assert await asyncio.to_thread(service.hanging.wait, WITHIN_S)
        await job.close()
        with pytest.raises(errors.CallCancelledError, match="control of the job was given up"):
            await pending
        for call in (job.pause(), anext(job), job.result(), job.__aenter__()):
            with pytest.raises(errors.ClientUsageError, match="control_job"):
                await call
    await job.close()
    assert await asyncio.to_thread(service.call_ended.wait, WITHIN_S)


async def test_the_end_of_a_controlled_job_stays_its_end(client, service):
    service.scripts = [[accepted(), result()]]
    async with client.control(PHOTO, PAINTING) as job:
        assert kinds(await collected(job)) == ["Accepted", "Result"]
    assert await collected(job) == []
    assert (await job.result()).iterations == 300


async def test_a_job_that_was_not_entered_has_no_commands(client, service):
    job = client.control(PHOTO, PAINTING)
    assert (job.job_id, job.accepted) == (None, None)
    for call in (job.pause(), anext(job), job.result()):
        with pytest.raises(errors.ClientUsageError, match="is not sent yet; enter its context first"):
            await call
    await job.close()
    with pytest.raises(errors.ClientUsageError, match="can be entered once"):
        await job.__aenter__()
    assert service.messages == []
