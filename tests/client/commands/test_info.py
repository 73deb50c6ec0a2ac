"""`gramophone info` and `gramophone recipe`."""

import json
from dataclasses import fields

import pytest

from gramophone.recipe import PRESETS, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from tests.support.fake_service import accepted, encoded, result

STYLE_WEIGHTS = [0.25, 0.75]


METADATA = json.dumps(
    {
        "gramophone": "0.1.0",
        "recipe": {field.name: getattr(PRESETS["textbook"], field.name) for field in fields(Recipe)},
        "style_weights": STYLE_WEIGHTS,
        "seed": 7,
        "weights": "none",
    }
)


def test_info(gramophone):
    code, out, err = gramophone("info")
    assert (code, err) == (0, [])
    assert "device   cpu (a test), fp32" in out
    assert "jobs     1 of at most 2 running, 0 of at most 16 waiting, 1 paused\nwait     about 12.5 s\n" in out
    assert "watchers at most 8 of a job; one may pause it, for at most 600 s\n" in out
    assert "states   checkpoints of at most 64 MiB\n" in out
    assert "styles   2.5 of at most 64 MiB kept, 3 of 4 found there\n" in out
    assert "uploads  0.0 of at most 1024 MiB kept, 0 of 0 found there\n" in out
    assert "kernels" not in out
    assert gramophone("--version")[1].startswith("gramophone ")
    code, out, _ = gramophone("info --json")
    info = json.loads(out)
    assert (info["version"], info["limits"]["max_size"], info["presets"]["fast"]["beta"]) == ("1.2.3", 2048, 3.0)
    assert (info["style_cache"]["hits"], info["estimated_wait_s"], info["limits"]["max_watchers"]) == (3, 12.5, 8)
    assert (info["library_ops"], info["self_test_s"]) == ({}, 0.07)


def test_info_names_the_ops_without_a_right_kernel(gramophone, service):
    service.library_ops = [
        pb.LibraryOp(name="gram", reason="case '64 channels', output 0: error 0.1, tolerance 0.0001"),
        pb.LibraryOp(name="tv_", reason="requested by --library-ops"),
    ]
    assert (
        "kernels  these ops run through torch's library, which is slower: "
        "gram (case '64 channels', output 0: error 0.1, tolerance 0.0001); tv_ (requested by --library-ops)\n"
    ) in gramophone("info")[1]
    assert list(json.loads(gramophone("info --json")[1])["library_ops"]) == ["gram", "tv_"]


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_recipe_prints_the_flags_that_make_the_picture_again(gramophone, service, name):
    service.scripts = [[accepted(), result(encoded(note=METADATA))]]
    gramophone(f"stylize photo.png painting.png -o {name}")
    code, out, _ = gramophone(f"recipe {name}")
    assert code == 0
    gramophone(f"stylize photo.png painting.png photo.png -o again.png {out}")
    spec = service.specs[1]
    assert (recipe_from_message(spec.recipe), spec.seed) == (PRESETS["textbook"], 7)
    assert [style.weight for style in spec.styles] == STYLE_WEIGHTS
    printed = json.loads(gramophone(f"recipe {name} --json")[1])
    assert (printed["seed"], printed["recipe"]["start"], printed["iterations"]) == (7, "noise", None)


def test_a_recipe_that_was_changed_is_reported_as_changed(gramophone, folder):
    (folder / "tuned.png").write_bytes(
        encoded(note=json.dumps(json.loads(METADATA) | {"iterations": 90, "changed_at": 41}))
    )
    code, out, err = gramophone("recipe tuned.png")
    assert code == 0 and out.startswith("--seed 7")
    assert "was changed while tuned.png was made, and is this one from iteration 41 on" in err[0]
    printed = json.loads(gramophone("recipe tuned.png --json")[1])
    assert (printed["iterations"], printed["changed_at"]) == (90, 41)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(), "has no recipe in it"),
        (b"text", "is not a picture"),
        (encoded(note="{}"), "this version does not know its recipe"),
        (encoded(note="[1]"), "this version does not know its recipe"),
        (encoded(note=METADATA.replace("beta", "gamma")), "this version does not know its recipe"),
    ],
)
def test_a_file_without_a_recipe_is_an_error(gramophone, folder, data, words):
    (folder / "other.png").write_bytes(data)
    code, out, err = gramophone("recipe other.png")
    assert (code, out) == (2, "")
    assert words in err[0]
