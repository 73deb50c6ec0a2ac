import asyncio
import hashlib
import io
import os
import re
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from PIL import Image

from gramophone.options import INLINE_BYTES
from gramophone.recipe import PRESETS, LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_client import Frame, Progress, UploadProgress, errors
from gramophone_client.commands import local_server, stylize
from gramophone_client.console import display as console_display
from gramophone_client.console import outputs, targets
from gramophone_client.console.display import PlainDisplay
from gramophone_client.console.timelapse import Timelapse
from gramophone_client.transport.parsing import update
from gramophone_client.types import picture
from gramophone_server import errors as server_errors
from tests.support.clock import WITHIN_S
from tests.support.fake_service import (
    HANG,
    LOST,
    NOWHERE,
    accepted,
    checkpoint,
    encoded,
    frame,
    numbered,
    progress,
    refused,
    result,
)

pytestmark = pytest.mark.usefixtures("short_pauses", "no_time_passes")


@pytest.fixture
def no_time_passes(monkeypatch):
    """Not for the display, which would print another line of progress every two seconds."""
    monkeypatch.setattr(console_display, "time", SimpleNamespace(monotonic=lambda: 0.0))


def test_stylize_writes_the_picture_and_prints_its_path(gramophone, service, folder):
    code, out, err = gramophone("stylize photo.png painting.png -o out.png")
    assert (code, out) == (0, "out.png\n")
    assert (folder / "out.png").read_bytes() == encoded("green")
    assert err == [
        "job j1: 24x18 px, 300 iterations, seed 7",
        "24x18 px, 300 iterations in 2.2 s, loss 0.5",
    ]
    assert service.specs[0].content.data == encoded("red")
    assert service.specs[0].result_format == pb.IMAGE_FORMAT_PNG


def test_the_format_of_the_result_follows_its_name(gramophone, service):
    gramophone("stylize photo.png painting.png -o out.jpg --result-quality 70")
    assert (service.specs[0].result_format, service.specs[0].result_quality) == (pb.IMAGE_FORMAT_JPEG, 70)
    gramophone("stylize photo.png painting.png -o out.webp")
    assert service.specs[1].result_format == pb.IMAGE_FORMAT_WEBP


def test_flags_reach_the_request(gramophone, service):
    code, _, _ = gramophone(
        "stylize photo.png painting.png photo.png -o out.png --preset textbook --seed 5 --style-weights 1,0.5 "
        "--style-layers relu1_1:1,relu2_1:0.5 --beta 7 --optimiser lbfgs --start-image painting.png"
    )
    assert code == 0
    spec = service.specs[0]
    assert spec.seed == 5
    assert [style.weight for style in spec.styles] == [1, 0.5]
    assert spec.start_image.data == encoded("yellow")
    recipe = recipe_from_message(spec.recipe)
    assert recipe.style_layers == (LayerWeight("relu1_1", 1), LayerWeight("relu2_1", 0.5))
    assert (recipe.beta, recipe.optimiser, recipe.iterations) == (7, "lbfgs", PRESETS["textbook"].iterations)


def test_frames_are_numbered_files(gramophone, service, folder):
    code, _, _ = gramophone("stylize photo.png painting.png -o out.png --frames f --frame-every 10 --frame-size 16")
    assert code == 0
    assert sorted(os.listdir("f")) == ["frame-0001.jpg", "frame-0002.jpg"]
    assert (service.specs[0].frames.every_iterations, service.specs[0].frames.max_side) == (10, 16)
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --frames f")
    assert (code, len(service.specs)) == (2, 1)
    assert "name an empty folder" in err[0]


@pytest.mark.parametrize("name", ["film.gif", "film.webp"])
def test_a_timelapse_ends_with_the_result(gramophone, service, name):
    service.scripts = [[accepted(), frame(1, "red", (12, 9)), frame(2, "blue", (24, 18)), result()]]
    code, _, _ = gramophone(f"stylize photo.png painting.png -o out.png --timelapse {name}")
    assert code == 0
    with Image.open(name) as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (3, (24, 18), 0)
        film.seek(2)
        film.load()
        assert film.info["duration"] == 2500
        assert all(abs(a - b) < 8 for a, b in zip(film.convert("RGB").getpixel((5, 5)), (0, 128, 0), strict=True))


def test_quiet_prints_only_the_path(gramophone):
    assert gramophone("stylize photo.png painting.png -o out.png --quiet") == (0, "out.png\n", [])


def test_lines_without_a_terminal_are_few_and_plain(service, gramophone):
    service.scripts = [[accepted(), *(progress(i) for i in range(1, 200)), result()]]
    _, _, err = gramophone("stylize photo.png painting.png -o out.png --preview")
    assert len(err) == 2
    assert all(line.isprintable() for line in err)
    out = io.StringIO()
    for every_s, lines in ((0, 200), (60, 1)):
        display = PlainDisplay(out, every_s)
        display.show(update(accepted()))
        for _ in range(199):
            display.show(update(progress(10)))
        assert len(out.getvalue().splitlines()) == lines
        assert lines == 1 or out.getvalue().splitlines()[1] == "10/300, scale 1/2, 12x9 px, 1:30 left, loss 3, 8 it/s"
        out.truncate(0)


# --- jobs that end early


def test_an_interrupt_stops_the_job_and_keeps_the_picture(gramophone, service, monkeypatch):
    service.scripts = [[accepted(), frame(120, "blue", (24, 18)), HANG]]

    def interrupt_at_a_frame(_, update):
        if isinstance(update, Frame):
            signal.raise_signal(signal.SIGINT)  # asyncio ends the command at its next wait

    monkeypatch.setattr(PlainDisplay, "show", interrupt_at_a_frame)
    for name in ("out.png", "out-unfinished.png"):  # the second time, next to the first
        code, out, err = gramophone("stylize photo.png painting.png -o out.png")
        assert (code, out) == (130, "")
        assert err[-2:] == [
            f"gramophone: the picture after iteration 120 of 300 is kept as {name}",
            "gramophone: interrupted",
        ]
        assert service.call_ended.wait(WITHIN_S) and service.cancelled
        with Image.open(name) as image:
            assert (image.format, image.size) == ("PNG", (24, 18))


def test_an_interrupt_after_the_result_leaves_the_result(gramophone, folder, monkeypatch):
    monkeypatch.setattr(Timelapse, "save", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --timelapse film.gif --quiet")
    assert (code, err) == (130, ["gramophone: interrupted"])
    assert (folder / "out.png").read_bytes() == encoded("green")


def test_a_diverged_job_leaves_its_last_good_picture(gramophone, service, folder):
    service.scripts = [[accepted(), frame(10), refused(server_errors.Diverged(11))]]
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --quiet")
    assert code == 5
    assert "iteration 10 of 300 is kept as out.png" in err[0]
    assert "smaller step" in err[1]
    assert (folder / "out.png").exists()


@pytest.fixture
def full_disk(monkeypatch):
    """Makes the disk full for files whose names start with the given text."""

    def fill(start):
        replace = picture.Path.replace

        def full(path, target):
            if target.name.startswith(start):
                raise OSError(28, "No space left on device")
            return replace(path, target)

        monkeypatch.setattr(picture.Path, "replace", full)

    return fill


def test_a_full_disk_for_frames_is_one_line_and_the_picture_is_kept(gramophone, service, folder, full_disk):
    service.scripts = [[accepted(), frame(10), HANG]]
    full_disk("frame-")
    code, out, err = gramophone("stylize photo.png painting.png -o out.png --frames f --quiet")
    assert (code, out) == (2, "")
    assert err == [
        "gramophone: the picture after iteration 10 of 300 is kept as out.png",
        "gramophone: f/frame-0001.jpg: No space left on device",
    ]
    assert service.call_ended.wait(WITHIN_S) and service.cancelled
    assert os.listdir(folder / "f") == []


def test_a_full_disk_for_the_result_is_one_line(gramophone, service, full_disk):
    service.scripts = [[accepted(), frame(10), result()]]
    full_disk("out.png")
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --quiet")
    assert (code, err) == (2, ["gramophone: out.png: No space left on device"])


def test_a_full_disk_does_not_hide_why_a_job_ended(gramophone, service, full_disk):
    service.scripts = [[accepted(), frame(10), refused(server_errors.Diverged(11))]]
    full_disk("out.png")
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --quiet")
    assert code == 5
    assert err[0] == "gramophone: the unfinished picture is lost: out.png: No space left on device"
    assert "smaller step" in err[1]


# --- checkpoints and lost servers


@pytest.mark.parametrize(("flags", "path"), [("", "out-unfinished.checkpoint"), ("--checkpoint state", "state")])
def test_the_checkpoint_of_a_job_that_was_lost_too_often_is_kept(gramophone, service, folder, flags, path):
    service.scripts = [[accepted(), progress(i), checkpoint(i), LOST] for i in range(1, 9)]
    code, _, err = gramophone(f"stylize photo.png painting.png -o out.png --quiet {flags}")
    assert code == 3
    assert err[0] == (
        f"gramophone: the checkpoint of iteration 4 is kept as {path}; to go on from it, run the command with "
        f"--resume {path} in place of its recipe"
    )
    assert err[1].startswith("gramophone: the job was lost 4 times without 10 s of running in between")
    assert (folder / path).read_bytes() == b"state after 4"


def test_a_full_disk_for_the_checkpoint_of_a_lost_job_is_one_line(gramophone, service, full_disk):
    service.scripts = [[accepted(), checkpoint(i), LOST] for i in range(1, 9)]
    full_disk("out-unfinished")
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --quiet")
    assert code == 3
    assert err[0] == "gramophone: the checkpoint is lost: out-unfinished.checkpoint: No space left on device"


def test_a_detached_job_is_found_again(gramophone, service, folder):
    whole = numbered(accepted(), frame(1), result())
    service.scripts = [[*whole[:2], LOST], whole[2:]]
    code, out, err = gramophone("stylize photo.png painting.png -o out.png --detach 5")
    assert (code, out) == (0, "out.png\n")
    assert err[0].startswith("job j1: ")
    assert service.specs[0].detach_grace.seconds == 5
    assert [(watch.job_id, watch.after_sequence) for watch in service.watches] == [("j1", 2)]
    assert (folder / "out.png").read_bytes() == encoded("green")


def test_a_job_continues_from_a_file(gramophone, service, folder):
    service.scripts = [[accepted(), checkpoint(10), checkpoint(20, light=False), result()]]
    code, _, _ = gramophone("stylize photo.png painting.png -o out.png --checkpoint job.checkpoint")
    assert (code, (folder / "job.checkpoint").read_bytes()) == (0, b"state after 20")
    assert (service.specs[0].checkpoints.light, service.specs[0].checkpoints.min_interval.seconds) == (False, 10)
    service.scripts = [[accepted(resumed_at=20), result()]]
    code, _, err = gramophone("stylize photo.png painting.png -o again.png --resume job.checkpoint")
    assert (code, err[0]) == (0, "job j1: 24x18 px, 300 iterations, seed 7, from iteration 20")
    assert (service.specs[1].resume, service.specs[1].HasField("recipe")) == (b"state after 20", False)
    assert service.specs[1].checkpoints.light  # enough to continue on another server


def test_a_resent_job_is_reported(gramophone, service):
    service.scripts = [
        [accepted(), checkpoint(38), progress(40), LOST],
        [accepted(job_id="j2", resumed_at=38), LOST],
        [accepted(job_id="j3", resumed_at=38), result()],
    ]
    code, _, err = gramophone("stylize photo.png painting.png -o out.png")
    assert code == 0
    assert err[1:3] == [
        "server lost at iteration 40, going on as job j2: from iteration 38",
        "server lost at iteration 38, going on as job j3: from iteration 38",
    ]
    out = io.StringIO()
    display = PlainDisplay(out)
    for event in (accepted(), accepted(job_id="j2", queue_position=2)):
        display.show(update(event))
    assert out.getvalue().splitlines()[1] == (
        "server lost at iteration 0, going on as job j2: from its beginning, waits at place 2 of the queue"
    )


# --- no server


@pytest.fixture
def nowhere(monkeypatch, service):
    """The built-in address leads to no server, and nothing else is set. A local server is the fake service."""
    started = []

    @contextmanager
    def local(report):
        started.append(True)
        report("starting")
        yield service.target

    monkeypatch.delenv("GRAMOPHONE_SERVER")
    monkeypatch.setattr(targets, "BUILT_IN_ADDRESS", NOWHERE)
    monkeypatch.setattr(stylize, "local_server", local)
    return started


class Terminal(io.StringIO):
    def isatty(self):
        return True


STYLIZE = "stylize photo.png painting.png -o out.png"


def test_without_a_server_the_error_names_the_commands_that_start_one(gramophone, nowhere, monkeypatch):
    code, out, err = gramophone(STYLIZE)
    assert (code, out, nowhere) == (3, "", [])
    assert err[-3].startswith(f"gramophone: no connection to a gramophone server at {NOWHERE} (")
    assert re.fullmatch(r"gramophone: start one: (gramophone-server|\S+ -m gramophone_server.main) --port 1", err[-2])
    assert err[-1] == "gramophone: or let the command start one for this job: add --local"
    monkeypatch.setattr(local_server, "SERVER", "no_such_package")
    code, _, err = gramophone(STYLIZE)
    assert (code, err[-1].partition("; ")[0]) == (3, "gramophone: the server is not installed in this Python")


def test_the_error_of_a_target_that_was_chosen_proposes_no_other_one(gramophone, nowhere):
    _, _, err = gramophone(f"{STYLIZE} --target gpu-1.invalid:50051")
    assert len(err) == 1 and "gpu-1.invalid:50051" in err[0]


@pytest.mark.parametrize(("answer", "code"), [("\n", 0), ("y\n", 0), ("Yes\n", 0), ("n\n", 3), ("", 3)])
def test_a_person_at_a_terminal_is_asked(gramophone, nowhere, monkeypatch, answer, code):
    asked = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", asked)
    got, out, _ = gramophone(STYLIZE)
    assert (got, nowhere) == (code, [True] * (code == 0))
    assert out == ("out.png\n" if code == 0 else "")
    assert asked.getvalue().count("There is no server at 127.0.0.1:1. Start one for this job? [Y/n] ") == 1
    assert ("no connection to a gramophone server" in asked.getvalue()) == (code != 0)


@pytest.mark.parametrize("flags", ["--quiet", f"--target {NOWHERE}", "--detach 5", "--wait 0.1"])
def test_nobody_is_asked_who_did_not_mean_this_machine_or_wants_silence(gramophone, nowhere, monkeypatch, flags):
    asked = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    monkeypatch.setattr("sys.stderr", asked)
    assert gramophone(f"{STYLIZE} {flags}")[0] == 3
    assert nowhere == [] and "[Y/n]" not in asked.getvalue()


def test_a_local_job_reports_its_server_and_is_painted(gramophone, nowhere, service):
    code, out, err = gramophone(f"{STYLIZE} --local --checkpoint job.state")
    assert (code, out, nowhere) == (0, "out.png\n", [True])
    assert err[:2] == ["starting", "job j1: 24x18 px, 300 iterations, seed 7"]


@pytest.mark.parametrize("flags", ["--target a:1", "--server studio", "--wait 5", "--detach 5", "--metadata token=1"])
def test_options_that_make_no_sense_with_a_local_server_are_refused(gramophone, nowhere, flags):
    code, _, err = gramophone(f"{STYLIZE} --local {flags}")
    name = flags.split()[0].replace("--server", "--target")
    assert (code, nowhere) == (2, [])
    assert len(err) == 1
    assert err[0].startswith(f"gramophone: {name}: cannot be given with --local, which starts a server for this job ")


def test_an_interrupted_job_that_continues_says_how_to_follow_it(gramophone, service, monkeypatch):
    service.scripts = [[accepted(), frame(120), HANG]]
    monkeypatch.setattr(
        PlainDisplay, "show", lambda _, update: isinstance(update, Frame) and signal.raise_signal(signal.SIGINT)
    )
    code, _, err = gramophone(f"{STYLIZE} --detach 60")
    assert code == 130
    assert err[-2:] == [
        "gramophone: job j1 continues for 60 s; to follow it: gramophone watch j1 -o out.png",
        "gramophone: interrupted",
    ]


def test_sigterm_ends_a_job_as_an_interrupt_does(gramophone, service, monkeypatch):
    service.scripts = [[accepted(), frame(120), progress(121), HANG]]
    monkeypatch.setattr(
        PlainDisplay, "show", lambda _, update: isinstance(update, Progress) and signal.raise_signal(signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = gramophone(STYLIZE)
    assert (code, err[-1]) == (143, "gramophone: terminated")
    assert "iteration 120 of 300 is kept as out.png" in err[-2]
    assert service.call_ended.wait(WITHIN_S) and service.cancelled
    assert signal.getsignal(signal.SIGTERM) == before


def test_large_files_are_uploaded_and_named_in_errors(gramophone, service, folder):
    large = encoded("red") + bytes(INLINE_BYTES)
    (folder / "photo.png").write_bytes(large)
    code, _, _ = gramophone("stylize photo.png painting.png -o out.png")
    assert code == 0 and list(service.images.values()) == [large]
    (folder / "job.state").write_bytes(large[1:])
    service.max_upload_bytes = len(large) - 2
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --resume job.state")
    assert code == 2 and err[-1].startswith("gramophone: job.state: is not taken as a checkpoint: ")
    assert err[-1].endswith("of more than 4 MiB are)")
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.resume_digest", "is damaged")]))]]
    service.images["sha256:" + hashlib.sha256(large[1:]).hexdigest()] = large[1:]
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --resume job.state")
    assert (code, err[-1]) == (2, "gramophone: job.state: is damaged")


def test_a_long_upload_is_shown(gramophone, service, folder, monkeypatch):
    monkeypatch.setattr(outputs, "WAIT_INTERVAL_S", 0.01)
    monkeypatch.setattr(outputs, "WAIT_SHOWN_AFTER_S", 0.02)

    class Watched(PlainDisplay):
        def set_status(self, text):
            super().set_status(text)
            if text == "uploads images, 4.0 of 4.0 MiB":
                service.go.set()

    monkeypatch.setattr(outputs, "PlainDisplay", Watched)
    service.go.clear()
    (folder / "photo.png").write_bytes(encoded("red") + bytes(INLINE_BYTES))
    code, _, err = gramophone("stylize photo.png painting.png -o out.png")
    assert code == 0 and err[0].startswith("uploads images, ") and err[0].endswith(" of 4.0 MiB")
    assert err[1].startswith("job j1")


async def test_a_short_upload_is_not_shown():
    class Silent(PlainDisplay):
        def set_status(self, text):
            pytest.fail(text)

    async with outputs.showing_waits(waiting(UploadProgress(1, 2)), Silent(io.StringIO())):
        await asyncio.sleep(2 * outputs.WAIT_INTERVAL_S)


async def test_quiet_shows_no_wait():
    async with outputs.showing_waits(waiting(), None):
        assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (errors.ConnectionFailedError("gone"), "the server is lost; looks for it, or for another one, for 0 s so far"),
        (errors.JobNotFoundError("gone"), "the server is lost; looks for it, or for another one, for 0 s so far"),
        (errors.NotReadyError("loads"), "waits until the server is ready, for 0 s so far"),
        (errors.QueueFullError("full"), "waits until the server has room, for 0 s so far"),
    ],
)
async def test_a_wait_for_a_server_is_shown(monkeypatch, loss, words):
    monkeypatch.setattr(outputs, "WAIT_INTERVAL_S", 0.001)
    monkeypatch.setattr(outputs, "WAIT_SHOWN_AFTER_S", 0.0)
    shown = asyncio.Queue()
    job = waiting(loss=loss)
    async with outputs.showing_waits(job, SimpleNamespace(set_status=shown.put_nowait)), asyncio.timeout(WITHIN_S):
        assert await shown.get() == words
        job.loss = None
        await asyncio.sleep(0.01)
        while not shown.empty():
            shown.get_nowait()
        await asyncio.sleep(0.01)
        assert shown.empty()  # the job runs again


def waiting(progress=None, loss=None):
    return SimpleNamespace(upload_progress=progress, loss=loss)
