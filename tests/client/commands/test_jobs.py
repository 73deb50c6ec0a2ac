"""`gramophone watch`, `cancel` and `jobs`."""

import json
import os
import re

import pytest
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server import errors as server_errors
from tests.support.fake_service import accepted, frame, job, refused


def test_watch_writes_what_stylize_would(gramophone, service, folder):
    code, out, err = gramophone("watch j1 -o out.jpg --frames f --frame-every 10 --timelapse film.gif")
    assert (code, out) == (0, "out.jpg\n")
    assert err == ["job j1: 24x18 px, 300 iterations, seed 7", "24x18 px, 300 iterations in 2.2 s, loss 0.5"]
    assert sorted(os.listdir("f")) == ["frame-0001.jpg", "frame-0002.jpg"]
    assert (folder / "film.gif").exists()
    with Image.open("out.jpg") as image:
        assert image.format == "JPEG"
    (watched,) = service.watches
    assert (watched.job_id, watched.after_sequence, watched.frames.every_iterations) == ("j1", 0, 10)
    assert service.specs == []
    code, _, err = gramophone("watch j1 -o out.jpg --frames f")
    assert (code, len(service.watches)) == (2, 1)


def test_a_watched_job_that_ends_early_leaves_its_picture(gramophone, service, folder):
    service.scripts = [[accepted(), frame(10), refused(server_errors.Cancelled())]]
    code, out, err = gramophone("watch j1 -o out.png --quiet")
    assert (code, out) == (5, "")
    assert "iteration 10 of 300 is kept as out.png" in err[0]
    assert "the job was cancelled" in err[1]


def test_a_job_is_cancelled(gramophone, service):
    code, out, err = gramophone("cancel j1")
    assert (code, err) == (0, [])
    assert out.startswith("j1  cancelled  10/300  24x18  since 2025-06-1")
    assert service.jobs[0].state == pb.JOB_STATE_CANCELLED


def test_jobs_are_listed(gramophone, service):
    service.jobs = [job(job_id="j2", state=pb.JOB_STATE_QUEUED, iteration=0, width=0, queue_position=1), job()]
    code, out, err = gramophone("jobs")
    assert (code, err) == (0, [])
    first, second = out.splitlines()
    assert re.fullmatch(r"j2  queued     0/300  since 2025-06-1\d \d\d:\d\d:\d\d  at place 1 of the queue", first)
    assert second.startswith("j1  running    10/300  24x18  since ")
    printed = json.loads(gramophone("jobs --json")[1])
    assert [(job["job_id"], job["state"]) for job in printed] == [("j2", "QUEUED"), ("j1", "RUNNING")]
    assert printed[0]["create_time"] == "2025-06-15T15:06:40+00:00"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (server_errors.JobNotFound("j9"), 2),
        (server_errors.JobControlled("j9"), 2),
        (server_errors.TooManyWatchers(8), 4),
        (server_errors.RequestIdTaken("r1"), 2),
        (server_errors.ListingDisabled(), 2),
        (server_errors.SlowReader(60), 3),
        (server_errors.Cancelled(), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes_of_jobs(gramophone, service, error, code):
    service.scripts = [[refused(error)]]
    assert gramophone("watch j9 -o out.png") == (code, "", [f"gramophone: {error}"])


def test_a_missing_job_cannot_be_cancelled(gramophone):
    code, out, err = gramophone("cancel j9")
    assert (code, out) == (2, "")
    assert "there is no job 'j9'" in err[0]
