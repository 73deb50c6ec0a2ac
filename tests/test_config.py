from dataclasses import replace

import pytest

from gramophone_server import config
from gramophone_server.config import Limits, Settings
from gramophone_server.errors import StartupError


def test_defaults_listen_only_on_this_machine():
    settings, print_only = config.load([], {})
    assert (settings.host, settings.port, settings.device, settings.drain_s) == ("127.0.0.1", 50051, "auto", 30.0)
    assert settings.max_image_bytes == 10 * 2**20
    assert not settings.reflection
    assert not print_only


def test_a_flag_overrides_the_environment_and_that_the_default():
    environment = {"GRAMOPHONE_PORT": "1", "GRAMOPHONE_MAX_SIZE": "1024", "GRAMOPHONE_REFLECTION": "yes", "PORT": "9"}
    settings, _ = config.load(["--port", "2"], environment)
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
    by_flag, _ = config.load([flag] if f.default is False else [flag, text], needs)
    by_variable, _ = config.load([], {f"GRAMOPHONE_{name.upper()}": text} | needs)
    assert by_flag == by_variable != config.load([], needs)[0]


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
        config.load(arguments, environment)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("name", ["image", "checkpoint"])
def test_what_is_allowed_can_be_uploaded(name):
    others = ["--max-image-bytes", "1024", "--max-checkpoint-bytes", "65536"]
    flags = [*others, f"--max-{name}-bytes", "1000000", "--max-uploads-bytes"]
    with pytest.raises(StartupError) as caught:
        config.load([*flags, "999999"], {})
    assert str(caught.value) == (
        f"uploads could not hold what --max-{name}-bytes (now 1000000) allows; raise --max-uploads-bytes (now 999999) "
        f"to at least that, lower --max-{name}-bytes, or set --max-uploads-bytes to 0, so that clients send only what "
        "fits in a message"
    )
    for enough in ("1000000", "0"):
        config.load([*flags, enough], {})


def test_message_sizes_follow_from_the_limits():
    assert Limits(max_size=1000, max_checkpoint_bytes=65536).response_bytes == 3_000_000 + 2**20
    assert Limits(max_size=1000, max_checkpoint_bytes=2**26).response_bytes == 2**26 + 2**20


def test_a_request_takes_bounded_memory():
    limits = Limits(max_styles=2, max_image_pixels=1_000_000, max_message_bytes=5 * 2**20)
    assert limits.request_memory_bytes == 25 * 2**20 + limits.decoding_bytes + 4 * 3_000_000
    assert limits.decoding_bytes == 2 * (2**29 + 24_000_000 + 2 * limits.max_image_bytes + 2**26)
    assert Limits().request_memory_bytes < 3.5e9


def test_the_memory_of_the_server_is_bounded_by_its_settings():
    """The sum of its terms. Each limit that lets clients take memory has a part in it, in the right proportion."""
    settings = config.Settings(engine="fake")
    terms = settings.memory_terms()
    assert settings.memory_bytes == sum(term.bytes for term in terms) < 18 * 2**30
    assert len({term.name for term in terms}) == len(terms) and all(term.reason for term in terms)
    for name, factor in {
        "max_receiving_bytes": 2,
        "max_decoded_bytes": 1,
        "max_uploads_bytes": 1,
        "max_kept_bytes": 1,
        "max_sending_bytes": 1,
        "max_message_bytes": 3 + 12 + 32,
        "max_image_pixels": 2 * 24,
        "max_checkpoint_bytes": 2 * 16 + 32 + 2 * 4,
        "max_connections": 2**16 + 4 * (65535 + 40960),  # each with a call, a query, and two health checks
    }.items():
        more = replace(settings, **{name: getattr(settings, name) + 1000})
        assert more.memory_bytes - settings.memory_bytes == 1000 * factor, name


def test_help_has_unit_range_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        config.load(["--help"], {})
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
        config.load(arguments, {})
    assert str(caught.value).startswith(sentence)
