"""The measurements behind `--precision auto`: with the real network, a GPU's modes against fp32, emulated on the CPU.

One example pair at 72 px; `python -m benchmarks.precision` measures more, and benchmarks/RESULTS.md has its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from benchmarks.measure import Row
from benchmarks.precision import PAIRS, compared, example_job, round_to_tf32
from gramophone.recipe import Pooling
from gramophone_server.network.features import MAX_FP16_ACTIVATION, VggFeatures, probe_images
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg, load_vgg


@pytest.fixture(scope="module")
def vgg() -> Vgg:
    return load_vgg("embedded")


@pytest.fixture(scope="module")
def found(vgg: Vgg) -> Mapping[str, Row]:
    return compared(vgg, example_job(PAIRS[0], 72), ("tf32", "fp16", "bf16"))


def test_rounding_to_tf32_keeps_ten_bits() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -3.14159265])
    expected = torch.tensor([1.0, 1 + 2**-10, 1.0, 1 + 2**-9, -3.140625])  # ties to even
    assert torch.equal(round_to_tf32(x), expected)


@pytest.mark.parametrize("when", ["start", "end"])
def test_the_gradient_of_fp16_is_as_exact_as_that_of_tf32_and_that_of_bf16_is_not(
    found: Mapping[str, Row], when: str
) -> None:
    errors = {name: row[f"gradient error, {when}"] for name, row in found.items()}
    assert errors["fp16"] < 1.5 * errors["tf32"]
    assert errors["bf16"] > 2 * errors["fp16"]


def test_fp16_reaches_the_loss_of_fp32(found: Mapping[str, Row]) -> None:
    assert found["fp16"]["last loss / fp32"] == pytest.approx(1.0, abs=0.03)


def test_in_fp16_the_activations_of_the_real_network_are_far_below_the_largest_number(vgg: Vgg) -> None:
    features = VggFeatures(vgg, torch.device("cpu"), MODES["fp16"], kernel="library")
    exact = VggFeatures(vgg, torch.device("cpu"), MODES["fp32"], kernel="library")
    image = probe_images(torch.device("cpu"))[:1, :, :96, :96].contiguous()
    layers = [layer for layer in vgg.layers[:26] if layer.startswith("relu")]
    kept, true = (c.forward(image, layers, Pooling.MAX) for c in (features, exact))
    for layer in layers:
        gain = features.gain(layer)
        assert gain in (1, 2, 4, 8, 16, 32)
        assert float(kept[layer].max()) <= MAX_FP16_ACTIVATION
        error = (kept[layer].float() * gain - true[layer]).norm() / true[layer].norm()
        assert error < 3e-3
    assert features.gain("relu4_2") > 1  # the layer with the largest activations
