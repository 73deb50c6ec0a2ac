import argparse
import re
from dataclasses import fields

import pytest

from gramophone.recipe import PRESETS, LayerWeight, Recipe
from gramophone_client.console.recipe_flags import add_recipe_flags, as_flags, flag, recipe_overrides


def test_help_lists_every_field_and_default_of_a_recipe(gramophone, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = gramophone("stylize --help")
    words = " ".join(out.split())
    for field in fields(Recipe):
        assert f"{flag(field.name)} " in words
        allowed = field.metadata["range"]
        text = field.metadata["help"] + (f"; {allowed.low:g} to {allowed.high:g}" if allowed else "")
        assert f"{text} (default " in words
    assert "(default fast 30, quality 150, textbook 300)" in words
    for code in (0, 2, 3, 4, 5, 130):
        assert re.search(rf"^ +{code}  \w", out, re.MULTILINE)


@pytest.mark.parametrize("name", PRESETS)
def test_flags_express_a_whole_recipe(name):
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    assert Recipe(**recipe_overrides(parser.parse_args(as_flags(PRESETS[name])))) == PRESETS[name]
    assert recipe_overrides(parser.parse_args([])) == {}
    odd = Recipe(beta=1e5 / 3, style_layers=(LayerWeight("relu1_1", 0.1 + 0.2),))
    assert Recipe(**recipe_overrides(parser.parse_args(as_flags(odd)))) == odd
    empty = parser.parse_args(["--style-layers", "", "--content-layers", "relu4_2"])
    assert recipe_overrides(empty) == {"style_layers": (), "content_layers": (LayerWeight("relu4_2", 1),)}
