"""`gramophone targets`."""

import argparse
import json

import pytest

from gramophone_client.console.targets import metadata_entry
from gramophone_client.errors import InvalidRequestError
from gramophone_client.transport.call_options import checked_metadata

FILE = """\
default = "studio"
[targets.studio]
address = "gpu-1:50051"
timeout = 600
[targets.studio.metadata]
authorization = "Bearer s3cret"
[targets.lab]
address = "gpu-2:50051"
"""


@pytest.fixture
def file(folder, monkeypatch):
    """The path of the file of targets, which does not exist yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    return folder / "config" / "gramophone" / "config.toml"


def write(file):
    file.parent.mkdir(parents=True)
    file.write_text(FILE)
    file.chmod(0o600)


def test_targets_are_listed_without_the_values_of_metadata(gramophone, file, monkeypatch):
    write(file)
    monkeypatch.delenv("GRAMOPHONE_SERVER")
    code, out, err = gramophone("targets")
    assert (code, err) == (0, [])
    assert out.splitlines() == [
        f"file  {file}",
        "* studio  gpu-1:50051, timeout 600 s, metadata authorization",
        "  lab  gpu-2:50051",
        "used  studio, the default of the file",
    ]
    monkeypatch.setenv("GRAMOPHONE_TARGET", "lab")
    assert gramophone("targets")[1].splitlines()[-1] == "used  lab, from $GRAMOPHONE_TARGET"
    assert json.loads(gramophone("targets --json")[1]) == {
        "file": str(file),
        "exists": True,
        "default": "studio",
        "targets": {
            "studio": {"address": "gpu-1:50051", "timeout": 600, "metadata": ["authorization"]},
            "lab": {"address": "gpu-2:50051", "timeout": None, "metadata": []},
        },
        "used": {
            "source": "$GRAMOPHONE_TARGET",
            "name": "lab",
            "address": "gpu-2:50051",
            "timeout": None,
            "metadata": [],
        },
    }
    assert gramophone("targets --names") == (0, "studio\nlab\n", [])


def test_without_a_file_an_example_is_printed(gramophone, file, monkeypatch):
    monkeypatch.delenv("GRAMOPHONE_SERVER")
    code, out, err = gramophone("targets")
    assert (code, err) == (0, [])
    assert out.startswith(f"file  {file}\nno such file; ")
    assert '  [targets.studio]\n  address = "gpu-1.example:50051"' in out
    assert out.endswith("used  127.0.0.1:50051, because nothing else is set\n")
    assert json.loads(gramophone("targets --json")[1])["exists"] is False
    assert gramophone("targets --names") == (0, "", [])


def test_a_file_that_others_can_read_is_warned_of_once(gramophone, file):
    write(file)
    file.chmod(0o644)
    code, _, err = gramophone("targets")
    assert (code, len(err)) == (0, 1)
    assert err[0].endswith(f"chmod 600 {file}")


def test_an_example_is_a_file_that_fits(gramophone, file):
    _, out, _ = gramophone("targets")
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(line[2:] for line in out.splitlines() if line.startswith("  ")))
    file.chmod(0o600)
    assert json.loads(gramophone("targets --json")[1])["targets"]["studio"]["metadata"] == ["authorization"]


def test_a_named_target_is_used_by_every_command(gramophone, service, file, monkeypatch):
    monkeypatch.delenv("GRAMOPHONE_SERVER")
    file.parent.mkdir(parents=True)
    file.write_text(f'[targets.fake]\naddress = "{service.target}"\ntimeout = 0.1\n')
    for command in ("info --target fake", "jobs --server fake", "cancel j1 --target fake"):
        code, out, _ = gramophone(command)
        assert (code, bool(out)) == (0, True)


def test_the_metadata_of_a_target_and_of_the_command_line_is_sent(gramophone, service, file):
    file.parent.mkdir(parents=True)
    metadata = "[targets.fake.metadata]\nauthorization = 's3cret'\ntraceparent = '00-1'\n"
    file.write_text(f"[targets.fake]\naddress = '{service.target}'\n{metadata}")
    file.chmod(0o600)
    commands = {
        "ListJobs": "jobs",
        "CancelJob": "cancel j1",
        "GetServerInfo": "info",
        "WatchJob": "watch j1 -o out.png",
        "StylizeStream": "stylize photo.png painting.png -o out.png",
        "StylizeInteractive": "control j1 --finish",
    }
    for method, words in commands.items():
        service.metadata.clear()
        gramophone(f"{words} --target fake --metadata traceparent=00-2")
        (sent,) = [sent for name, sent in service.metadata if name == method]
        assert {("authorization", "s3cret"), ("traceparent", "00-2")} <= set(sent), method


@pytest.mark.parametrize(
    "text", ["token=a b", "x-y_z.1=", "Token=1", "grpc-x=1", "x-bin=1", "x= 1", "x=1 ", "x=é", "=1", "x y=1"]
)
def test_the_rules_for_metadata_are_those_of_the_client(text):
    key, _, value = text.partition("=")
    try:
        metadata_entry(text)
    except argparse.ArgumentTypeError:
        with pytest.raises(InvalidRequestError):
            checked_metadata({key: value})
    else:
        assert checked_metadata({key: value}) == ((key, value),)
