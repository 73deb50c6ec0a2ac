import argparse
from dataclasses import fields

import pytest

from gramophone.recipe import FIELD_TYPES, PRESETS, LayerWeight, Recipe, field_help
from gramophone_client.console.recipe_flags import (
    GROUPS,
    add_recipe_flags,
    as_flags,
    flag,
    preset_argument,
    recipe_overrides,
    value_of,
)


def test_every_field_is_in_one_group():
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(FIELD_TYPES)


def test_help_lists_every_field_and_default_of_a_recipe(gramophone, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = gramophone("stylize --help")
    words = "".join(out.split())
    for field in fields(Recipe):
        assert f"{flag(field.name)}" in words
        assert "".join(field_help(field.name).split()) in words
    assert "(default30,quality150,textbook300)" in words


def test_a_value_that_does_not_fit_is_refused_with_what_fits():
    for parse, text, words in (
        (lambda text: value_of("optimiser", text), "sgd", "got 'sgd'; did you mean gradient-descent?"),
        (lambda text: value_of("normalisation", text), "gatis", "got 'gatis'; did you mean gatys?"),
        (lambda text: value_of("beta", text), "much", "expected a number, got 'much'"),
        (lambda text: value_of("iterations", text), "3.5", "expected a whole number, got '3.5'"),
        (preset_argument, "fats", "must be one of fast, quality, textbook, got 'fats'; did you mean fast?"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            parse(text)
        assert words in str(caught.value)


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
