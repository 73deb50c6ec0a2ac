import io
import json
import os
import re
import signal
from dataclasses import fields

import grpc
import pytest
from PIL import Image
from rich.console import Console

from gramophone.recipe import PRESETS, LayerWeight, Recipe, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_client import cli
from gramophone_client.commands import stylize
from gramophone_client.console.display import HalfBlocks, LiveDisplay, PlainDisplay
from gramophone_client.console.recipe_flags import add_recipe_flags, as_flags, flag, recipe_overrides
from gramophone_client.console.timelapse import Timelapse
from gramophone_client.streams import recovery_states
from gramophone_client.transport.parsing import update
from gramophone_client.types import picture
from gramophone_client.types.picture import Picture, write_whole
from gramophone_server import errors as server_errors
from tests.support.fake_service import (
    HANG,
    accepted,
    bare,
    checkpoint,
    encoded,
    frame,
    job,
    numbered,
    progress,
    refused,
    result,
    waiting,
)

STYLE_WEIGHTS = [0.25, 0.75]
NOTE = json.dumps(
    {
        "gramophone": "0.1.0",
        "recipe": {field.name: getattr(PRESETS["textbook"], field.name) for field in fields(Recipe)},
        "style_weights": STYLE_WEIGHTS,
        "seed": 7,
        "weights": "none",
    }
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with two pictures, for short command lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(encoded("red"))
    (tmp_path / "painting.png").write_bytes(encoded("yellow"))
    return tmp_path


@pytest.fixture
def gramophone(service, monkeypatch, capsys):
    """Runs a command against the fake service: (exit code, standard output, lines of standard error)."""
    monkeypatch.setenv("GRAMOPHONE_SERVER", service.target)

    def run(command: str):
        try:
            code = cli.main(command.split())
        except SystemExit as left:  # argparse
            code = left.code
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


# --- stylize


def test_stylize_writes_the_picture_and_prints_its_path(gramophone, service, here):
    code, out, err = gramophone("stylize photo.png painting.png -o out.png")
    assert (code, out) == (0, "out.png\n")
    assert (here / "out.png").read_bytes() == encoded("green")
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


def test_frames_are_numbered_files(gramophone, service, here):
    code, _, _ = gramophone("stylize photo.png painting.png -o out.png --frames f --frame-every 10 --frame-size 12")
    assert code == 0
    assert sorted(os.listdir("f")) == ["frame-0001.jpg", "frame-0002.jpg"]
    assert (service.specs[0].frames.every_iterations, service.specs[0].frames.max_side) == (10, 12)
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


def test_quiet_is_quiet(gramophone):
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


# --- what can go wrong

BAD = server_errors.InvalidRequest(
    [
        Violation("spec.recipe.beta", "must be fine"),
        Violation("spec.recipe.style_layers[1].layer", "is not a layer"),
        Violation("spec.content.data", "is a HEIC"),
        Violation("spec.styles[0].image.data", "is truncated"),
        Violation("spec.styles[0].weight", "must be above 0"),
        Violation("spec.result_quality", "must be 1 to 100"),
        Violation("spec.new_field", "must be new"),
    ]
)
NEVER = (("grpc-retry-pushback-ms", "-1"),)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (refused(BAD), 2),
        (bare(grpc.StatusCode.UNAVAILABLE, "gone", NEVER), 3),
        (refused(server_errors.ShuttingDown()), 3),
        (bare(grpc.StatusCode.RESOURCE_EXHAUSTED, "", NEVER), 4),
        (refused(server_errors.OutOfDeviceMemory(9, 9)), 4),
        (refused(server_errors.Diverged(3)), 5),
        (refused(server_errors.EngineFailed()), 5),
        (bare(grpc.StatusCode.UNKNOWN), 5),
    ],
    ids=lambda value: str(value)[:40],
)
def test_exit_codes(gramophone, service, here, status, code):
    status.trailing_metadata += NEVER
    service.scripts = [[status]]
    got, out, err = gramophone("stylize photo.png painting.png -o out.png")
    assert (got, out) == (code, "")
    assert err and all(line.startswith("gramophone: ") for line in err)
    assert sorted(os.listdir()) == ["painting.png", "photo.png"]


def test_violations_name_what_was_typed_each_on_its_line(gramophone, service):
    service.scripts = [[refused(BAD)]]
    _, _, err = gramophone("stylize photo.png painting.png -o out.png")
    assert err == [
        "gramophone: --beta: must be fine",
        "gramophone: --style-layers[1].layer: is not a layer",
        "gramophone: photo.png: is a HEIC",
        "gramophone: painting.png: is truncated",
        "gramophone: --style-weights: must be above 0",
        "gramophone: --result-quality: must be 1 to 100",
        "gramophone: spec.new_field: must be new",
    ]


def test_the_time_limit_is_an_exit_code(gramophone, service):
    service.scripts = [[accepted(), HANG]]
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --timeout 0.1")
    assert code == 4
    assert "not done within 0.1 s" in err[-1]


def test_a_server_that_is_not_ready_is_an_exit_code(gramophone):
    for command in ("info", "stylize photo.png painting.png -o out.png"):
        code, out, err = gramophone(f"{command} --wait 0.1 --server 127.0.0.1:1")
        assert (code, out) == (3, "")
        assert re.match(r"gramophone: the server at 127\.0\.0\.1:1 is not ready after 0\.1 s", err[-1])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "required: COMMAND"),
        ("stylize photo.png painting.png", "required: -o/--out"),
        ("stylize photo.png painting.png -o out.gif", "must end in .jpg, .jpeg, .png, .webp, got '.gif'"),
        ("stylize photo.png painting.png -o out.png --timelapse film.mp4", "must end in .gif or .webp, got '.mp4'"),
        ("stylize photo.png painting.png -o no/out.png", "no/out.png: there is no folder no; make it first"),
        ("stylize photo.png missing.png -o out.png", "missing.png: there is no such file"),
        ("stylize . painting.png -o out.png", ".: is not a file"),
        ("stylize photo.png painting.png -o out.png --beta -1", "--beta: must be between 0 and 1e+15, got -1"),
        ("stylize photo.png painting.png -o out.png --beta much", "argument --beta: invalid float value: 'much'"),
        ("stylize photo.png painting.png -o out.png --pooling min", "argument --pooling: invalid choice: 'min'"),
        ("stylize photo.png painting.png -o out.png --style-layers relu1_1:x", "got 'relu1_1:x'"),
        ("stylize photo.png painting.png -o out.png --style-weights 1,2", "expected one for each of 1 styles, got 2"),
        (
            "stylize photo.png painting.png -o out.png --seed -1",
            "argument --seed: must be a whole number from 0 to 2**64-1, got '-1'",
        ),
        ("stylize photo.png painting.png -o out.png --iter 5", "unrecognized arguments: --iter"),
        ("stylize photo.png painting.png -o out.png --frame-size 99999999999", "a value does not fit into the request"),
        ("recipe missing.png", "missing.png: No such file"),
        ("stylize photo.png painting.png -o out.png --resume no", "no: there is no such file"),
        ("stylize photo.png painting.png -o out.png --checkpoint no/c", "no/c: there is no folder no; make it first"),
        (
            "stylize photo.png painting.png -o out.png --resume photo.png --seed 1 --beta 2 --preset fast",
            "--preset, --seed, --beta: cannot be given with --resume, which continues with the checkpoint's",
        ),
    ],
)
def test_bad_usage_is_refused_in_words(gramophone, service, command, words):
    code, out, err = gramophone(command)
    assert (code, out, service.specs) == (2, "", [])
    assert words in err[-1]


def test_an_interrupt_stops_the_job_and_keeps_the_picture(gramophone, service, monkeypatch):
    service.scripts = [[accepted(), frame(120, "blue", (24, 18)), HANG]]
    keep = stylize._Job._keep_frame

    def interrupted(job, arrived):
        keep(job, arrived)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stylize._Job, "_keep_frame", interrupted)
    for name in ("out.png", "out-unfinished.png"):  # the second time, beside the first
        code, out, err = gramophone("stylize photo.png painting.png -o out.png")
        assert (code, out) == (130, "")
        assert err[-2:] == [
            f"gramophone: the picture after iteration 120 of 300 is kept as {name}",
            "gramophone: interrupted",
        ]
        assert service.over.wait(5) and service.cancelled
        with Image.open(name) as image:
            assert (image.format, image.size) == ("PNG", (24, 18))


def test_an_interrupt_after_the_result_leaves_the_result(gramophone, here, monkeypatch):
    monkeypatch.setattr(Timelapse, "save", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --timelapse film.gif --quiet")
    assert (code, err) == (130, ["gramophone: interrupted"])
    assert (here / "out.png").read_bytes() == encoded("green")


def test_a_diverged_job_leaves_its_last_good_picture(gramophone, service, here):
    service.scripts = [[accepted(), frame(10), refused(server_errors.Diverged(11))]]
    code, _, err = gramophone("stylize photo.png painting.png -o out.png --quiet")
    assert code == 5
    assert "iteration 10 of 300 is kept as out.png" in err[0]
    assert "smaller step" in err[1]
    assert (here / "out.png").exists()


# --- files


def test_files_appear_whole_or_not_at_all(here, monkeypatch):
    path = here / "out.png"
    write_whole(path, b"old")
    assert path.stat().st_mode == (here / "photo.png").stat().st_mode

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture.Path, "replace", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_whole(path, b"new")
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(here)) == ["out.png", "painting.png", "photo.png"]


@pytest.fixture
def full_disk(monkeypatch):
    """No file whose name begins so can be written."""

    def fill(start):
        replace = picture.Path.replace

        def full(path, target):
            if target.name.startswith(start):
                raise OSError(28, "No space left on device")
            return replace(path, target)

        monkeypatch.setattr(picture.Path, "replace", full)

    return fill


def test_a_full_disk_for_frames_is_one_sentence_and_the_picture_is_kept(gramophone, service, here, full_disk):
    service.scripts = [[accepted(), frame(10), HANG]]
    full_disk("frame-")
    code, out, err = gramophone("stylize photo.png painting.png -o out.png --frames f --quiet")
    assert (code, out) == (2, "")
    assert err == [
        "gramophone: the picture after iteration 10 of 300 is kept as out.png",
        "gramophone: f/frame-0001.jpg: No space left on device",
    ]
    assert service.over.wait(5) and service.cancelled
    assert os.listdir(here / "f") == []


def test_a_full_disk_for_the_result_is_one_sentence(gramophone, service, full_disk):
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


# --- help


def test_help_tells_every_field_and_default_of_a_recipe(gramophone, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = gramophone("stylize --help")
    words = " ".join(out.split())
    for field in fields(Recipe):
        assert f"{flag(field.name)} " in words
        allowed = field.metadata["range"]
        told = field.metadata["help"] + (f"; {allowed.low:g} to {allowed.high:g}" if allowed else "")
        assert f"{told} (default " in words
    assert "(default fast 30, quality 150, textbook 300)" in words
    for code in (0, 2, 3, 4, 5, 130):
        assert re.search(rf"^ +{code}  \w", out, re.MULTILINE)


# --- jobs that are there already


def test_a_detached_job_is_found_again(gramophone, service, here, monkeypatch):
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.01, 0.05))
    whole = numbered(accepted(), frame(1), result())
    service.scripts = [[*whole[:2], bare(grpc.StatusCode.UNAVAILABLE, "gone")], whole[2:]]
    code, out, err = gramophone("stylize photo.png painting.png -o out.png --detach 5")
    assert (code, out) == (0, "out.png\n")
    assert err[0].startswith("job j1: ")
    assert service.specs[0].detach_grace.seconds == 5
    assert [(watch.job_id, watch.after_sequence) for watch in service.watches] == [("j1", 2)]
    assert (here / "out.png").read_bytes() == encoded("green")


def test_watch_writes_what_stylize_would(gramophone, service, here):
    code, out, err = gramophone("watch j1 -o out.jpg --frames f --frame-every 10 --timelapse film.gif")
    assert (code, out) == (0, "out.jpg\n")
    assert err == ["job j1: 24x18, 300 iterations, seed 7", "24x18, 300 iterations in 2.2 s, loss 0.5"]
    assert sorted(os.listdir("f")) == ["frame-0001.jpg", "frame-0002.jpg"]
    assert (here / "film.gif").exists()
    with Image.open("out.jpg") as image:
        assert image.format == "JPEG"
    (watched,) = service.watches
    assert (watched.job_id, watched.after_sequence, watched.frames.every_iterations) == ("j1", 0, 10)
    assert service.specs == []
    code, _, err = gramophone("watch j1 -o out.jpg --frames f")
    assert (code, len(service.watches)) == (2, 1)


def test_a_watched_job_that_ends_early_leaves_its_picture(gramophone, service, here):
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
    told = json.loads(gramophone("jobs --json")[1])
    assert [(one["job_id"], one["state"]) for one in told] == [("j2", "QUEUED"), ("j1", "RUNNING")]
    assert told[0]["create_time"] == "2025-06-15T15:06:40+00:00"


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


def test_a_job_that_is_not_there_cannot_be_cancelled(gramophone):
    code, out, err = gramophone("cancel j9")
    assert (code, out) == (2, "")
    assert "there is no job 'j9'" in err[0]


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_a_grace_is_a_number_of_seconds(gramophone, service, seconds):
    code, _, err = gramophone(f"stylize photo.png painting.png -o out.png --detach {seconds}")
    assert (code, service.specs) == (2, [])
    assert "argument --detach: must be a number of seconds, 0 or more" in err[-1]


def test_a_grace_above_the_limit_is_told_as_typed(gramophone, service):
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.detach_grace", "must be less")]))]]
    assert gramophone("stylize photo.png painting.png -o out.png --detach 9999")[2] == [
        "gramophone: --detach: must be less"
    ]


def test_waiting_is_shown():
    out = io.StringIO()
    display = PlainDisplay(out, 0)
    for event in (waiting(2), waiting(1, wait_s=75), accepted(queue_position=1, estimated_wait={"seconds": 5})):
        display.show(update(event))
    assert out.getvalue().splitlines() == [
        "waits at place 2 of the queue",
        "waits at place 1 of the queue, about 1:15",
        "job j1: 24x18, 300 iterations, seed 7, waits at place 1 of the queue, about 0:05",
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None, legacy_windows=False)
    live = LiveDisplay(console, preview=False)
    live.show(update(waiting(2)))
    assert "waits at place 2 of the queue" in drawn(live._render(), 60, colours=None)


# --- checkpoints


def test_a_job_goes_on_from_a_file(gramophone, service, here):
    service.scripts = [[accepted(), checkpoint(10), checkpoint(20, light=False), result()]]
    code, _, _ = gramophone("stylize photo.png painting.png -o out.png --checkpoint job.checkpoint")
    assert (code, (here / "job.checkpoint").read_bytes()) == (0, b"state after 20")
    assert (service.specs[0].checkpoints.light, service.specs[0].checkpoints.min_interval.seconds) == (False, 10)
    service.scripts = [[accepted(resumed_at=20), result()]]
    code, _, err = gramophone("stylize photo.png painting.png -o again.png --resume job.checkpoint")
    assert (code, err[0]) == (0, "job j1: 24x18, 300 iterations, seed 7, from iteration 20")
    assert (service.specs[1].resume, service.specs[1].HasField("recipe")) == (b"state after 20", False)
    assert service.specs[1].checkpoints.light  # enough to go on from elsewhere


def test_a_job_that_moves_says_so(gramophone, service, monkeypatch):
    monkeypatch.setattr(recovery_states, "RETRY_PAUSE_S", (0.01, 0.05))
    lost = bare(grpc.StatusCode.UNAVAILABLE, "gone")
    service.scripts = [
        [accepted(), checkpoint(38), progress(40), lost],
        [accepted(job_id="j2", resumed_at=38), lost],
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


def test_a_terminal_keeps_the_note_of_a_move():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with LiveDisplay(console, preview=False) as display:
        for event in (accepted(), progress(40), accepted(job_id="j2", resumed_at=38), progress(39)):
            display.show(update(event))
    assert "server lost at iteration 40, going on as job j2 from iteration 38" in console.file.getvalue()


# --- info, recipe


def test_info(gramophone):
    code, out, err = gramophone("info")
    assert (code, err) == (0, [])
    assert "device   cpu (a test), fp32" in out
    assert "jobs     1 of at most 2 running, 0 of at most 16 waiting, 1 paused\nwait     about 12.5 s\n" in out
    assert "watchers at most 8 of a job; one may pause it, for at most 600 s\n" in out
    assert "states   checkpoints of at most 64 MiB\n" in out
    assert "styles   2.5 of at most 64 MiB kept, 3 of 4 found there\n" in out
    assert "uploads  0.0 of at most 1024 MiB kept, 0 of 0 found there\n" in out
    assert gramophone("--version")[1].startswith("gramophone ")
    code, out, _ = gramophone("info --json")
    told = json.loads(out)
    assert (told["version"], told["limits"]["max_size"], told["presets"]["fast"]["beta"]) == ("1.2.3", 2048, 3.0)
    assert (told["style_cache"]["hits"], told["estimated_wait_s"], told["limits"]["max_watchers"]) == (3, 12.5, 8)


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_recipe_prints_the_flags_that_make_the_picture_again(gramophone, service, name):
    service.scripts = [[accepted(), result(encoded(note=NOTE))]]
    gramophone(f"stylize photo.png painting.png -o {name}")
    code, out, _ = gramophone(f"recipe {name}")
    assert code == 0
    gramophone(f"stylize photo.png painting.png photo.png -o again.png {out}")
    spec = service.specs[1]
    assert (recipe_from_message(spec.recipe), spec.seed) == (PRESETS["textbook"], 7)
    assert [style.weight for style in spec.styles] == STYLE_WEIGHTS
    told = json.loads(gramophone(f"recipe {name} --json")[1])
    assert (told["seed"], told["recipe"]["start"], told["iterations"]) == (7, "noise", None)


def test_a_recipe_that_was_changed_on_the_way_is_said_to_be(gramophone, here):
    (here / "tuned.png").write_bytes(encoded(note=json.dumps(json.loads(NOTE) | {"iterations": 90, "changed_at": 41})))
    code, out, err = gramophone("recipe tuned.png")
    assert code == 0 and out.startswith("--seed 7")
    assert "was changed while tuned.png was made, and is this one from iteration 41 on" in err[0]
    told = json.loads(gramophone("recipe tuned.png --json")[1])
    assert (told["iterations"], told["changed_at"]) == (90, 41)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(), "has no recipe in it"),
        (b"text", "is not a picture"),
        (encoded(note="{}"), "this version does not know its recipe"),
        (encoded(note="[1]"), "this version does not know its recipe"),
        (encoded(note=NOTE.replace("beta", "gamma")), "this version does not know its recipe"),
    ],
)
def test_pictures_without_a_recipe_are_told_apart(gramophone, here, data, words):
    (here / "other.png").write_bytes(data)
    code, out, err = gramophone("recipe other.png")
    assert (code, out) == (2, "")
    assert words in err[0]


@pytest.mark.parametrize("name", PRESETS)
def test_flags_say_a_recipe_in_full(name):
    parser = cli.argparse.ArgumentParser()
    add_recipe_flags(parser)
    assert Recipe(**recipe_overrides(parser.parse_args(as_flags(PRESETS[name])))) == PRESETS[name]
    assert recipe_overrides(parser.parse_args([])) == {}
    odd = Recipe(beta=1e5 / 3, style_layers=(LayerWeight("relu1_1", 0.1 + 0.2),))
    assert Recipe(**recipe_overrides(parser.parse_args(as_flags(odd)))) == odd
    empty = parser.parse_args(["--style-layers", "", "--content-layers", "relu4_2"])
    assert recipe_overrides(empty) == {"style_layers": (), "content_layers": (LayerWeight("relu4_2", 1),)}


# --- on a terminal


def drawn(renderable, width=40, height=20, colours="truecolor", **environment) -> str:
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system=colours,
        legacy_windows=False,
        _environ={"TERM": "xterm", **environment},
    )
    console.print(renderable)
    return console.file.getvalue()


def blocks() -> HalfBlocks:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 10, 40, 20))
    out = io.BytesIO()
    image.save(out, "png")
    return HalfBlocks(Picture("png", 40, 20, out.getvalue()))


def test_the_preview_fits_the_terminal():
    for width, height, columns, rows in ((40, 60, 40, 10), (20, 60, 20, 5), (200, 6, 16, 4)):
        lines = drawn(blocks(), width, height, None).splitlines()
        assert (len(lines), {len(line.rstrip("\n")) for line in lines}) == (rows, {columns})


def test_the_preview_takes_the_colours_there_are():
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in drawn(blocks())
    assert "\x1b[38;5;196;48;5;196m▀" in drawn(blocks(), colours="256")
    for grey in (drawn(blocks(), colours=None), drawn(blocks(), NO_COLOR="1")):
        assert not re.search(r"\x1b\[[34]8", grey)
        assert "▀" not in grey
        assert grey.splitlines()[0] != grey.splitlines()[-1]  # red is brighter than blue


@pytest.mark.parametrize("width", [100, 60, 30, 12])
def test_the_progress_line_is_one_line_at_every_width(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    display = LiveDisplay(console, preview=False)
    display.show(update(progress(150)))
    lines = drawn(display._render(), width, colours=None).splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert "150/300" in lines[0]
    assert ("loss 3" in lines[0]) == (width > 12)
    assert ("━" in lines[0]) == (width >= 60)
    assert ("12x9" in lines[0]) == (width >= 60)


def test_the_live_display_draws_picture_and_numbers():
    console = Console(
        file=io.StringIO(), force_terminal=True, width=60, height=20, color_system="256", legacy_windows=False
    )
    with LiveDisplay(console, preview=True) as display:
        for event in (accepted(queue_position=2), frame(1), progress(1), result()):
            display.show(update(event))
    out = console.file.getvalue()
    assert "▀" in out
    assert "24x18, 300 iterations in 2.2 s, loss 0.5" in out


# --- timelapse


def test_a_timelapse_is_bounded_and_keeps_its_beginning_and_rhythm():
    timelapse = Timelapse((800, 600), max_side=40, max_frames=8)
    assert timelapse.size == (40, 30)
    for grey in range(100):
        data = encoded((grey, grey, grey), size=(16, 12))
        timelapse.add(Picture("png", 16, 12, data))
        assert len(timelapse.frames) <= 8
    shades = [image.getpixel((0, 0))[0] for image in timelapse.frames]
    assert shades == list(range(0, 100, 16))
    assert {image.size for image in timelapse.frames} == {(40, 30)}


def test_a_gif_has_one_palette_for_all_its_frames(here):
    timelapse = Timelapse((40, 30))
    for colour in ("red", "green", "blue", "white"):
        timelapse.add(Picture("png", 40, 30, encoded(colour, size=(40, 30))))
    timelapse.save("film.gif", last=Picture("png", 40, 30, encoded("orange", size=(40, 30))))
    data = (here / "film.gif").read_bytes()
    # Image descriptors (0x2C, then position and size) with bit 7 of the last byte set would bring their own palette.
    descriptors = re.findall(rb"\x00\x2c.{4}\x28\x00\x1e\x00(.)", data, re.DOTALL)
    assert len(descriptors) == 5
    assert not any(flags[0] & 0x80 for flags in descriptors)
