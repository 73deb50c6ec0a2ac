import math
from dataclasses import fields, replace
from typing import get_type_hints

import pytest

from gramophone import recipe as recipes
from gramophone.recipe import PRESETS, InvalidRecipeError, LayerWeight, Optimiser, Recipe, RecipeOverrides, Start
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message, recipe_from_message, recipe_to_message

# For each field, a value that no preset has, so that the tests notice a field that is lost in a conversion.
OTHER = {
    "content_layers": (LayerWeight("relu3_2", 0.5), LayerWeight("conv4_2", 2)),
    "style_layers": (LayerWeight("relu2_2", 3.25),),
    "alpha": 0.125,
    "beta": 1e5 / 3,
    "tv_weight": 0.1,
    "normalisation": recipes.Normalisation.ELEMENTS,
    "pooling": recipes.Pooling.AVERAGE,
    "size": 777,
    "style_scale": 1.7,
    "start": Start.IMAGE,
    "optimiser": Optimiser.GRADIENT_DESCENT,
    "step": 0.3,
    "iterations": 11,
    "coarse_iterations": 13,
    "smallest_size": 99,
    "average": 0.5,
    "time_budget": 2.5,
}


def violated(**values) -> list[str]:
    with pytest.raises(InvalidRecipeError) as refused:
        Recipe(**values)
    return [violation.field for violation in refused.value.violations]


def test_every_field_is_in_the_proto_by_name():
    in_the_proto = {field.name for field in pb.Recipe.DESCRIPTOR.fields}
    assert in_the_proto == {field.name for field in fields(Recipe)} | {"preset"}


def test_overrides_have_the_fields_of_a_recipe():
    assert get_type_hints(RecipeOverrides) == get_type_hints(Recipe)


@pytest.mark.parametrize("name", ["Normalisation", "Pooling", "Start", "Optimiser"])
def test_every_enum_value_is_in_the_proto(name):
    prefix = f"{name.upper()}_"
    expected = {f"{prefix}{member.name}" for member in getattr(recipes, name)}
    # START_IMAGE is the member IMAGE, and so on.
    assert set(getattr(pb, name).keys()) == expected | {f"{prefix}UNSPECIFIED"}


def test_every_preset_is_in_the_proto():
    assert set(pb.Preset.keys()) == {f"PRESET_{name.upper()}" for name in (*PRESETS, "unspecified")}


def test_the_fast_preset_is_the_default():
    assert recipes.preset("fast") == Recipe() == recipe_from_message(pb.Recipe())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_cross_the_wire_by_name_and_in_full(name):
    assert recipe_from_message(overrides_to_message({}, name)) == PRESETS[name]
    assert recipe_from_message(recipe_to_message(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("field", OTHER)
def test_each_field_crosses_the_wire_alone(field):
    assert OTHER.keys() == RecipeOverrides.__annotations__.keys()
    assert all(getattr(preset, field) != OTHER[field] for preset in PRESETS.values())
    message = overrides_to_message({field: OTHER[field]}, "textbook")
    assert recipe_from_message(message) == replace(PRESETS["textbook"], **{field: OTHER[field]})


def test_a_full_message_overrides_every_field_of_the_preset():
    message = recipe_to_message(Recipe(**OTHER))
    message.preset = pb.PRESET_TEXTBOOK
    assert recipe_from_message(message) == Recipe(**OTHER)


def test_an_empty_layer_list_is_sent():
    message = overrides_to_message({"style_layers": (), "beta": 0.0})
    assert message.HasField("style_layers")
    assert recipe_from_message(message).style_layers == ()


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe) if field.metadata["range"]])
def test_ranges_include_their_ends_and_nothing_beyond(field):
    low, high = next(f.metadata["range"] for f in fields(Recipe) if f.name == field)
    kind = type(getattr(Recipe(), field))
    for end in (low, high):
        assert getattr(Recipe(**{field: kind(end)}), field) == end
    beyond = (low - 1, high + 1) if kind is int else (math.nextafter(low, -math.inf), math.nextafter(high, math.inf))
    for value in (*beyond, math.nan, math.inf, -math.inf):
        assert violated(**{field: value}) == [field]


@pytest.mark.parametrize("smallest", [1, 15])
def test_a_scale_that_is_too_small_for_the_network_is_refused(smallest):
    with pytest.raises(
        InvalidRecipeError,
        match=f"smallest_size: must be 16 or more, or 0 to work at the final size only, got {smallest}$",
    ):
        Recipe(smallest_size=smallest)
    assert Recipe(smallest_size=16).scale_sizes()[0] == 16


def test_all_violations_are_reported_together():
    assert violated(
        alpha=math.nan,
        size=1,
        average=1.0,
        style_layers=(LayerWeight("relu1_1", -1), LayerWeight("relu1_1", math.nan)),
        content_layers=(),
    ) == ["alpha", "size", "average", "style_layers", "style_layers[0].weight", "style_layers[1].weight"]


def test_layers_are_required_if_their_term_has_a_weight():
    assert violated(content_layers=()) == ["content_layers"]
    assert violated(style_layers=()) == ["style_layers"]
    assert Recipe(content_layers=(), alpha=0.0).content_layers == ()
    assert violated(alpha=0.0, beta=0.0) == ["beta"]


def test_many_layers_are_one_violation():
    assert violated(style_layers=tuple(LayerWeight(f"relu{i}", -1) for i in range(1000))) == ["style_layers"]


def test_a_violation_states_the_given_value_and_the_allowed_range():
    with pytest.raises(InvalidRecipeError, match=r"^size: must be between 16 and 16384, got 8$"):
        Recipe(size=8)


def test_unknown_enum_numbers_and_range_violations_are_reported_together():
    message = pb.Recipe(beta=-1)
    message.preset, message.optimiser, message.start = 99, 98, 97
    with pytest.raises(InvalidRecipeError) as refused:
        recipe_from_message(message)
    assert [violation.field for violation in refused.value.violations] == ["preset", "start", "optimiser", "beta"]


@pytest.mark.parametrize("make", [recipes.preset, lambda name, **given: overrides_to_message(given, name)])
def test_unknown_presets_and_fields_are_refused(make):
    with pytest.raises(InvalidRecipeError, match=r"preset: must be one of fast, quality, textbook, got 'best'"):
        make("best")
    with pytest.raises(InvalidRecipeError, match="gamma: is not a field of a recipe"):
        make("fast", gamma=1)


@pytest.mark.parametrize(
    ("size", "smallest", "sizes"),
    [
        (512, 128, (128, 181, 256, 362, 512)),
        (500, 128, (177, 250, 354, 500)),
        (512, 0, (512,)),
        (64, 128, (64,)),
    ],
)
def test_scales_grow_by_the_square_root_of_two(size, smallest, sizes):
    recipe = Recipe(size=size, smallest_size=smallest)
    assert recipe.scale_sizes() == sizes
    assert recipe.total_iterations() == recipe.iterations + (len(sizes) - 1) * recipe.coarse_iterations


def test_an_unknown_choice_is_refused_with_a_list_of_the_choices():
    with pytest.raises(InvalidRecipeError, match="pooling: must be one of max, average, got 'mean'"):
        overrides_to_message({"pooling": "mean"})
