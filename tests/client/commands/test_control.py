import os
import sys
import threading

import grpc
import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import cli
from gramophone_server import errors as server_errors
from tests.support.fake_service import (
    HANG,
    Take,
    accepted,
    bare,
    changed,
    checkpoint,
    encoded,
    numbered,
    picture,
    progress,
    refused,
    result,
)


@pytest.fixture
def gramophone(service, tmp_path, monkeypatch, capsys):
    """Runs a command against the fake service: (exit code, lines of standard output, lines of standard error)."""
    monkeypatch.setenv("GRAMOPHONE_SERVER", service.target)
    monkeypatch.chdir(tmp_path)

    def run(command: str):
        try:
            code = cli.main(command.split())
        except SystemExit as left:  # argparse
            code = left.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def commands(service):
    return [message.WhichOneof("command") for message in service.messages]


def test_a_lost_connection_is_made_again(gramophone, service):
    lost = bare(grpc.StatusCode.UNAVAILABLE, "gone")
    service.scripts = [[*numbered(accepted()), lost], [Take(5), Take(6), *numbered(accepted(), result())]]
    code, out, err = gramophone("control j1 --pause --finish --detach 5")
    assert (code, err) == (0, [])
    assert out == ["paused before iteration 5", "finished after 300 iterations"]
    assert commands(service) == ["attach", "attach", "pause", "finish"]


def test_options_are_commands_in_their_order(gramophone, service, tmp_path):
    taken = [Take(7, taken=picture(7)), Take(8, taken=checkpoint(8, light=False))]
    service.scripts = [[accepted(), Take(5), Take(6), *taken, Take(9), result()]]
    code, out, err = gramophone(
        "control j1 --finish --resume --set beta=5 --set tv-weight=0.5 --set style-layers=relu1_1:1,relu2_1:0.5 "
        "--set iterations=40 --save now.jpg --checkpoint job.checkpoint"
    )
    assert (code, err) == (0, [])
    assert out == [
        "goes on with iteration 5",
        "changed from iteration 6 on",
        "now.jpg",
        "job.checkpoint",
        "finished after 300 iterations",
    ]
    assert commands(service) == ["attach", "resume", "update", "frame", "checkpoint", "finish"]
    update = service.messages[2].update
    assert (update.beta, update.tv_weight, update.iterations) == (5, 0.5, 40)
    assert [(one.layer, one.weight) for one in update.style_layers.layers] == [("relu1_1", 1), ("relu2_1", 0.5)]
    assert (tmp_path / "job.checkpoint").read_bytes() == b"state after 8"
    assert (tmp_path / "now.jpg").read_bytes().startswith(b"\xff\xd8")


def test_a_pause_says_where(gramophone, service):
    service.scripts = [[accepted(), Take(12), HANG]]
    assert gramophone("control j1 --pause") == (0, ["paused before iteration 12"], [])


def test_a_bad_value_is_told_as_typed(gramophone, service):
    service.scripts = [[accepted(), Take(wrong="must be between 0 and 1e+15, got -1"), HANG]]
    code, out, err = gramophone("control j1 --set beta=-1")
    assert (code, out, err) == (2, [], ["gramophone: --set beta: must be between 0 and 1e+15, got -1"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("control j1", "standard input is not a terminal, so that no keys can be read; use --pause, --resume, "),
        ("control j1 --pause --resume", "argument --resume: not allowed with argument --pause"),
        ("control j1 --set size=3", "expected FIELD=VALUE with a field of alpha, beta, tv-weight, step, "),
        ("control j1 --set beta", "got 'beta'"),
        ("control j1 --set beta=much", "argument --set: beta: expected a number, got 'much'"),
        ("control j1 --set style-layers=relu1_1:x", "expected LAYER:WEIGHT,..."),
        ("control j1 --save now.gif", "must end in .jpg, .jpeg, .png, .webp, got '.gif'"),
        ("control j1 --save no/now.png", "no/now.png: there is no folder no; make it first"),
    ],
)
def test_bad_usage_is_refused_in_words(gramophone, service, command, words):
    code, out, err = gramophone(command)
    assert (code, out, service.messages) == (2, [], [])
    assert words in err[-1]


@pytest.mark.parametrize(
    ("error", "code"), [(server_errors.JobControlled("j1"), 2), (server_errors.TooManyWatchers(8), 4)]
)
def test_refusals_are_exit_codes(gramophone, service, error, code):
    service.scripts = [[refused(error)]]
    assert gramophone("control j1 --pause") == (code, [], [f"gramophone: {error}"])


@pytest.fixture
def press(monkeypatch):
    """A terminal as standard input, and what types on it."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield lambda keys: os.write(ours, keys.encode())
    os.close(ours)


def test_keys_are_commands(gramophone, service, press, tmp_path):
    paused, resumed = pb.JobEvent(paused=pb.Paused(iteration=3)), pb.JobEvent(resumed=pb.Resumed(iteration=3))
    service.scripts = [
        [
            accepted(),
            progress(3),
            *(Take(4), paused, Take(3, taken=picture(3)), Take(4), resumed),
            *(Take(5), changed(5, beta=3.75), Take(5, wrong="must be less"), Take(6, taken=checkpoint(6))),
            *(Take(7), result()),
        ]
    ]
    typing = iter(["s", "p", "+", "-", "c", "?f"])
    played = service._answered

    def answered(take, request):  # the next key when the one before was seen to
        yield from played(take, request)
        if key := next(typing, ""):
            threading.Timer(0.2, press, [key]).start()

    service._answered = answered
    press("p")
    code, out, err = gramophone("control j1")
    assert (code, out) == (0, [])
    assert commands(service) == ["attach", "pause", "frame", "resume", "update", "update", "checkpoint", "finish"]
    assert (tmp_path / "j1-0003.png").read_bytes() == encoded("purple")
    assert (tmp_path / "j1-0006.checkpoint").read_bytes() == b"state after 6"
    assert [message.update.beta for message in service.messages[4:6]] == [3.75, 3.0]
    assert err[0] == "p pause or go on, + - style strength, s save the picture, c checkpoint, f finish, q leave"
    for words in (
        "paused after iteration 3",
        "the picture after iteration 3 is kept as j1-0003.png",
        "goes on after iteration 3",
        "changed from iteration 5 of 300 on: alpha 1, beta 3.75, tv-weight 1, step 0.02",
        "update.beta: must be less",
        "the state after iteration 6 is kept as j1-0006.checkpoint",
    ):
        assert words in err


def test_leaving_leaves_the_job(gramophone, service, press):
    service.scripts = [[accepted(), HANG]]
    press("q")
    assert gramophone("control j1 --quiet") == (0, [], [])
    assert service.over.wait(5)


def test_an_error_of_the_job_ends_the_keys(gramophone, service, press):
    service.scripts = [[accepted(), refused(server_errors.Diverged(3))]]
    code, _, err = gramophone("control j1")
    assert code == 5
    assert "became NaN or infinite at iteration 3" in err[-1]
