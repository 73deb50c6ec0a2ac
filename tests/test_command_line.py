import pytest

from gramophone_server import command_line
from gramophone_server.config import Limits, Settings
from gramophone_server.errors import StartupError


def test_defaults_listen_only_on_this_machine():
    settings, print_only = command_line.load([], {})
    assert (settings.host, settings.port, settings.device, settings.drain_s) == ("127.0.0.1", 50051, "auto", 30.0)
    assert settings.max_image_bytes == 10 * 2**20
    assert not settings.reflection
    assert not print_only


def test_a_flag_overrides_the_environment_and_that_the_default():
    environment = {"GRAMOPHONE_PORT": "1", "GRAMOPHONE_MAX_SIZE": "1024", "GRAMOPHONE_REFLECTION": "yes", "PORT": "9"}
    settings, _ = command_line.load(["--port", "2"], environment)
    assert (settings.port, settings.max_size, settings.reflection) == (2, 1024, True)
    assert settings.max_styles == Limits().max_styles


@pytest.mark.parametrize("name", sorted(Settings.__dataclass_fields__))
def test_every_setting_is_a_flag_and_a_variable(name):
    f = Settings.__dataclass_fields__[name]
    allowed, choices = f.metadata["range"], f.metadata["choices"]
    in_range = str(int(allowed.high) - 1) if allowed else "1"
    text = choices[-1] if choices else in_range
    flag = f"--{name.replace('_', '-')}"
    if name == "max_image_bytes":
        text = "2048"  # its largest value exceeds the largest gRPC message
    if name == "max_checkpoint_bytes":
        text = str(2**20)  # its largest value exceeds the default of the uploads
    if name == "max_message_bytes":
        text = str(2**24)  # its largest value exceeds the default of what may be received
    needs = {"GRAMOPHONE_ENGINE": "fake"} if name == "iter_ms" else {}
    by_flag, _ = command_line.load([flag] if f.default is False else [flag, text], needs)
    by_variable, _ = command_line.load([], {f"GRAMOPHONE_{name.upper()}": text} | needs)
    assert by_flag == by_variable != command_line.load([], needs)[0]


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--port", "70000"], {}, "--port must be a whole number from 0 to 65535, got '70000'"),
        ([], {"GRAMOPHONE_PORT": "http"}, "GRAMOPHONE_PORT must be a whole number from 0 to 65535, got 'http'"),
        ([], {"GRAMOPHONE_DRAIN_S": "nan"}, "GRAMOPHONE_DRAIN_S must be a number from 0 to 3600, got 'nan'"),
        (["--device", "tpu"], {}, "--device must be one of auto, cpu, cuda, got 'tpu'"),
        ([], {"GRAMOPHONE_REFLECTION": "maybe"}, "GRAMOPHONE_REFLECTION must be 1 or 0, got 'maybe'"),
        (["--host", ""], {}, "--host must be a non-empty string, got ''"),
        (["--iter-ms", "3"], {}, "--iter-ms is only for --engine fake; a network runs at its own speed"),
        (["--engine", "fake", "--iter-ms", "-1"], {}, "--iter-ms must be a number from 0 to 10000, got '-1'"),
        (
            ["--max-size", "9", "--port=x"],
            {},
            "--max-size must be a whole number from 16 to 16383, got '9'; --port must",
        ),
        (
            ["--max-receiving-bytes", "67108864"],
            {},
            "--max-receiving-bytes must be at least 75497472, for the largest upload and one message more, got 671088",
        ),
    ],
)
def test_an_invalid_value_is_reported_with_what_it_must_be(arguments, environment, sentence):
    with pytest.raises(StartupError) as caught:
        command_line.load(arguments, environment)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("name", ["image", "checkpoint"])
def test_what_is_allowed_can_be_uploaded(name):
    others = ["--max-image-bytes", "1024", "--max-checkpoint-bytes", "65536"]
    flags = [*others, f"--max-{name}-bytes", "1000000", "--max-uploads-bytes"]
    with pytest.raises(StartupError) as caught:
        command_line.load([*flags, "999999"], {})
    assert str(caught.value) == (
        f"uploads could not hold what --max-{name}-bytes (now 1000000) allows; raise --max-uploads-bytes (now 999999) "
        f"to at least that, lower --max-{name}-bytes, or set --max-uploads-bytes to 0, so that clients send only what "
        "fits in a message"
    )
    for enough in ("1000000", "0"):
        command_line.load([*flags, enough], {})


def test_help_has_unit_range_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.load(["--help"], {})
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--max-size N largest longer side of a result in pixels (16 to 16383, default 2048)" in shown
    assert "--max-size is GRAMOPHONE_MAX_SIZE" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-sise", "3"], "there is no flag --max-sise; did you mean --max-size?; '3' does not belong to any flag"),
        (["--max-s=100"], "there is no flag --max-s; did you mean --max-size?"),  # it is no abbreviation
        (["--verison"], "there is no flag --verison; did you mean --version?"),
        (["--gpu"], "there is no flag --gpu; --help lists all flags"),
        (["50051"], "'50051' does not belong to any flag; settings are given as --flag VALUE"),
    ],
)
def test_an_unknown_flag_is_reported_with_the_most_similar_one(arguments, sentence):
    with pytest.raises(StartupError) as caught:
        command_line.load(arguments, {})
    assert str(caught.value).startswith(sentence)
