import pytest

from gramophone.values import did_you_mean, nearest, shown

KNOWN = ("step", "style_scale", "gradient-descent", "average")
OTHERS = {"lr": "step", "learning_rate": "step", "mean": "average", "size": "longest-side"}


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("stpe", "step"),
        ("lr", "step"),
        ("LR", "step"),
        ("--learning-rate", "step"),
        ("learning_rat", "step"),
        ("style scale", "style_scale"),
        ("gradient_descent", "gradient-descent"),
        ("size", None),  # leads to a word that is not known here
        ("zebra", None),
        ("", None),
    ],
)
def test_the_nearest_word_is_a_name_in_other_letters_a_synonym_or_a_similar_one(word, name):
    assert nearest(word, KNOWN, OTHERS) == name
    assert did_you_mean(word, KNOWN, OTHERS) == ("" if name is None else f"; did you mean {name}?")


def test_a_long_text_is_cut_before_it_is_compared():
    assert nearest("step" * 10_000_000, KNOWN, OTHERS) is None


class Painting:
    def __repr__(self):
        raise AssertionError("may be long, slow or wrong")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("a", "'a'"),
        (0.5, "0.5"),
        pytest.param(10**5000, "a number of 16610 bits", id="large"),
        (b"abc", "3 bytes"),
        ([1, 2], "a list of 2"),
        ({}, "a dict of 0"),
        (Painting, "the class Painting"),
        (object(), "an object"),
        (Painting(), "a tests.Painting"),
    ],
)
def test_a_value_is_shown_shortly(value, text):
    assert shown(value) == text
