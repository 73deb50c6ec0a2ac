import copy
import gc
import inspect
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from gramophone_client import (
    Accepted,
    AsyncGramophoneClient,
    AsyncJobControl,
    AsyncJobStream,
    Frame,
    GramophoneClient,
    JobControl,
    JobStream,
    errors,
)
from gramophone_server import errors as server_errors
from tests.support.clock import WITHIN_S
from tests.support.fake_service import (
    HANG,
    LOST,
    PAINTING,
    PHOTO,
    Answer,
    accepted,
    checkpoint,
    frame,
    picture,
    refused,
    result,
)
from tests.support.updates import kinds


def test_the_synchronous_client_does_the_same(service, tmp_path):
    with GramophoneClient(service.target) as client:
        service.set_health(HealthCheckResponse.SERVING)
        client.wait_until_ready(5)
        assert client.server_info().version == "1.2.3"
        client.stylize(PHOTO, PAINTING, beta=2.0).save(tmp_path / "out.png")
        updates = list(client.stream(PHOTO, PAINTING, seed=3))
    names = kinds(updates)
    # The number of the others depends on how fast this thread takes them; the newest of each kind is among them.
    assert (names[0], names[-1]) == ("Accepted", "Result") and set(names[1:-1]) == {"Progress", "Frame"}
    assert [update.iteration for update in updates if isinstance(update, Frame)][-1] == 20
    assert (service.specs[0].recipe.beta, service.specs[1].seed) == (2, 3)
    assert "gramophone-client" not in [thread.name for thread in threading.enumerate()]


TWINS = [
    (AsyncGramophoneClient, GramophoneClient),
    (AsyncJobStream, JobStream),
    (AsyncJobControl, JobControl),
]


@pytest.mark.parametrize(("asynchronous", "synchronous"), TWINS)
def test_twins_have_the_same_members_signatures_and_docstrings(asynchronous, synchronous):
    def public(kind):
        names = {name for name in dir(kind) if not name.startswith("_")} - {"aclose"}  # which is deprecated
        return names | ({"__init__"} if kind in (AsyncGramophoneClient, GramophoneClient) else set())

    assert public(asynchronous) == public(synchronous)
    assert without_asyncio(asynchronous.__doc__) == without_asyncio(synchronous.__doc__)
    for name in public(asynchronous):
        theirs, ours = (getattr(kind, name) for kind in (asynchronous, synchronous))
        assert without_asyncio(theirs.__doc__) == without_asyncio(ours.__doc__)
        if isinstance(theirs, property):
            theirs, ours = theirs.fget, ours.fget
        one, other = inspect.signature(theirs), inspect.signature(ours)
        assert one.parameters == other.parameters
        assert without_asyncio(str(one.return_annotation)) == str(other.return_annotation)
        assert not inspect.iscoroutinefunction(ours)


def without_asyncio(text):
    text = re.sub(r"A connection to one server.*\n", "", text)  # and where it can be used
    return re.sub(r"Async(?=Gramo|Job)|\ba?sync(hronous)? |await |\ban? (?=asyn|context|iter)", "", text)


def test_the_synchronous_client_watches_and_cancels_jobs(service):
    with GramophoneClient(service.target) as client:
        assert [type(update).__name__ for update in client.watch("j1")][-1] == "Result"
        assert client.get_job("j1") == client.list_jobs()[0]
        assert client.cancel_job("j1").state == "CANCELLED"


def test_the_synchronous_client_uploads_and_resends(service):
    service.scripts = [[accepted(), checkpoint(2), LOST], [accepted(resumed_at=2), result()]]
    with GramophoneClient(service.target) as client:
        style = client.upload(PAINTING)
        assert kinds(client.stream(PHOTO, style))[2] == "Accepted"


def test_the_synchronous_client_controls_jobs(service):
    service.scripts = [[accepted(), Answer(4), Answer(4, output=picture(4)), Answer(5), result()]]
    with GramophoneClient(service.target) as client, client.control(PHOTO, PAINTING) as job:
        assert job.accepted.job_id == "j1"
        updates = []
        watching = threading.Thread(target=lambda: updates.extend(job))
        watching.start()
        assert job.update(beta=3.0) == 4
        assert job.picture().iteration == 4
        assert job.finish() == 5
        assert job.result().picture.width == 24
        watching.join(WITHIN_S)
    assert kinds(updates) == ["Accepted", "Result"]


def test_synchronous_errors_are_the_same(service):
    service.scripts = [[accepted(), frame(3), refused(server_errors.Diverged(4))]]
    with GramophoneClient(service.target) as client:
        with pytest.raises(errors.DivergedError) as raised:
            list(client.stream(PHOTO, PAINTING))
        assert raised.value.frame.iteration == 3


# --- leaving early


def test_leaving_a_synchronous_loop_cancels_the_call(service):
    service.scripts = [[accepted(), frame(1), HANG]]
    with GramophoneClient(service.target) as client:
        for _ in client.stream(PHOTO, PAINTING):
            break
        gc.collect()
        assert service.call_ended.wait(WITHIN_S)
        assert service.cancelled


def test_an_interrupt_cancels_a_synchronous_call(service, monkeypatch):
    service.scripts = [[accepted(), HANG]]
    with GramophoneClient(service.target) as client:
        updates = client.stream(PHOTO, PAINTING)
        next(updates)

        def interrupted(*_):
            raise KeyboardInterrupt

        # As with Ctrl-C while the caller waits for the next update.
        monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(updates)
        monkeypatch.undo()
        assert service.call_ended.wait(WITHIN_S)


def in_a_loop(client):
    yield from client.stream(PHOTO, PAINTING)


def in_a_block(client):
    with client.control(PHOTO, PAINTING) as job:
        yield from job


def in_its_own_client(client):
    with client:
        yield from client.stream(PHOTO, PAINTING)


@pytest.mark.parametrize("left", [in_a_loop, in_a_block, in_its_own_client])
def test_the_garbage_collector_may_end_a_call_in_any_thread(service, monkeypatch, left):
    def collecting(_):
        gc.collect()
        return threading.current_thread().name

    service.scripts = [[accepted(), HANG]]
    client = GramophoneClient(service.target)  # without a block: if the test fails, its end would hang
    gc.disable()
    try:
        updates = left(client)
        next(updates)
        cycle = [updates]
        cycle.append(cycle)
        del updates, cycle
        # The response is read in the client's own thread.
        monkeypatch.setattr("gramophone_client.transport.parsing.server_info", collecting)
        threads = []

        def ask():
            threads.append(client.server_info())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(WITHIN_S)
        assert threads == ["gramophone-client"]
        assert service.call_ended.wait(WITHIN_S)
    finally:
        gc.enable()
    client.close()
    assert service.cancelled


def test_a_call_in_the_clients_own_thread_is_refused(service, monkeypatch):
    messages = []

    def ask_again(_):
        try:
            client.get_job("j1")
        except errors.ClientUsageError as error:
            messages.append(str(error))

    client = GramophoneClient(service.target)
    monkeypatch.setattr("gramophone_client.transport.parsing.server_info", ask_again)
    asking = threading.Thread(target=client.server_info, daemon=True)
    asking.start()
    asking.join(WITHIN_S)
    assert ["wait for itself" in message for message in messages] == [True]
    client.close()


def test_closing_ends_the_calls_of_other_threads_with_an_error(service):
    # The client waits for 9 s between two calls, where the end of the connection does not end the wait.
    service.scripts = [[accepted(), refused(server_errors.ShuttingDown(retry_after_s=9))]]
    with ThreadPoolExecutor(1) as threads, GramophoneClient(service.target) as client:
        updates = threads.submit(list, client.stream(PHOTO, PAINTING))
        assert service.call_ended.wait(WITHIN_S)
        client.get_job("j1")  # on the same connection: the client has read the refusal before
        client.close()
        with pytest.raises(errors.CallCancelledError):
            updates.result(WITHIN_S)


@pytest.mark.parametrize("how", ["unary", "stream", "control"])
def test_a_call_after_closing_is_an_error(service, how):
    client = GramophoneClient(service.target)
    client.close()
    client.close()
    with pytest.raises(errors.ClientClosedError, match="its client was closed"):
        if how == "unary":
            client.server_info()
        elif how == "stream":
            next(client.stream(PHOTO, PAINTING))
        else:
            with client.control(PHOTO, PAINTING):
                pass
    gc.collect()  # a coroutine that was never awaited would complain


def test_a_stream_that_outlives_its_client_is_closed_with_it(service):
    service.scripts = [[accepted(), HANG]]
    with GramophoneClient(service.target) as client:
        updates = client.stream(PHOTO, PAINTING)
        next(updates)
    assert service.call_ended.wait(WITHIN_S)
    updates.close()


# --- streams and control as objects


def test_a_synchronous_stream_is_a_context(service):
    service.scripts = [[accepted(), frame(1), HANG]]
    with GramophoneClient(service.target) as client:
        with client.stream(PHOTO, PAINTING) as updates:
            assert (updates.job_id, len(service.specs)) == ("j1", 1)
            assert kinds([next(updates), next(updates)]) == ["Accepted", "Frame"]
        assert service.call_ended.wait(WITHIN_S) and service.cancelled
        with pytest.raises(errors.ClientUsageError, match="was closed before its end"):
            next(updates)
        updates.close()


def test_entering_a_synchronous_stream_raises_the_refusal(service):
    service.scripts = [[refused(server_errors.JobNotFound("j9"))]]
    with GramophoneClient(service.target) as client, pytest.raises(errors.JobNotFoundError), client.watch("j9"):
        pytest.fail("there is no such job")


def test_the_end_of_a_synchronous_stream_stays_its_end(service):
    with GramophoneClient(service.target) as client:
        updates = client.stream(PHOTO, PAINTING)
        assert kinds(updates)[-1] == "Result"
        assert list(updates) == []
    assert list(updates) == []  # after its client, too
    updates.close()
    assert not service.cancelled


def test_another_thread_can_close_a_stream(service):
    service.scripts = [[accepted(), HANG]]
    with ThreadPoolExecutor(1) as threads, GramophoneClient(service.target) as client:
        updates = client.stream(PHOTO, PAINTING)
        next(updates)
        waits = threads.submit(next, updates)
        assert service.hanging.wait(WITHIN_S)
        updates.close()
        with pytest.raises(errors.CallCancelledError, match="closed while its next update was awaited"):
            waits.result(WITHIN_S)


def test_an_interrupt_leaves_a_job_under_control_alone(service, monkeypatch):
    service.scripts = [[accepted(), Answer(4), result()]]
    with GramophoneClient(service.target) as client, client.control(PHOTO, PAINTING) as job:
        next(job)

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(job)
        monkeypatch.undo()
        assert job.finish() == 4
        assert job.result().iterations == 300
    with pytest.raises(errors.ClientClosedError):
        job.pause()


def test_a_job_that_was_not_entered_is_not_sent(service):
    with GramophoneClient(service.target) as client:
        job = client.control(PHOTO, PAINTING)
        with pytest.raises(errors.ClientUsageError, match="enter its context first: `async with`, or `with`"):
            job.pause()
        job.close()
    assert service.messages == []


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_clients_and_streams_cannot_be_copied(service, copied):
    service.scripts = [[accepted(), HANG]]
    with GramophoneClient(service.target) as client, client.stream(PHOTO, PAINTING) as updates:
        with pytest.raises(TypeError, match="a GramophoneClient cannot be copied or sent to a process"):
            copied(client)
        with pytest.raises(TypeError, match="a JobStream cannot be copied or sent to a process; `watch` the job there"):
            copied(updates)
        gc.collect()
        assert isinstance(next(updates), Accepted)  # no copy has left the job


def test_a_client_that_is_dropped_ends_its_thread_after_its_streams(service):
    service.scripts = [[accepted(), result()]]
    client = GramophoneClient(service.target)
    thread = next(thread for thread in threading.enumerate() if thread.name == "gramophone-client")
    updates = client.stream(PHOTO, PAINTING)
    del client
    gc.collect()
    assert len(list(updates)) == 2
    del updates
    gc.collect()
    thread.join(WITHIN_S)
    assert not thread.is_alive()
