"""The command line: exit codes, and errors in terms of what was typed."""

import os
import re

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone_client.commands import stylize
from gramophone_server import errors as server_errors
from tests.support.fake_service import HANG, NO_RETRIES, accepted, refused, rpc_status
from tests.support.processes import Process

INVALID = server_errors.InvalidRequest(
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


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (refused(INVALID), 2),
        (rpc_status(grpc.StatusCode.UNAVAILABLE, "gone", NO_RETRIES), 3),
        (refused(server_errors.ShuttingDown()), 3),
        (rpc_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "", NO_RETRIES), 4),
        (refused(server_errors.OutOfDeviceMemory(9, 9)), 4),
        (refused(server_errors.Diverged(3)), 5),
        (refused(server_errors.EngineFailed()), 5),
        (rpc_status(grpc.StatusCode.UNKNOWN), 5),
    ],
    ids=lambda value: str(value)[:40],
)
def test_exit_codes(gramophone, service, folder, monkeypatch, status, code):
    monkeypatch.setattr(stylize, "PATIENCE_S", 0.5)  # after which a job that is lost with its server is given up
    status.trailing_metadata += NO_RETRIES
    service.scripts = [[status]]
    got, out, err = gramophone("stylize photo.png painting.png -o out.png")
    assert (got, out) == (code, "")
    assert err and all(line.startswith("gramophone: ") for line in err)
    assert sorted(os.listdir()) == ["painting.png", "photo.png"]


def test_violations_name_what_was_typed_each_on_its_line(gramophone, service):
    service.scripts = [[refused(INVALID)]]
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
        assert re.match(
            r"gramophone: the server at 127\.0\.0\.1:1 is not ready after 0\.1 s: .*; start it, or", err[-1]
        )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("stylize photo.png painting.png", "required: -o/--out"),
        ("stylize photo.png painting.png -o out.gif", "must end in .jpg, .jpeg, .png, .webp, got '.gif'"),
        ("stylize photo.png painting.png -o out.png --timelapse film.mp4", "must end in .gif or .webp, got '.mp4'"),
        ("stylize photo.png painting.png -o no/out.png", "no/out.png: there is no folder no; make it first"),
        ("stylize photo.png missing.png -o out.png", "missing.png: there is no such file"),
        ("stylize . painting.png -o out.png", ".: is not a file"),
        ("stylize photo.png painting.png -o out.png --beta -1", "--beta: must be between 0 and 1e+15, got -1"),
        ("stylize photo.png painting.png -o out.png --beta much", "argument --beta: expected a number, got 'much'"),
        (
            "stylize photo.png painting.png -o out.png --pooling min",
            "must be one of max, average, got 'min'",
        ),
        ("stylize photo.png painting.png -o out.png --style-layers relu1_1:x", "got 'relu1_1:x'"),
        ("stylize photo.png painting.png -o out.png --style-weights 1,2", "expected one for each of 1 styles, got 2"),
        (
            "stylize photo.png painting.png -o out.png --seed -1",
            "argument --seed: must be a whole number from 0 to 2**64-1, got '-1'",
        ),
        ("stylize photo.png painting.png -o out.png --iter 5", "there is no option --iter; did you mean --iterations?"),
        (
            "stylize photo.png painting.png -o out.png --frame-size 99999999999",
            "--frame-size: must be 16 to 16384, or 0, got 1e",
        ),
        ("recipe missing.png", "missing.png: No such file"),
        ("stylize photo.png painting.png -o out.png --resume no", "no: there is no such file"),
        ("stylize photo.png painting.png -o out.png --checkpoint no/c", "no/c: there is no folder no; make it first"),
        (
            "stylize photo.png painting.png -o out.png --resume photo.png --seed 1 --beta 2 --preset fast",
            "--preset, --seed, --beta: cannot be given with --resume, which continues with the checkpoint's",
        ),
    ],
)
def test_bad_usage_is_explained(gramophone, service, command, words):
    code, out, err = gramophone(command)
    assert (code, out, service.specs) == (2, "", [])
    assert words in err[-1]


COMMANDS = ("stylize", "watch", "cancel", "jobs", "control", "info", "recipe", "targets", "bench", "completion")


def test_without_words_the_three_most_common_commands_are_printed(gramophone):
    code, out, err = gramophone("")
    assert (code, err) == (0, [])
    assert re.findall(r"^  gramophone (\w+)", out, re.MULTILINE) == ["stylize", "watch", "info"]
    assert len(out.splitlines()) < 10


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", ["80", None, "40"])
def test_help_fits_and_comes_in_groups(gramophone, monkeypatch, command, columns):
    if columns is None:  # a pipe
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    code, out, err = gramophone(f"{command} --help")
    assert (code, err) == (0, [])
    assert out.startswith(f"usage: gramophone {command or 'COMMAND'}")
    if columns != "40":
        assert max(map(len, out.splitlines())) <= 80
        groups = dict(re.findall(r"^(\w.*):\n((?:  .*\n|\n)*)", out, re.MULTILINE))
        assert len(re.findall(r"^  -", groups["options"], re.MULTILINE)) <= 2  # --help, and perhaps --json
        for text in groups.values():
            assert len(re.findall(r"^  -", text, re.MULTILINE)) <= 7


def test_the_help_of_all_commands_is_tested(gramophone):
    _, out, _ = gramophone("--help")
    listed = re.findall(r"^    (\w+)  ", out.split("commands:")[1].split("exit codes:")[0], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    for code in (0, 2, 3, 4, 5, 130):
        assert re.search(rf"^ +{code}  \w", out, re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("recipe", "targets", "completion")])
def test_every_command_that_talks_to_a_server_takes_a_target_in_both_spellings(gramophone, command):
    _, out, _ = gramophone(f"{command} --help")
    assert re.search("--target( TARGET)?, --server TARGET", out)  # Python 3.13 and newer write TARGET once
    assert "--metadata KEY=VALUE" in out


def test_both_spellings_of_the_target_are_one_option(gramophone, service, monkeypatch):
    monkeypatch.setenv("GRAMOPHONE_SERVER", "127.0.0.1:1")
    for option in (
        f"--target {service.target}",
        f"--server {service.target}",
        f"--server 127.0.0.1:1 --target {service.target}",
    ):
        assert gramophone(f"info {option}")[0] == 0
    monkeypatch.setenv("GRAMOPHONE_TARGET", service.target)
    assert gramophone("info")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stylise a b -o c.png", "there is no command 'stylise'; did you mean stylize?"),
        ("ls", "there is no command 'ls'; did you mean jobs?"),
        ("help", "there is no command 'help'; did you mean --help?"),
        ("server", "there is no command 'server'; did you mean gramophone-server?"),
        ("photo.png painting.png", "there is no command 'photo.png'; see gramophone --help"),
        ("--verison", "there is no option --verison; did you mean --version?"),
        ("--json info", "there is no option --json; see gramophone --help"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest_one(gramophone, words, message):
    assert gramophone(words) == (2, "", [f"gramophone: {message}"])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--normalization gatys", "--normalisation"),
        ("--lr 0.1", "--step"),
        ("--style-weight 3", "--beta"),
        ("--optimizer adam", "--optimiser"),
        ("--itertions 3", "--iterations"),
        ("--content-weight 1", "--alpha"),
        ("--output out.png", "--out"),
        ("--url localhost", "--target"),
        ("--sever localhost:1", "--server"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_one(gramophone, service, option, meant):
    # Also if something is missing, perhaps because the option has the name of another program.
    expected = f"gramophone stylize: there is no option {option.split()[0]}; did you mean {meant}?"
    assert gramophone(f"stylize photo.png painting.png {option}") == (2, "", [expected])
    assert service.specs == []


def test_a_value_is_answered_with_the_nearest_one(gramophone):
    for words, hint in (
        ("stylize a b -o c.png --optimiser adm", "did you mean adam?"),
        ("stylize a b -o c.png --preset qualty", "did you mean quality?"),
        ("stylize a b -o c.png --pooling avg", "did you mean average?"),
        ("bench --preset texbook", "did you mean textbook?"),
        ("control j1 --set style-weight=3", "did you mean beta?"),
        ("control j1 --set tv_wieght=3", "did you mean tv-weight?"),
    ):
        code, _, err = gramophone(words)
        assert (code, len(err)) == (2, 1)
        assert err[0].endswith(hint)


def test_metadata_is_refused_without_its_value(gramophone):
    code, _, err = gramophone("info --metadata Authorization=s3cret")
    assert code == 2
    words = "argument --metadata: Authorization: must be named with a-z, 0-9, -, _ and ."
    assert err == [f"gramophone info: {words}; see gramophone info --help"]


def test_a_broken_file_of_targets_is_bad_usage(gramophone, folder, monkeypatch):
    monkeypatch.delenv("GRAMOPHONE_SERVER")
    path = folder / "config" / "gramophone" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text("default = 1\nx = 2\n")
    code, _, err = gramophone("info")
    assert (code, len(err)) == (2, 2)
    assert all(line.startswith(f"gramophone: {path}: ") for line in err)
    assert gramophone("info --target nowhere")[2][0].startswith(f"gramophone: {path}: ")


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_a_grace_is_a_number_of_seconds(gramophone, service, seconds):
    code, _, err = gramophone(f"stylize photo.png painting.png -o out.png --detach {seconds}")
    assert (code, service.specs) == (2, [])
    assert "argument --detach: must be a number of seconds, 0 or more" in err[-1]


def test_a_grace_above_the_limit_is_reported_as_typed(gramophone, service):
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.detach_grace", "must be less")]))]]
    assert gramophone("stylize photo.png painting.png -o out.png --detach 9999")[2] == [
        "gramophone: --detach: must be less"
    ]


def test_a_checkpoint_that_the_server_refuses_is_named(gramophone, service, folder):
    (folder / "job.state").write_bytes(b"state")
    service.scripts = [[refused(server_errors.InvalidRequest([Violation("spec.resume", "is not a checkpoint")]))]]
    assert gramophone("stylize photo.png painting.png -o out.png --resume job.state")[2] == [
        "gramophone: job.state: is not a checkpoint"
    ]


def test_python_m_is_the_command(tmp_path):
    with Process("-m", "gramophone_client", "stylise", cwd=tmp_path) as command:
        assert command.code() == 2
    assert command.output == "gramophone: there is no command 'stylise'; did you mean stylize?\n"
