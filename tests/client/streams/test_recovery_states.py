"""The states of recovery, without calls and without a clock."""

import grpc
import pytest

from gramophone_client import errors
from gramophone_client.streams.recovery_states import (
    RETRY_PAUSE_S,
    SETTLED_S,
    NextCall,
    RecoveryState,
    RecoveryStates,
    is_connection_loss,
    is_job_loss,
)

SENDING, FOLLOWING = RecoveryState.SENDING, RecoveryState.FOLLOWING
SEARCHING, RESENDING = RecoveryState.SEARCHING, RecoveryState.RESENDING
ATTACH, REPEAT, RESEND = NextCall.ATTACH, NextCall.REPEAT, NextCall.RESEND

GRACE_S, PATIENCE_S, MAX_RESENDS = 5.0, 30.0, 3


class Machine(RecoveryStates):
    """A machine in `state`, at a time that moves by hand."""

    def __init__(self, state: RecoveryState, *, grace_s: float = GRACE_S, patience_s: float = PATIENCE_S) -> None:
        super().__init__(
            is_accepted=state is not SENDING, grace_s=grace_s, patience_s=patience_s, max_resends=MAX_RESENDS
        )
        self.now_s = 100.0
        self.left_s = 900.0
        if state is SEARCHING:
            self.fail(LOST)
        elif state is RESENDING:
            self.fail(DOWN)
        assert self.state is state

    def fail(self, error: errors.GramophoneError, *, was_connected: bool = True) -> tuple[NextCall, float]:
        retry = self.call_failed(error, now_s=self.now_s, left_s=self.left_s, was_connected=was_connected)
        return retry.call, retry.pause_s


def lost() -> errors.ConnectionFailedError:
    return errors.ConnectionFailedError("gone", code=grpc.StatusCode.UNAVAILABLE)


LOST = lost()
DOWN = errors.ShuttingDownError("down", code=grpc.StatusCode.UNAVAILABLE, reason=errors.ErrorReason.SHUTTING_DOWN)
NOT_READY = errors.NotReadyError("starting", code=grpc.StatusCode.UNAVAILABLE, reason=errors.ErrorReason.NOT_READY)
SLOW = errors.SlowReaderError("slow", code=grpc.StatusCode.ABORTED, reason=errors.ErrorReason.SLOW_READER)
FULL = errors.QueueFullError("full")
CONTROLLED = errors.JobControlledError("controlled")
MISSING = errors.JobNotFoundError("missing")
LATE = errors.DeadlineExceededError("late")
INVALID = errors.InvalidRequestError("invalid")


@pytest.mark.parametrize(
    ("state", "error", "next_state", "call"),
    [
        (SENDING, LOST, SENDING, RESEND),
        (SENDING, DOWN, SENDING, RESEND),
        (SENDING, NOT_READY, SENDING, RESEND),
        (FOLLOWING, LOST, SEARCHING, ATTACH),
        (FOLLOWING, SLOW, SEARCHING, ATTACH),
        (FOLLOWING, DOWN, RESENDING, RESEND),
        (SEARCHING, LOST, SEARCHING, ATTACH),
        (SEARCHING, DOWN, SEARCHING, ATTACH),
        (SEARCHING, FULL, SEARCHING, ATTACH),
        (SEARCHING, CONTROLLED, SEARCHING, ATTACH),
        (SEARCHING, MISSING, RESENDING, RESEND),
        (RESENDING, LOST, RESENDING, REPEAT),
        (RESENDING, DOWN, RESENDING, REPEAT),
        (RESENDING, NOT_READY, RESENDING, REPEAT),
        (RESENDING, FULL, RESENDING, REPEAT),
        (RESENDING, MISSING, RESENDING, REPEAT),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_transitions(state, error, next_state, call):
    machine = Machine(state)
    assert machine.fail(error)[0] is call
    assert machine.state is next_state


@pytest.mark.parametrize("error", [INVALID, LATE, FULL, MISSING, CONTROLLED], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("state", [SENDING, FOLLOWING], ids=lambda state: state.name)
def test_a_first_error_that_is_no_loss_is_final(state, error):
    machine = Machine(state)
    with pytest.raises(type(error)) as raised:
        machine.fail(error)
    assert raised.value is error and machine.state is state


@pytest.mark.parametrize("state", [SEARCHING, RESENDING], ids=lambda state: state.name)
def test_other_errors_during_a_recovery_are_final(state):
    with pytest.raises(errors.InvalidRequestError):
        Machine(state).fail(INVALID)


@pytest.mark.parametrize("state", [SEARCHING, RESENDING], ids=lambda state: state.name)
def test_a_deadline_during_a_recovery_raises_the_loss(state):
    with pytest.raises(errors.ConnectionFailedError, match=r"gone|down") as raised:
        Machine(state).fail(LATE)
    assert raised.value.__cause__ is LATE


def test_a_server_that_was_never_there_is_not_waited_for():
    machine = Machine(SENDING)
    with pytest.raises(errors.ConnectionFailedError):
        machine.fail(LOST, was_connected=False)
    machine.fail(DOWN)
    assert machine.fail(LOST, was_connected=False)[0] is REPEAT  # after a first refusal a server may come


def test_an_event_ends_a_search_and_acceptance_ends_a_resend():
    machine = Machine(SEARCHING)
    machine.event_received()
    assert machine.state is FOLLOWING
    machine = Machine(RESENDING)
    machine.event_received()
    assert machine.state is RESENDING
    machine.accepted()
    assert machine.state is FOLLOWING
    with pytest.raises(errors.QueueFullError):
        machine.fail(FULL)  # the loss is over


def test_the_search_lasts_for_the_grace_then_the_job_is_sent_again():
    machine = Machine(SEARCHING)
    machine.now_s += GRACE_S - 0.001
    assert machine.fail(lost())[0] is ATTACH
    machine.now_s += 0.001
    assert machine.fail(lost())[0] is RESEND
    machine.now_s += PATIENCE_S - GRACE_S - 0.001
    assert machine.fail(lost())[0] is REPEAT
    machine.now_s += 0.001
    with pytest.raises(errors.ConnectionFailedError) as raised:
        machine.fail(FULL)
    assert raised.value is LOST and raised.value.__cause__ is FULL


def test_without_grace_the_job_is_sent_again_at_once():
    machine = Machine(FOLLOWING, grace_s=0.0)
    assert machine.fail(LOST)[0] is RESEND
    assert machine.state is RESENDING


def test_without_patience_a_job_is_searched_for_but_never_sent_again():
    with pytest.raises(errors.ShuttingDownError):
        Machine(FOLLOWING, patience_s=0.0).fail(DOWN)
    machine = Machine(SEARCHING, patience_s=0.0)
    with pytest.raises(errors.JobNotFoundError):
        machine.fail(MISSING)
    machine.now_s += GRACE_S
    error = lost()
    with pytest.raises(errors.ConnectionFailedError) as raised:
        machine.fail(error)
    assert raised.value is LOST and raised.value.__cause__ is error


def test_a_slow_readers_job_is_never_sent_again():
    machine = Machine(FOLLOWING)
    machine.fail(SLOW)
    with pytest.raises(errors.JobNotFoundError):
        machine.fail(MISSING)
    machine.now_s += GRACE_S
    with pytest.raises(errors.SlowReaderError):
        machine.fail(lost())


def test_a_controlled_job_is_not_sent_again():
    machine = Machine(SEARCHING)
    machine.now_s += GRACE_S
    with pytest.raises(errors.ConnectionFailedError) as raised:
        machine.fail(CONTROLLED)
    assert raised.value is LOST


def give_up(machine):
    error = lost()
    with pytest.raises(errors.ConnectionFailedError) as raised:
        machine.fail(error)
    assert raised.value is error


def test_resends_of_a_job_that_has_not_run_for_ten_seconds_are_limited():
    machine = Machine(FOLLOWING, grace_s=0.0)
    for number in range(MAX_RESENDS):
        assert not machine.has_used_up_resends and machine.losses == number + 1
        assert machine.fail(lost())[0] is RESEND
        assert machine.fail(lost())[0] is REPEAT  # no server has accepted it: the job did not crash this one
        machine.accepted()
        machine.was_running(number * 1000.0)  # one event, whenever it arrives
    assert machine.has_used_up_resends and machine.losses == MAX_RESENDS + 1
    give_up(machine)


def crashing(machine, run):
    """Loses the job as often as allowed, after `run` each time; then whether it is sent once more."""
    for _ in range(MAX_RESENDS):
        machine.accepted()
        run(machine)
        assert machine.fail(lost())[0] is RESEND
    machine.accepted()
    run(machine)
    try:
        return machine.fail(lost())[0] is RESEND
    except errors.ConnectionFailedError:
        return False


def ran_for(seconds):
    def run(machine):
        for tenth in range(11):
            machine.was_running(500.0 + seconds * tenth / 10)

    return run


def waited_in_the_queue(machine):
    machine.was_running(500.0)
    machine.was_waiting()
    machine.was_running(600.0)


def paused(machine):
    machine.was_running(500.0)
    machine.was_paused(501.0)
    machine.was_running(600.0)  # a picture on request
    machine.was_running(700.0)
    machine.was_resumed()
    machine.was_running(800.0)


def ran_before_a_pause(machine):
    machine.was_running(500.0)
    machine.was_paused(506.0)
    machine.was_resumed()
    machine.was_running(600.0)
    machine.was_running(604.0)


def silent(machine):
    machine.was_running(500.0)
    machine.now_s += 1000


@pytest.mark.parametrize(
    ("run", "goes_on"),
    [
        (ran_for(SETTLED_S), True),
        (ran_for(SETTLED_S - 0.01), False),
        (ran_before_a_pause, True),
        (paused, False),
        (waited_in_the_queue, False),
        (silent, False),
    ],
    ids=["ten seconds", "less", "before and after a pause", "paused", "queue", "silent"],
)
def test_only_running_starts_the_count_anew(run, goes_on):
    assert crashing(Machine(FOLLOWING, grace_s=0.0), run) is goes_on


def test_running_is_counted_from_each_acceptance():
    assert not crashing(Machine(FOLLOWING, grace_s=0.0), ran_for(SETTLED_S / 2))


def test_a_lost_connection_alone_is_no_loss_of_the_job():
    machine = Machine(FOLLOWING)
    for _ in range(3 * MAX_RESENDS):
        assert machine.fail(lost())[0] is ATTACH
        machine.event_received()
    assert machine.losses == 1


def test_a_job_that_is_never_sent_again_has_not_used_that_up():
    assert not Machine(FOLLOWING, patience_s=0.0).has_used_up_resends


def test_before_acceptance_only_lost_connections_count_as_resends():
    machine = Machine(SENDING)
    assert machine.fail(DOWN)[0] is RESEND
    for _ in range(2 * MAX_RESENDS):
        assert machine.fail(DOWN)[0] is REPEAT
        assert machine.fail(lost(), was_connected=False)[0] is REPEAT
    for _ in range(MAX_RESENDS - 1):
        assert machine.fail(lost())[0] is RESEND
    with pytest.raises(errors.ShuttingDownError):
        machine.fail(lost())


def test_pauses_double_up_to_the_longest_and_are_at_least_the_servers():
    machine = Machine(RESENDING)
    shortest, longest = RETRY_PAUSE_S
    pauses = [machine.fail(lost())[1] for _ in range(6)]
    assert pauses == [min(shortest * 2**n, longest) for n in range(1, 7)]
    assert machine.fail(errors.QueueFullError("full", retry_after_s=7.5))[1] == 7.5


def test_pauses_end_with_the_time_that_is_left():
    machine = Machine(RESENDING)
    machine.left_s = 0.1
    assert machine.fail(lost())[1] == 0.1
    machine.left_s = 0.0
    with pytest.raises(errors.ShuttingDownError):
        machine.fail(lost())


def test_only_errors_without_a_reason_are_lost_connections():
    assert is_connection_loss(LOST) and is_connection_loss(SLOW)
    assert is_connection_loss(errors.ServerFailedError("reset", code=grpc.StatusCode.INTERNAL))
    defect = {"code": grpc.StatusCode.INTERNAL, "reason": errors.ErrorReason.INTERNAL}
    assert not is_connection_loss(errors.ServerFailedError("defect", **defect))
    assert not is_connection_loss(DOWN) and not is_connection_loss(FULL)


def test_a_job_is_lost_with_its_connection_or_its_server():
    assert all(is_job_loss(error) for error in (LOST, SLOW, DOWN, MISSING))
    assert not any(is_job_loss(error) for error in (INVALID, FULL, LATE, CONTROLLED))
