"""What values look like at a prompt, and what they do by themselves."""

from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import CheckpointOptions, FrameOptions, Style, UploadedImage
from gramophone_client.transport import parsing
from tests.support.fake_service import PHOTO, accepted, changed, checkpoint, frame, job, progress, result, waiting

UPLOAD = UploadedImage(digest=f"sha256:{'0' * 64}", width=24, height=18, data=PHOTO)
TIME = Timestamp(seconds=1_750_000_000)
VALUES = {
    "accepted": parsing.update(accepted(job_id="0" * 36)),
    "waiting": parsing.update(waiting(2, 3)),
    "progress": parsing.update(progress(3)),
    "frame": parsing.update(frame(3)),
    "checkpoint": parsing.update(checkpoint(3)),
    "changed": parsing.update(changed(4, beta=5.0)),
    "paused": parsing.update(pb.JobEvent(paused=pb.Paused(iteration=3))),
    "resumed": parsing.update(pb.JobEvent(resumed=pb.Resumed(iteration=3))),
    "result": parsing.update(result()),
    "stylized": parsing.stylized(pb.StylizeResponse(accepted=accepted().accepted, result=result().result)),
    "status": parsing.job_status(job(job_id="0" * 36, start_time=TIME, end_time=TIME, expire_time=TIME)),
    "info": parsing.server_info(
        pb.GetServerInfoResponse(version="1.0", device="cpu", weights="W" * 100, layers=["relu1_1"] * 40)
    ),
    "upload": UPLOAD,
    "style": Style(PHOTO, 0.5),
    "style of an upload": Style(UPLOAD),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_shown_on_three_lines_without_bytes(kind):
    text = repr(VALUES[kind])
    assert text.startswith(f"{type(VALUES[kind]).__name__}(") and len(text) < 3 * 120
    assert "\\x" not in text and "b'" not in text and "datetime" not in text


def test_what_matters_is_shown():
    assert "iteration=3, iterations=300, width=12, height=9, losses=Losses(total=3, content=1, style=2, tv=0)" in repr(
        VALUES["progress"]
    )
    assert "picture=Picture(format='jpeg', width=12, height=9)" in repr(VALUES["frame"])
    assert "recipe=Recipe(beta=5.0)" in repr(VALUES["changed"])
    assert "state=<JobState.RUNNING: 'RUNNING'>" in repr(VALUES["status"])
    assert repr(Style(PHOTO, 0.5)) == f"Style({len(PHOTO)} bytes, weight=0.5)"
    assert repr(Style("a.jpg")) == "Style('a.jpg', weight=1.0)"
    assert repr(Style(Path("a.jpg"), 2)) == "Style(PosixPath('a.jpg'), weight=2)"
    assert repr(FrameOptions()) == "FrameOptions()"
    assert repr(FrameOptions(max_side=360, format="png")) == "FrameOptions(max_side=360, format='png')"
    assert repr(CheckpointOptions(light=False)) == "CheckpointOptions(light=False)"


@pytest.mark.parametrize("kind", ["frame", "result", "stylized"])
def test_pictures_are_opened_and_saved_as_those_in_them(kind, tmp_path):
    VALUES[kind].save(tmp_path / "own.png")
    VALUES[kind].picture.save(tmp_path / "picture.png")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "picture.png").read_bytes()
    assert VALUES[kind].image().tobytes() == VALUES[kind].picture.image().tobytes()
