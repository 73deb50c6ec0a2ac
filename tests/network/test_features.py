"""The hand-written forward and backward pass against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from gramophone.recipe import Normalisation, Pooling, Recipe
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg
from tests import reference
from tests.support.features import LAYERS, as_image, objective_of, relative_error
from tests.support.pictures import make_picture

CPU = torch.device("cpu")

# Relative error of the gradient against autograd: for fp32 in float64, for the others with the same activations in 16
# bits, since which of four rounded values is the maximum is not a matter of the gradient.
TOLERANCES = {"fp32": 2e-5, "bf16": 0.03, "fp16": 0.012}


@pytest.mark.parametrize("kernel", ["onednn", "library"])
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("layers", LAYERS)
def test_the_gradient_is_that_of_autograd(
    tiny_vgg: Vgg, layers: str, precision: str, pooling: Pooling, kernel: str
) -> None:
    recipe = Recipe(pooling=pooling, **LAYERS[layers])
    if (precision, kernel) == ("fp16", "onednn"):
        pytest.skip("oneDNN packs float16 on few CPUs, and the server does not offer it")
    image, content, style = (as_image(make_picture(seed, 37, 50)) for seed in (5, 1, 2))
    features = VggFeatures(tiny_vgg, CPU, MODES[precision], kernel=kernel)
    got = objective_of(features, [recipe], content, [[(style, 1.0)]]).evaluate(image)
    same = torch.float64 if precision == "fp32" else features.precision.forward
    terms, grad = reference.gradient(tiny_vgg, image, content, [(style, 1.0)], recipe, same)
    assert relative_error(got.grad, grad) < TOLERANCES[precision]
    torch.testing.assert_close(got.terms[:, 0].double(), terms, rtol=TOLERANCES[precision], atol=1e-5)


@pytest.mark.parametrize("normalisation", Normalisation)
def test_every_normalisation_with_two_styles_of_different_sizes(tiny_vgg: Vgg, normalisation: Normalisation) -> None:
    recipe = Recipe(normalisation=normalisation, alpha=0.7, beta=5.0, tv_weight=2.0)
    image, content = as_image(make_picture(5)), as_image(make_picture(1))
    styles = [(as_image(make_picture(2, 33, 64)), 1.0), (as_image(make_picture(3, 70, 20)), 3.0)]
    got = objective_of(VggFeatures(tiny_vgg, CPU, MODES["fp32"]), [recipe], content, [styles]).evaluate(image)
    terms, grad = reference.gradient(tiny_vgg, image, content, styles, recipe)
    torch.testing.assert_close(got.terms[:, 0].double(), terms, rtol=1e-4, atol=0)
    assert relative_error(got.grad, grad) < 1e-4


def test_jobs_of_a_batch_have_the_gradients_that_they_have_alone(tiny_vgg: Vgg) -> None:
    recipes = [Recipe(beta=1.0), Recipe(beta=50.0, alpha=0.1, tv_weight=0.0)]
    contents = torch.cat([as_image(make_picture(seed)) for seed in (1, 2)])
    images = torch.cat([as_image(make_picture(seed)) for seed in (3, 4)])
    styles = [[(as_image(make_picture(5)), 1.0)], [(as_image(make_picture(6, 30, 30)), 1.0)]]
    features = VggFeatures(tiny_vgg, CPU, MODES["fp32"])
    together = objective_of(features, recipes, contents, styles).evaluate(images)
    for i in range(2):
        alone = objective_of(features, recipes[i : i + 1], contents[i : i + 1], styles[i : i + 1]).evaluate(
            images[i : i + 1]
        )
        torch.testing.assert_close(together.terms[:, i : i + 1], alone.terms, rtol=1e-5, atol=0)
        torch.testing.assert_close(together.grad[i : i + 1], alone.grad, rtol=1e-4, atol=1e-9)


def test_the_forward_pass_stops_at_the_deepest_requested_layer(tiny_vgg: Vgg) -> None:
    features = VggFeatures(tiny_vgg, CPU, MODES["fp32"])
    activations = features.forward(as_image(make_picture(1)), {"relu2_1", "conv1_2"}, Pooling.MAX)
    assert list(activations.relu) == ["1_1", "1_2", "2_1"]
    assert list(activations.conv) == ["1_2"]
    layers = reference.activations(tiny_vgg, as_image(make_picture(1)), Pooling.MAX)
    for layer in ("relu2_1", "conv1_2", "relu1_2"):
        torch.testing.assert_close(activations[layer].double(), layers[layer], rtol=1e-4, atol=1e-5)


def test_the_smallest_picture_has_one_activation_at_relu5_1(tiny_vgg: Vgg) -> None:
    features = VggFeatures(tiny_vgg, CPU, MODES["fp32"])
    image = as_image(make_picture(1, 16, 16))
    assert features.forward(image, {"relu5_1"}, Pooling.MAX)["relu5_1"].shape == (1, 8, 1, 1)
