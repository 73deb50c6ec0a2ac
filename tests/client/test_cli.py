"""The command line: exit codes, and errors in terms of what was typed."""

import inspect
import os
import re

import grpc
import pytest

from gramophone.recipe import Violation
from gramophone_client import AsyncGramophoneClient
from gramophone_server import errors as server_errors
from tests.support.fake_service import HANG, NO_RETRIES, accepted, refused, rpc_status

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
    # A job that is lost with its server is given up after 30 s without one.
    monkeypatch.setitem(inspect.unwrap(AsyncGramophoneClient.stream).__kwdefaults__, "patience", 0.5)
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
        (
            "stylize photo.png painting.png -o out.png --frame-size 99999999999",
            "--frame-size: must be 16 to 16384, got 1e",
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
