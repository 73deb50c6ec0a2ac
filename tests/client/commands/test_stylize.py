import io
import os
import signal

import pytest
from PIL import Image

from gramophone.recipe import PRESETS, LayerWeight
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_client import Frame
from gramophone_client.console.display import PlainDisplay
from gramophone_client.console.timelapse import Timelapse
from gramophone_client.transport.parsing import update
from gramophone_client.types import picture
from gramophone_server import errors as server_errors
from tests.support.fake_service import (
    HANG,
    LOST,
    accepted,
    checkpoint,
    encoded,
    frame,
    numbered,
    progress,
    refused,
    result,
)

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_stylize_writes_the_picture_and_prints_its_path(gramophone, service, folder):
    code, out, err = gramophone("stylize photo.png painting.png -o out.png")
    assert (code, out) == (0, "out.png\n")
    assert (folder / "out.png").read_bytes() == encoded("green")
    assert err == [
        "job j1: 24x18, 300 iterations, seed 7",
        "24x18, 300 iterations in 2.2 s, loss 0.5",
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
        assert lines == 1 or out.getvalue().splitlines()[1] == "10/300, loss 3, 1:30 left, 8 it/s, 12x9"
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
        assert service.call_ended.wait(5) and service.cancelled
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
    assert service.call_ended.wait(5) and service.cancelled
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
    assert (code, err[0]) == (0, "job j1: 24x18, 300 iterations, seed 7, from iteration 20")
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
        "server lost at iteration 40, going on as job j2 from iteration 38",
        "server lost at iteration 38, going on as job j3 from iteration 38",
    ]
    out = io.StringIO()
    display = PlainDisplay(out)
    for event in (accepted(), accepted(job_id="j2", queue_position=2)):
        display.show(update(event))
    assert out.getvalue().splitlines()[1] == (
        "server lost at iteration 0, going on as job j2 from its beginning, waits at place 2 of the queue"
    )
