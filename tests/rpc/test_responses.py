"""Events of a job as messages."""

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.events import Frame, Picture, Progress, Waiting
from gramophone_server.domain.job import Losses, Report
from gramophone_server.rpc.responses import small_event


def message_of(event):
    message = pb.JobEvent()
    small_event(message, event, None, attached=False)
    return message


def test_a_wait_is_sent_only_if_it_was_measured():
    measured, unknown = (message_of(Waiting(2, wait_s)).waiting for wait_s in (1.5, None))
    assert measured.queue_position == unknown.queue_position == 2
    assert measured.estimated_wait.ToMilliseconds() == 1500 and not unknown.HasField("estimated_wait")


def test_progress_reports_its_scale():
    losses = Losses({"relu4_2": 1.0}, {"relu1_1": 2.0}, 0.5)
    report = Report(9, 30, 181, 256, 2, 5, losses, pixel_iterations_left=100)
    sent = message_of(Progress(report, iterations_per_second=4.0, time_left_s=2.5)).progress
    assert (sent.iteration, sent.iterations, sent.scale, sent.scales, sent.width, sent.height) == (
        9,
        30,
        2,
        5,
        181,
        256,
    )
    assert (sent.losses.total, sent.time_left.ToMilliseconds()) == (3.5, 2500)


def test_a_picture_is_no_small_event():
    with pytest.raises(AssertionError, match="is a large message"):
        message_of(Frame(1, Picture(None, 64, 32)))
