"""Help, errors and types of arguments."""

import argparse

import pytest

from gramophone_client.console.arguments import CommandParser, one_of, seconds, seconds_above_0


def parser(**options):
    made = CommandParser(prog="paint", **options)
    made.add_argument("photo")
    made.add_argument("-o", "--out", required=True)
    made.add_argument("--optimiser", type=one_of(("adam", "lbfgs")), choices=["adam", "lbfgs"])
    made.add_argument("--style-layers", help="layers (default relu1_1:1,relu2_1:1,relu3_1:1,relu4_1:1,relu5_1:1)")
    made.add_argument("--step", type=float)
    return made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer adam", "there is no option --optimizer; did you mean --optimiser?"),
        ("photo --lr=0.1", "there is no option --lr; did you mean --step?"),
        ("photo --style_layers relu1_1", "there is no option --style_layers; did you mean --style-layers?"),
        ("--output out.png", "there is no option --output; did you mean --out?"),
        ("--gpu 3", "there is no option --gpu; see paint --help"),
        ("-z", "there is no option -z; see paint --help"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest_one(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().check_options(words.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"paint: {message}\n"


@pytest.mark.parametrize(
    "words",
    [["photo", "-oout.png", "--step", "-1"], ["--step=-1e-3", "--help"], ["--", "--photo"], ["--a photo.jpg"], ["-"]],
)
def test_known_options_numbers_and_paths_pass(words):
    parser().check_options(words)


def test_an_error_is_one_line(capsys):
    for words, message in (
        (["photo"], "the following arguments are required: -o/--out; see paint --help"),
        (
            ["photo", "-o", "x", "--optimiser", "adma"],
            "argument --optimiser: expected one of adam, lbfgs, got 'adma'; did you mean adam?",
        ),
    ):
        with pytest.raises(SystemExit):
            parser().parse_args(words)
        assert capsys.readouterr().err == f"paint: {message}\n"


def test_help_is_wrapped_at_spaces_and_commas_and_keeps_indented_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    example = "  paint photo.jpg -o out.png"
    lines = parser(description="words " * 20, epilog=f"examples:\n{example}").format_help().splitlines()
    assert max(map(len, lines)) <= 50
    assert example in lines
    assert "relu1_1:1,relu2_1:1,relu3_1:1,relu4_1:1,relu5_1:1)" in "".join(map(str.strip, lines))
    monkeypatch.setenv("COLUMNS", "500")
    assert max(map(len, parser(description="words " * 200).format_help().splitlines())) <= 100


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", ""])
def test_seconds_are_finite(text):
    for kind in (seconds, seconds_above_0):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number of seconds"):
            kind(text)
    assert (seconds("0"), seconds_above_0("0.5")) == (0.0, 0.5)
    with pytest.raises(argparse.ArgumentTypeError, match="above 0, got '0'"):
        seconds_above_0("0")
