import json

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import JobState, ServerFailedError, StopReason
from gramophone_client.transport import parsing
from tests.support.fake_service import PAINTING, PHOTO, accepted, progress, result
from tests.support.updates import collected

IMAGE = pb.Image(format=pb.IMAGE_FORMAT_PNG)


async def test_an_event_of_a_later_version_is_skipped(client, service):
    service.scripts = [[accepted(), pb.JobEvent(sequence=2), result()]]
    assert len(await collected(client.stream(PHOTO, PAINTING))) == 2


async def test_progress_of_a_slow_start_has_no_time_left(client, service):
    event = progress(1)
    event.progress.ClearField("time_left")
    service.scripts = [[accepted(), event, result()]]
    _, first, _ = await collected(client.stream(PHOTO, PAINTING))
    assert first.time_left_s is None


@pytest.mark.parametrize(
    ("kind", "numbers", "prefix"),
    [(JobState, pb.JobState, "JOB_STATE_"), (StopReason, pb.StopReason, "STOP_REASON_")],
)
def test_states_and_reasons_are_those_of_the_proto(kind, numbers, prefix):
    names = {name.removeprefix(prefix) for name in numbers.DESCRIPTOR.values_by_name} - {"UNSPECIFIED"}
    assert {member.value for member in kind} == {member.name for member in kind} == names | {"UNKNOWN"}


@pytest.mark.parametrize("name", pb.JobState.keys()[1:])  # 0 is UNSPECIFIED
def test_a_state_is_an_enum_and_its_text(name):
    state = parsing.job_status(pb.Job(state=name)).state
    assert isinstance(state, JobState) and state == name.removeprefix("JOB_STATE_")
    assert json.dumps({"state": state}) == json.dumps({"state": name.removeprefix("JOB_STATE_")})


def test_states_and_reasons_newer_than_this_client_are_unknown():
    status = parsing.job_status(pb.Job(state=99, stop_reason=98))
    assert (status.state, status.stop_reason) == (JobState.UNKNOWN, StopReason.UNKNOWN)
    assert parsing.update(pb.JobEvent(result=pb.Result(image=IMAGE, stop_reason=97))).stop_reason is StopReason.UNKNOWN


def test_a_job_without_a_result_has_no_reason_to_stop():
    assert parsing.job_status(pb.Job(state="JOB_STATE_RUNNING")).stop_reason is None
    done = parsing.job_status(pb.Job(state="JOB_STATE_SUCCEEDED", stop_reason="STOP_REASON_FINISHED"))
    assert done.stop_reason is StopReason.FINISHED


def test_a_picture_in_a_format_newer_than_this_client_is_named():
    image = pb.Image(format=99)
    with pytest.raises(ServerFailedError, match=r"unknown format \(99\); update the client"):
        parsing.update(pb.JobEvent(frame=pb.Frame(image=image)))
