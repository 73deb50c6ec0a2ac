"""`gramophone control`."""

import os
import sys

import pytest

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.console.display import PlainDisplay
from gramophone_server import errors as server_errors
from tests.support.clock import WITHIN_S
from tests.support.fake_service import (
    HANG,
    LOST,
    Answer,
    accepted,
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
def control(gramophone):
    """Runs a command; returns (exit code, lines of standard output, lines of standard error)."""

    def run(command: str):
        code, out, err = gramophone(command)
        return code, out.splitlines(), err

    return run


def test_a_lost_connection_is_made_again(control, service):
    service.scripts = [[*numbered(accepted()), LOST], [Answer(5), Answer(6), *numbered(accepted(), result())]]
    code, out, err = control("control j1 --pause --finish --detach 5")
    assert (code, err) == (0, [])
    assert out == ["paused before iteration 5", "finished after 300 iterations"]
    assert service.commands == ["attach", "attach", "pause", "finish"]


def test_options_are_commands_in_their_order(control, service, tmp_path):
    taken = [Answer(7, output=picture(7)), Answer(8, output=checkpoint(8, light=False))]
    service.scripts = [[accepted(), Answer(5), Answer(6), *taken, Answer(9), result()]]
    code, out, err = control(
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
    assert service.commands == ["attach", "resume", "update", "frame", "checkpoint", "finish"]
    update = service.messages[2].update
    assert (update.beta, update.tv_weight, update.iterations) == (5, 0.5, 40)
    assert [(one.layer, one.weight) for one in update.style_layers.layers] == [("relu1_1", 1), ("relu2_1", 0.5)]
    assert (tmp_path / "job.checkpoint").read_bytes() == b"state after 8"
    assert (tmp_path / "now.jpg").read_bytes().startswith(b"\xff\xd8")


def test_a_pause_reports_its_iteration(control, service):
    service.scripts = [[accepted(), Answer(12), HANG]]
    assert control("control j1 --pause") == (0, ["paused before iteration 12"], [])


def test_a_bad_value_is_reported_as_typed(control, service):
    service.scripts = [[accepted(), Answer(error="must be between 0 and 1e+15, got -1"), HANG]]
    code, out, err = control("control j1 --set beta=-1")
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
def test_bad_usage_is_explained(control, service, command, words):
    code, out, err = control(command)
    assert (code, out, service.messages) == (2, [], [])
    assert words in err[-1]


@pytest.mark.parametrize(
    ("error", "code"), [(server_errors.JobControlled("j1"), 2), (server_errors.TooManyWatchers(8), 4)]
)
def test_refusals_are_exit_codes(control, service, error, code):
    service.scripts = [[refused(error)]]
    assert control("control j1 --pause") == (code, [], [f"gramophone: {error}"])


@pytest.fixture
def press(monkeypatch):
    """Makes standard input a terminal; types keys on it."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield lambda keys: os.write(ours, keys.encode())
    os.close(ours)


def test_keys_are_commands(control, service, press, tmp_path, monkeypatch):
    paused, resumed = pb.JobEvent(paused=pb.Paused(iteration=3)), pb.JobEvent(resumed=pb.Resumed(iteration=3))
    service.scripts = [
        [
            accepted(),
            progress(3),
            *(Answer(4), paused, Answer(3, output=picture(3)), Answer(4), resumed),
            *(Answer(5), changed(5, beta=3.75), Answer(5, error="must be less"), Answer(6, output=checkpoint(6))),
            *(Answer(7), result()),
        ]
    ]
    # Each key is pressed at the line that reports the effect of the one before.
    keys = {
        "p pause or go on": "p",
        "paused after": "s",
        "the picture after": "p",
        "goes on after": "+",
        "changed from": "-",
        "update.beta": "c",
        "the state after": "?f",
    }
    print_line = PlainDisplay.print_line

    def print_and_press(display, text):
        print_line(display, text)
        press("".join(keys.pop(start) for start in list(keys) if text.startswith(start)))

    monkeypatch.setattr(PlainDisplay, "print_line", print_and_press)
    code, out, err = control("control j1")
    assert keys == {}
    assert (code, out) == (0, [])
    assert service.commands == ["attach", "pause", "frame", "resume", "update", "update", "checkpoint", "finish"]
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


def test_leaving_leaves_the_job(control, service, press):
    service.scripts = [[accepted(), HANG]]
    press("q")
    assert control("control j1 --quiet") == (0, [], [])
    assert service.call_ended.wait(WITHIN_S)


def test_an_error_of_the_job_ends_the_keys(control, service, press):
    service.scripts = [[accepted(), refused(server_errors.Diverged(3))]]
    code, _, err = control("control j1")
    assert code == 5
    assert "became NaN or infinite at iteration 3" in err[-1]
