"""The self-test finds kernels that the emulator makes wrong, and the picture's gradient stays right without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.memory_estimate import bytes_needed
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import MODES
from gramophone_server.ops import functional, library
from gramophone_server.ops.self_test import ENGINE_OPS, KernelTester, choose_kernels
from tests.support import emulated
from tests.support.emulated import Fault
from tests.support.features import as_image, objective_of, relative_error
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

CPU = torch.device("cpu")
TYPES = {"fp16": (torch.float16, torch.bfloat16), "bf16": (torch.bfloat16, torch.bfloat16)}

pytestmark = [
    pytest.mark.usefixtures("no_fallback", "emulated_kernels"),
    pytest.mark.skipif(emulated.ON_GPU, reason="breaks kernels in the emulator"),
]

INDICES = (Fault.LAST_BLOCK, Fault.LAST_THREAD)
BARRIERS = (*INDICES, Fault.BARRIER)
TENSOR_CORES = (*BARRIERS, Fault.PRODUCT)
# By kernel: the ops that launch it, and the faults that it can have. Two launches of one name are broken together.
KERNELS: dict[str, tuple[set[str], tuple[Fault, ...]]] = {
    "style_gram_partials": ({"style_loss", "gram", "style_fwd"}, (*TENSOR_CORES, Fault.COPY, Fault.UNREPEATABLE)),
    "style_gram_reduce": ({"style_loss", "gram", "style_fwd"}, BARRIERS),
    "style_bwd": ({"style_bwd_"}, (*TENSOR_CORES, Fault.COPY)),
    "style_bwd_mask": ({"style_bwd_"}, INDICES),
    "content_": ({"content_"}, (*BARRIERS, Fault.UNREPEATABLE)),
    "tv_": ({"tv_"}, BARRIERS),
    "tv_check_finite_": ({"tv_check_finite_"}, BARRIERS),
    "max_pool": ({"max_pool"}, (*INDICES, Fault.REFUSED)),
    "max_pool_bwd": ({"max_pool_bwd"}, INDICES),
    "bias_relu_": ({"bias_relu_"}, INDICES),
    "bias_relu_pool": ({"bias_relu_pool"}, INDICES),
    "pool_codes_bwd": ({"pool_codes_bwd"}, INDICES),
    "first_layer": ({"first_layer"}, TENSOR_CORES),
    "first_layer_bwd": ({"first_layer_bwd"}, TENSOR_CORES),
    "check_finite": ({"check_finite_"}, BARRIERS),
    "descent": ({"descent_"}, INDICES),
    "descent_squares": ({"descent_"}, BARRIERS),
    "normalised descent": ({"descent_"}, BARRIERS),
    "adam": ({"adam_"}, (*INDICES, Fault.UNREPEATABLE)),
    "lbfgs_dots": ({"lbfgs_"}, BARRIERS),
    # Without its last block the step would follow a plan of any memory: on a GPU that breaks the device, here the test.
    "lbfgs_plan": ({"lbfgs_"}, (Fault.LAST_THREAD, Fault.BARRIER)),
    "lbfgs": ({"lbfgs_"}, INDICES),
}
SLOW = {"gram", "style_fwd", "style_bwd_"}  # a second each in the emulator


@pytest.fixture
def emulated_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`gramophone_server.ops.functional` calls the emulated ops."""
    monkeypatch.setattr(torch.ops, "gramophone", emulated.library())
    yield


@pytest.mark.parametrize("precision", TYPES)
def test_right_kernels_pass_and_every_kernel_is_launched(precision: str) -> None:
    emulated.launched()
    assert not choose_kernels(CPU, *TYPES[precision], ops=ENGINE_OPS).by_library
    assert emulated.launched() == set(KERNELS), "KERNELS, above, lists every kernel; cases of the op must launch it"


@pytest.mark.parametrize(("kernel", "fault"), [(k, fault) for k, (_, faults) in KERNELS.items() for fault in faults])
def test_a_wrong_kernel_is_found(kernel: str, fault: Fault) -> None:
    op = min(KERNELS[kernel][0] - SLOW or KERNELS[kernel][0])
    with emulated.broken(kernel, fault):
        assert KernelTester(CPU, *TYPES["fp16"]).fault_of_kernel(op)


@pytest.mark.parametrize("kernel", KERNELS)
def test_exactly_the_ops_of_a_wrong_kernel_are_replaced(kernel: str) -> None:
    affected = KERNELS[kernel][0]
    with emulated.broken(kernel, Fault.LAST_THREAD):
        report = choose_kernels(CPU, *TYPES["fp16"], ops=sorted(affected | set(ENGINE_OPS) - SLOW))
    assert set(report.by_library) == affected == set(functional.by_library)


@pytest.fixture(scope="module")
def features() -> VggFeatures:
    """A network as on a GPU, with the widths of the real one, which the kernels need."""
    return VggFeatures(make_tiny_vgg(widths=(64, 128, 256, 512, 512)), CPU, MODES["fp16"], kernel="cudnn")


@pytest.mark.parametrize("kernel", ["style_gram_partials", "style_bwd", "pool_codes_bwd"])
def test_a_wrong_kernel_does_not_reach_the_gradient(features: VggFeatures, kernel: str) -> None:
    image, content, style = (as_image(make_picture(seed, 21, 18)) for seed in (5, 1, 2))

    def gradient() -> Tensor:
        return objective_of(features, [Recipe()], content, [[(style, 1.0)]]).evaluate(image).grad

    expected = gradient()
    with emulated.broken(kernel, Fault.LAST_BLOCK):
        assert not relative_error(gradient(), expected) < 0.02  # wrong, or NaN
        affected = KERNELS[kernel][0]
        assert set(choose_kernels(CPU, *TYPES["fp16"], ops=affected).by_library) == affected
        assert relative_error(gradient(), expected) < 0.01


def test_the_memory_estimate_follows_the_ops_that_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the meta device has the kernels' rules under their own names
    shape = Shape.of(Recipe(size=64), 64, 64)
    by_kernels = bytes_needed(make_tiny_vgg(widths=(64, 64, 64, 64, 64)), shape, 1, MODES["fp16"], "cudnn")
    monkeypatch.setattr(functional, "by_library", {op: getattr(library, op) for op in ENGINE_OPS})
    by_library = bytes_needed(make_tiny_vgg(widths=(64, 64, 64, 64, 64)), shape, 1, MODES["fp16"], "cudnn")
    # The first layer's map, 0.5 MB in 16 bits, exists once or twice more in float32.
    assert 2**20 < by_library - by_kernels < 4 * 2**20
