from gramophone.v1 import style_transfer_pb2 as pb
from tests.support.fake_service import PAINTING, PHOTO, accepted, progress, result
from tests.support.updates import collected


async def test_an_event_of_a_later_version_is_skipped(client, service):
    service.scripts = [[accepted(), pb.JobEvent(sequence=2), result()]]
    assert len(await collected(client.stream(PHOTO, PAINTING))) == 2


async def test_progress_of_a_slow_start_has_no_time_left(client, service):
    event = progress(1)
    event.progress.ClearField("time_left")
    service.scripts = [[accepted(), event, result()]]
    _, first, _ = await collected(client.stream(PHOTO, PAINTING))
    assert first.time_left_s is None
