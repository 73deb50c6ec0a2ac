"""The network as it runs on a GPU, with the emulated kernels, against the network on a CPU and against autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Pooling, Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.graph_runner import GraphRunner
from gramophone_server.engine.memory_estimate import WORKSPACES, bytes_needed
from gramophone_server.engine.memory_trace import AllocationCounter
from gramophone_server.engine.style_targets import style_grams
from gramophone_server.network.convolutions import Autotuner, CuDnn
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import MODES
from gramophone_server.network.tuning import DEFAULT_TUNING, Tuning
from gramophone_server.network.vgg import Vgg
from tests import reference
from tests.support import emulated
from tests.support.features import LAYERS, as_image, objective_of, relative_error
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide_vgg() -> Vgg:
    """A network with the widths of the real one, which the kernels need."""
    return make_tiny_vgg(widths=(64, 128, 256, 512, 512))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`gramophone_server.ops.functional` calls the emulated ops."""
    monkeypatch.setattr(torch.ops, "gramophone", emulated.library())
    yield


def evaluated(
    vgg: Vgg,
    recipe: Recipe,
    precision: str,
    kernel: str,
    height: int = 21,
    width: int = 18,
    tuning: Tuning = DEFAULT_TUNING,
) -> tuple[Tensor, Tensor]:
    """(terms [T], gradient [1, 3, H, W]) at one picture."""
    image, content, style = (as_image(make_picture(seed, height, width)) for seed in (5, 1, 2))
    features = VggFeatures(vgg, CPU, MODES[precision], kernel=kernel, tuning=tuning)
    evaluation = objective_of(features, [recipe], content, [[(style, 1.0)]]).evaluate(image)
    return evaluation.terms[:, 0], evaluation.grad


# Relative errors of the gradient. With maxima they are larger, because rounding changes here and there which of four
# pixels is the largest.
TOLERANCES = {("fp16", Pooling.AVERAGE): 0.01, ("bf16", Pooling.AVERAGE): 0.05, ("fp16", Pooling.MAX): 0.1}


@pytest.mark.parametrize(("precision", "pooling"), TOLERANCES)
@pytest.mark.parametrize("layers", ["default", "conv layers", "one layer twice", "style ends deepest"])
def test_the_gradient_on_a_gpu_is_that_on_a_cpu(
    wide_vgg: Vgg, layers: str, precision: str, pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(pooling=pooling, **LAYERS[layers])
    terms, grad = evaluated(wide_vgg, recipe, precision, "library")
    monkeypatch.setattr(torch.ops, "gramophone", emulated.library())
    got_terms, got = evaluated(wide_vgg, recipe, precision, "cudnn")
    torch.testing.assert_close(got_terms, terms, rtol=0.01, atol=1e-4)
    assert relative_error(got, grad.double()) < TOLERANCES[precision, pooling]


WAYS_RECIPE = Recipe(pooling=Pooling.AVERAGE)
# The ways that round differently. Forms: `test_convolutions`.
OTHER_WAYS = {
    "biased": Tuning(forward="biased"),
    "fused": Tuning(forward="fused"),
    "flipped": Tuning(backward="flipped"),
    "dgrad": Tuning(backward="dgrad"),
    "mixed": Tuning(forward_of={"2_1": "fused", "4_2": "biased"}, backward_of={"3_1": "dgrad"}),
    "padded forward": Tuning(padded_forward=True),
    "padded backward": Tuning(padded_backward=True),
}


@pytest.fixture(scope="module")
def by_library(wide_vgg: Vgg) -> tuple[Tensor, Tensor]:
    """(terms, gradient) of `WAYS_RECIPE` by torch's library; takes as long as an emulated one."""
    return evaluated(wide_vgg, WAYS_RECIPE, "fp16", "library")


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_every_way_computes_the_same_gradient(
    wide_vgg: Vgg, by_library: tuple[Tensor, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, grad = by_library
    monkeypatch.setattr(torch.ops, "gramophone", emulated.library())
    if not emulated.ON_GPU:  # torch has the op for GPUs alone
        monkeypatch.setattr(CuDnn, "fused", CuDnn.biased)
    got_terms, got = evaluated(wide_vgg, WAYS_RECIPE, "fp16", "cudnn", tuning=OTHER_WAYS[name])
    torch.testing.assert_close(got_terms, terms, rtol=0.01, atol=1e-4)
    assert relative_error(got, grad.double()) < TOLERANCES["fp16", Pooling.AVERAGE]


def test_ways_with_the_same_arithmetic_paint_the_same_bits(wide_vgg: Vgg, kernels: None) -> None:
    results = []
    for tuning in (DEFAULT_TUNING, Tuning(persistent_style=True, fused_check=True)):
        features = VggFeatures(wide_vgg, CPU, MODES["fp16"], kernel="cudnn", tuning=tuning)
        recipe = Recipe(size=17)
        runner = GraphRunner(features, Shape.of(recipe, 17, 17), 2)
        for slot in range(2):
            content, style = (as_image(make_picture(seed + slot, 17, 17)) for seed in (1, 3))
            grams = style_grams(features, style, runner.shape.style_layers, runner.shape.pooling)
            runner.objective.set_targets(slot, recipe, content, [(grams, 1.0)])
            runner.put(slot, {"image": content[0]}, recipe.step, 0, 0)
        runner.iterate(1)
        with torch.inference_mode():
            runner.canvas.image[1].fill_(torch.nan)
        runner.iterate(1)
        results.append([runner.terms, runner.canvas.diverged_at, *runner.slot(0).values(), *runner.slot(1).values()])
    assert results[0][1].tolist() == [0, 2]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("pooling", Pooling)
def test_the_gradient_on_a_gpu_is_that_of_autograd(wide_vgg: Vgg, pooling: Pooling, kernels: None) -> None:
    recipe = Recipe(pooling=pooling)
    terms, grad = evaluated(wide_vgg, recipe, "fp16", "cudnn")
    image, content, style = (as_image(make_picture(seed, 21, 18)) for seed in (5, 1, 2))
    expected_terms, expected = reference.gradient(wide_vgg, image, content, [(style, 1.0)], recipe)
    torch.testing.assert_close(terms.double(), expected_terms, rtol=0.02, atol=1e-4)
    assert relative_error(grad, expected) < 0.1


def test_only_codes_are_kept_of_layers_that_are_pooled_and_not_requested(wide_vgg: Vgg, kernels: None) -> None:
    features = VggFeatures(wide_vgg, CPU, MODES["fp16"], kernel="cudnn")
    activations = features.forward(as_image(make_picture(1, 32, 32)), {"relu3_1", "relu2_2"}, Pooling.MAX)
    assert list(activations.codes) == ["1_2"]
    assert list(activations.relu) == ["1_1", "2_1", "2_2", "3_1"]
    assert activations["relu2_2"].shape == (1, 128, 16, 16)


def test_the_two_kernels_of_the_backward_pass_agree(wide_vgg: Vgg) -> None:
    kernel = CuDnn(wide_vgg.convolutions[2], CPU, MODES["bf16"], Autotuner())
    grad = torch.randn(2, 128, 9, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(kernel.flipped(grad), kernel.dgrad(grad), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("jobs", "size", "tuning"),
    [
        (1, 32, DEFAULT_TUNING),
        (2, 24, DEFAULT_TUNING),
        (2, 32, Tuning("biased", padded_forward=True, padded_backward=True, persistent_style=True, fused_check=True)),
    ],
)
def test_the_memory_estimate_is_the_peak_of_the_iteration(
    wide_vgg: Vgg, jobs: int, size: int, tuning: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape.of(Recipe(size=size), size, size)
    estimate = bytes_needed(wide_vgg, shape, jobs, MODES["fp16"], "cudnn")
    monkeypatch.setattr(torch.ops, "gramophone", emulated.library())
    features = VggFeatures(wide_vgg, CPU, MODES["fp16"], kernel="cudnn", tuning=tuning)
    with AllocationCounter() as allocations:
        runner = GraphRunner(features, shape, jobs)
        runner.iterate(2)
    assert allocations.peak == pytest.approx(estimate - WORKSPACES, rel=0.02)
