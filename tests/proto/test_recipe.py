import math
import re
from dataclasses import fields, replace
from fractions import Fraction
from typing import get_args, get_type_hints

import numpy as np
import pytest

from gramophone import recipe as recipes
from gramophone.recipe import (
    OTHER_NAMES,
    PRESETS,
    InvalidRecipeError,
    LayerWeight,
    Optimiser,
    PresetName,
    Recipe,
    RecipeOverrides,
    Start,
    field_help,
    field_value,
    preset,
)
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
    assert RecipeOverrides.__annotations__.keys() == get_type_hints(Recipe).keys()


@pytest.mark.parametrize("field", ["normalisation", "pooling", "start", "optimiser"])
def test_overrides_are_enums_or_all_of_their_texts(field):
    kind, texts = get_args(get_type_hints(RecipeOverrides)[field])
    assert kind is get_type_hints(Recipe)[field]
    assert list(get_args(texts)) == [str(member) for member in kind]


def test_the_names_of_the_presets_are_a_type():
    assert list(get_args(PresetName)) == list(PRESETS)


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


def test_the_tests_have_another_value_for_each_field():
    assert OTHER.keys() == {field.name for field in fields(Recipe)}


@pytest.mark.parametrize("field", OTHER)
def test_each_field_crosses_the_wire_alone(field):
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
    ) == ["style_layers", "style_layers[0].weight", "style_layers[1].weight", "alpha", "size", "average"]


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


def test_unknown_presets_and_fields_are_refused_together_with_wrong_values():
    with pytest.raises(InvalidRecipeError) as refused:
        preset("best", gamma=1, lr=0.1, sise=3, size="big", beta=2)
    assert [tuple(violation) for violation in refused.value.violations] == [
        ("preset", "must be one of fast, quality, textbook, got 'best'"),
        ("gamma", "is not a field of a recipe"),
        ("lr", "is not a field of a recipe; did you mean step?"),
        ("sise", "is not a field of a recipe; did you mean size?"),
        ("size", "must be a whole number, got 'big'"),
    ]


@pytest.mark.parametrize("name", [None, 3, ["fast"], "Fast", "qualty"])
def test_a_preset_is_named_by_its_exact_text(name):
    hint = {"Fast": "fast", "qualty": "quality"}.get(str(name))
    with pytest.raises(
        InvalidRecipeError, match=r"preset: must be one of .*, got .*" + (f"mean {hint}" if hint else "")
    ):
        preset(name)


def test_other_names_lead_to_fields():
    assert set(OTHER_NAMES.values()) <= set(OTHER)
    assert not set(OTHER_NAMES) & set(OTHER)


# Forms of values ------------------------------------------------------------------------------------------------------

PAIRS = (LayerWeight("relu1_1", 1.0), LayerWeight("conv2_1", 0.5))


@pytest.mark.parametrize(
    "given",
    [
        PAIRS,
        list(PAIRS),
        {"relu1_1": 1, "conv2_1": 0.5},
        {"relu1_1": np.float32(1), "conv2_1": np.float16(0.5)},
        ["relu1_1", ("conv2_1", 0.5)],
        [["relu1_1", 1], ["conv2_1", 0.5]],
    ],
)
def test_layers_have_several_forms(given):
    recipe = Recipe(style_layers=given)
    assert recipe.style_layers == PAIRS
    assert all(type(layer) is LayerWeight and type(layer.weight) is float for layer in recipe.style_layers)


@pytest.mark.parametrize(
    ("given", "field", "description"),
    [
        ("relu1_1", "style_layers", """like {"relu1_1": 1.0} or ["relu1_1"], got 'relu1_1'; write ['relu1_1']"""),
        (
            "relu1_1:1,relu2_1:0.5,relu3_1:2,relu4_1:3",
            "style_layers",
            "got 'relu1_1:1,relu2_1:0.5,relu3_1:2,relu4_1:3'",
        ),
        (PAIRS[0], "style_layers", "must be layers, like .* got a gramophone.LayerWeight"),
        (3, "style_layers", "must be layers, like .* got 3"),
        ({"relu1_1"}, "style_layers", "got a set of 1"),
        (["relu1_1", 3], "style_layers[1]", "must be the name of a layer or a pair .* got 3"),
        ([("relu1_1", 1, 2)], "style_layers[0]", "got a tuple of 3"),
        ({"relu1_1": "1"}, "style_layers[0].weight", "must be a number, got '1'"),
        ({"relu1_1": True}, "style_layers[0].weight", "must be a number, got True"),
        ({1: 1.0}, "style_layers[0]", "must be the name of a layer"),
    ],
)
def test_wrong_layers_are_named(given, field, description):
    with pytest.raises(InvalidRecipeError) as refused:
        Recipe(style_layers=given)
    (violation,) = refused.value.violations
    assert violation.field == field and re.search(description.replace("[", r"\["), violation.description)


@pytest.mark.parametrize(
    ("field", "given", "exact"),
    [
        ("beta", 5, 5.0),
        ("beta", np.float32(2.5), 2.5),
        ("beta", np.array(2.5), 2.5),
        ("beta", Fraction(1, 4), 0.25),
        ("size", np.int64(64), 64),
        ("size", np.array(64), 64),
        ("optimiser", "adam", Optimiser.ADAM),
        ("start", Start.NOISE, Start.NOISE),
    ],
)
def test_values_get_their_exact_types(field, given, exact):
    value = getattr(Recipe(**{field: given}), field)
    assert value == exact and type(value) is type(exact)
    assert field_value(field, given) == exact


@pytest.mark.parametrize(
    ("field", "given", "description"),
    [
        ("beta", "5", "must be a number, got '5'"),
        ("beta", True, "must be a number, got True"),
        ("beta", np.True_, "must be a number, got a numpy.bool"),
        ("beta", np.ones(1), "must be a number, got a numpy.ndarray of shape (1,)"),
        ("beta", 1j, "must be a number, got 1j"),
        ("beta", float, "must be a number, got the class float"),
        ("beta", None, "must not be None; leave it out for the value of the preset"),
        ("beta", 10**400, "must be between 0 and 1e+15, got inf"),
        ("size", 512.0, "must be a whole number, got 512.0"),
        ("size", np.float32(512), "must be a whole number, got a numpy.float32"),
        ("size", False, "must be a whole number, got False"),
        ("size", 10**9, "must be between 16 and 16384, got 1e+09"),
        ("size", 10**400, "must be between 16 and 16384, got a number of 1329 bits"),
        ("size", "x" * 100, f"must be a whole number, got '{'x' * 56}..."),
        ("pooling", "mean", "must be one of max, average, got 'mean'; did you mean average?"),
        ("pooling", 1, "must be one of max, average, got 1"),
        ("pooling", Start.NOISE, "must be one of max, average, got 'noise'"),
        ("optimiser", "ADAM", "normalised-descent, adam, lbfgs, got 'ADAM'; did you mean adam?"),
        ("optimiser", "gradient_descent", "got 'gradient_descent'; did you mean gradient-descent?"),
    ],
)
def test_a_wrong_value_is_named_with_what_fits(field, given, description):
    for refuse in (lambda: field_value(field, given), lambda: Recipe(**{field: given})):
        with pytest.raises(InvalidRecipeError) as refused:
            refuse()
        assert [violation.field for violation in refused.value.violations] == [field]
        assert refused.value.violations[0].description.endswith(description)


def test_a_field_that_is_wrong_breaks_no_joint_rule():
    assert violated(alpha="1", content_layers=(), beta=0) == ["alpha"]


def test_the_text_of_a_recipe_has_what_differs_from_the_preset_fast():
    assert repr(Recipe()) == "Recipe()"
    assert repr(Recipe(beta=5, optimiser="adam")) == "Recipe(beta=5.0, optimiser='adam')"
    assert eval(repr(Recipe(**OTHER)), {"Recipe": Recipe, "LayerWeight": LayerWeight}) == Recipe(**OTHER)


def test_the_help_of_a_field_has_its_range_and_its_values_in_the_presets():
    assert field_help("size") == "longest side of the result in pixels; 16 to 16384 (default 512)"
    assert field_help("beta").endswith("; 0 to 1e+15 (default 3, textbook 60)")
    assert field_help("style_layers").endswith(
        "relu5_1:1, textbook relu1_1:500,relu2_1:2,relu3_1:1,relu4_1:0.005,relu5_1:50)"
    )


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
