"""Forms of convolutions: those that exist, and those of a single convolution."""

from __future__ import annotations

from typing import Any

import pytest

from gramophone_server.network.tuning import MEASURED, Tuning


def test_a_convolution_can_have_a_form_of_its_own() -> None:
    tuning = Tuning(forward="biased", forward_of={"3_1": MEASURED}, backward_of={"4_2": "dgrad"})
    assert [tuning.forward_form(name) for name in ("2_1", "3_1")] == ["biased", MEASURED]
    assert [tuning.backward_form(name) for name in ("3_1", "4_2")] == [MEASURED, "dgrad"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forward": "flipped"}, "a forward form is split, biased, fused, measured, got 'flipped'"),
        ({"backward_of": {"3_1": "split"}}, "a backward form is flipped, dgrad, measured, got 'split'"),
        ({"iterations_per_graph": 0}, "at least one iteration, got 0"),
    ],
)
def test_a_form_that_does_not_exist_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tuning(**fields)
