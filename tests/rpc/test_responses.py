"""Events as messages."""

import asyncio

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.events import Progress, SavedState, Waiting
from gramophone_server.domain.job import Losses, Report
from gramophone_server.rpc.responses import Encoders, JobEventStream


async def test_a_wait_is_sent_only_if_it_was_measured():
    events = JobEventStream(None, None, None)
    measured, unknown = [
        (await events.response(pb.WatchJobResponse, 3, Waiting(2, wait_s))).event.waiting for wait_s in (1.5, None)
    ]
    assert measured.queue_position == unknown.queue_position == 2
    assert measured.estimated_wait.ToMilliseconds() == 1500 and not unknown.HasField("estimated_wait")


async def test_progress_reports_its_scale():
    losses = Losses({"relu4_2": 1.0}, {"relu1_1": 2.0}, 0.5)
    report = Report(9, 30, 181, 256, 2, 5, losses, pixel_iterations_left=100)
    event = Progress(report, iterations_per_second=4.0, time_left_s=2.5)
    sent = (await JobEventStream(None, None, None).response(pb.WatchJobResponse, 3, event)).event.progress
    assert (sent.iteration, sent.iterations, sent.scale, sent.scales, sent.width, sent.height) == (
        9,
        30,
        2,
        5,
        181,
        256,
    )
    assert (sent.losses.total, sent.time_left.ToMilliseconds()) == (3.5, 2500)


async def test_a_checkpoint_is_written_once_for_all_watchers():
    written, encoders = [], Encoders()
    state = SavedState(light=True, write=lambda: written.append(1) or b"state")
    assert await asyncio.gather(*(encoders.write_checkpoint(state) for _ in range(3))) == [b"state"] * 3
    assert len(written) == 1
    encoders.close()
