"""The file of named targets, and which target a command has."""

import argparse

import pytest

from gramophone_client.async_client import DEFAULT_TARGET
from gramophone_client.console.outputs import UsageError
from gramophone_client.console.targets import (
    BUILT_IN_ADDRESS,
    MAX_BYTES,
    Target,
    TargetsFile,
    chosen_target,
    metadata_entry,
    targets_path,
)

FILE = """\
default = "studio"

[targets.studio]
address = "gpu-1:50051"
timeout = 600

[targets.studio.metadata]
authorization = "Bearer s3cret"

[targets.lab]
address = "unix:/run/gramophone.sock"
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes the file of targets and returns its path."""
    path = tmp_path / "targets.toml"
    for name in ("GRAMOPHONE_TARGET", "GRAMOPHONE_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRAMOPHONE_CONFIG", str(path))

    def write(text=FILE, mode=0o600):
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def chosen(target=None, *metadata):
    return chosen_target(argparse.Namespace(target=target, metadata=[metadata_entry(entry) for entry in metadata]))


def test_the_option_wins_over_the_variables_and_these_over_the_default_of_the_file(file, monkeypatch):
    path = file()
    assert (chosen().name, chosen().source) == ("studio", str(path))
    monkeypatch.setenv("GRAMOPHONE_SERVER", "old:1")
    assert chosen() == Target("old:1", "$GRAMOPHONE_SERVER")
    monkeypatch.setenv("GRAMOPHONE_TARGET", "lab")
    assert chosen() == Target("unix:/run/gramophone.sock", "$GRAMOPHONE_TARGET", "lab")
    assert chosen("studio").timeout == 600
    assert chosen("gpu-2.example:1") == Target("gpu-2.example:1", "--target")


def test_without_a_file_the_built_in_address_is_used(tmp_path, file, monkeypatch):
    monkeypatch.setenv("GRAMOPHONE_CONFIG", "")  # as if it was not set
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    assert targets_path() == tmp_path / "none" / "gramophone" / "config.toml"
    assert chosen() == Target(BUILT_IN_ADDRESS, "built in")
    assert chosen().is_built_in and not chosen("a:1").is_built_in
    assert BUILT_IN_ADDRESS == DEFAULT_TARGET
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert targets_path() == tmp_path / ".config" / "gramophone" / "config.toml"


def test_the_file_is_read_only_if_it_is_needed(file):
    file("this is not TOML")
    assert chosen("a:1").address == "a:1"
    with pytest.raises(UsageError, match=r"targets\.toml: is not TOML: .* \(at line 1, column 6\)"):
        chosen()


def test_metadata_of_the_command_line_replaces_that_of_the_file(file):
    file()
    assert chosen().metadata == (("authorization", "Bearer s3cret"),)
    assert chosen("studio", "authorization=other", "traceparent=00-1=2", "traceparent=b").metadata == (
        ("authorization", "other"),
        ("traceparent", "00-1=2"),
        ("traceparent", "b"),
    )
    assert "s3cret" not in repr(chosen())


def test_an_unknown_name_is_answered_with_the_nearest_one(file):
    path = file()
    with pytest.raises(UsageError) as caught:
        chosen("studoi")
    assert str(caught.value) == (
        f"--target: there is no target 'studoi' in {path} (it has studio, lab); did you mean studio?"
    )
    with pytest.raises(UsageError) as caught:
        chosen("localhost")
    assert str(caught.value).endswith("(it has studio, lab); an address is HOST:PORT")


def test_a_file_that_the_variable_names_must_exist(tmp_path, file):
    with pytest.raises(UsageError, match=r"targets\.toml: there is no such file; \$GRAMOPHONE_CONFIG names it"):
        chosen()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('defualt = "a"', "defualt: is not known; the keys are default, targets; did you mean default?"),
        ("default = 3", "default: must be one of the targets (none), got 3"),
        ("default = [1]", "default: must be one of the targets (none), got a list of 1"),
        ('default = "b"\n[targets.a]\naddress = "h:1"', "default: must be one of the targets (a), got 'b'"),
        ("targets = 3", "targets: must be a table, like [targets.studio]"),
        ('[targets]\na = "s3cret"', "targets.a: must be a table, like [targets.a]"),
        ("[targets.a]", 'targets.a.address: must be an address, like "gpu-1:50051", got nothing'),
        ('[targets.a]\naddress = "gpu-1"', "targets.a.address: must be an address, like \"gpu-1:50051\", got 'gpu-1'"),
        ('[targets."a b"]\naddress = "h:1"', "targets.a b: must be named with letters, digits, - and _"),
        (
            '[targets.a]\nurl = "h:1"',
            "targets.a.url: is not known; the keys are address, timeout, metadata; did you mean address?",
        ),
        *(
            (
                f'[targets.a]\naddress = "h:1"\ntimeout = {value}',
                f"targets.a.timeout: must be a number of seconds above 0, got {shown}",
            )
            for value, shown in (("0", "0"), ("true", "True"), ("nan", "nan"), ('"soon"', "'soon'"))
        ),
        ('[targets.a]\naddress = "h:1"\nmetadata = "s3cret"', "targets.a.metadata: must be a table of texts"),
        *(
            (f'[targets.a]\naddress = "h:1"\nmetadata = {{{entry}}}', f"targets.a.metadata.{words}")
            for entry, words in (
                ('Authorization = "s3cret"', "Authorization: must be named with a-z, 0-9, -, _ and ."),
                ('grpc-timeout = "s3cret"', "grpc-timeout: must not start with grpc-, which gRPC uses itself"),
                ('token-bin = "s3cret"', "token-bin: must not end in -bin, because its values would be bytes"),
                ("token = 3", "token: must be a text"),
                ('token = "s3cret\\n"', "token: must be printable ASCII without spaces at the ends"),
                ('token = "s3cret "', "token: must be printable ASCII without spaces at the ends"),
            )
        ),
    ],
)
def test_what_is_wrong_with_the_file_is_named_with_its_key(file, text, words):
    path = file(text)
    with pytest.raises(UsageError) as caught:
        chosen()
    assert f"{path}: {words}" in str(caught.value).splitlines()
    assert "s3cret" not in str(caught.value)


def test_everything_that_is_wrong_is_reported_at_once(file):
    file("default = 3\n[targets.a]\ntimeout = 0")
    with pytest.raises(UsageError) as caught:
        chosen()
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_is_another_is_refused(file):
    file("a = " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UsageError, match="is not TOML: maximum recursion depth"):
        chosen()
    file("#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="is larger than 1 MiB"):
        chosen()


def test_a_file_may_begin_with_a_byte_order_mark(file):
    file("\ufeff" + FILE)
    assert chosen("studio").name == "studio"


def test_a_file_that_is_no_text_is_refused(file):
    file().write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        chosen()


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_with_metadata_that_others_can_read_is_warned_of(file, capsys, mode, warned):
    path = file(mode=mode)
    chosen()
    warning = f"gramophone: warning: {path} has metadata and other users can read it; chmod 600 {path}\n"
    assert capsys.readouterr().err == (warning if warned else "")
    file('[targets.a]\naddress = "h:1"', mode=0o644)  # nothing to hide
    TargetsFile.read(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["s3cret", "=s3cret", "Token=s3cret", "grpc-x=s3cret", "x-bin=s3cret", "x=s3cret\n"])
def test_metadata_that_does_not_fit_is_refused_without_its_value(text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        metadata_entry(text)
    assert "s3cret" not in str(caught.value)
