"""All kernels compute the same convolution, and the autotuner measures each once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server.network.convolutions import Autotuner, Library, OneDnn, can_pack
from gramophone_server.network.precision import MODES
from tests.support.networks import make_tiny_vgg

CPU = torch.device("cpu")
CONVOLUTION = make_tiny_vgg().convolutions[3]


@pytest.mark.parametrize("kernel", ["library", "onednn"])
def test_a_kernel_computes_the_convolution_and_its_gradient(kernel: str) -> None:
    mode = MODES["fp32"]
    ours = Library(CONVOLUTION, CPU, mode) if kernel == "library" else OneDnn(CONVOLUTION, mode)
    x = torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = F.conv2d(x, CONVOLUTION.weight, CONVOLUTION.bias, padding=1)
    grad = torch.randn_like(expected)
    (back,) = torch.autograd.grad(expected, x, grad)
    with torch.inference_mode():
        torch.testing.assert_close(ours.linear(x.detach()), expected.detach())
        torch.testing.assert_close(ours.forward(x.detach()), expected.detach().relu())
        torch.testing.assert_close(ours.backward(grad), back)
        assert ours.forward_pooled(x.detach()) is None


class FakeAutotuner(Autotuner):
    """Has given times instead of measured ones."""

    def __init__(self, **times: float) -> None:
        super().__init__()
        self.times, self.measurements = times, 0

    def measure(self, kernel: object, x: Tensor) -> float:
        self.measurements += 1
        return self.times[kernel.__name__]  # type: ignore[attr-defined]


def slow(x: Tensor) -> Tensor:
    return x + 1


def quick(x: Tensor) -> Tensor:
    return x + 2


KERNELS = {"slow": slow, "quick": quick}


def test_each_kernel_is_measured_once_per_key() -> None:
    autotuner, x = FakeAutotuner(slow=2.0, quick=1.0), torch.zeros(1)
    autotuner.measuring = True
    assert float(autotuner("a", KERNELS, x)) == float(autotuner("a", KERNELS, x)) == 2
    assert autotuner.measurements == 2
    autotuner("b", KERNELS, x)
    assert autotuner.measurements == 4
    autotuner.measuring = False
    assert float(autotuner("a", KERNELS, x)) == 2
    assert autotuner.milliseconds["a"] == {"slow": 2.0, "quick": 1.0}


def test_without_a_measurement_the_first_kernel_runs() -> None:
    autotuner = FakeAutotuner()
    assert float(autotuner("a", KERNELS, torch.zeros(1))) == 1
    assert not autotuner.measurements


def test_a_kernel_that_the_library_lacks_is_never_chosen() -> None:
    autotuner = FakeAutotuner(slow=2.0, quick=math.inf)
    autotuner.measuring = True
    assert float(autotuner("a", KERNELS, torch.zeros(1))) == 1
    autotuner.times = {"slow": math.inf, "quick": math.inf}
    with pytest.raises(RuntimeError, match="none of the kernels slow, quick for b"):
        autotuner("b", KERNELS, torch.zeros(1))


def test_weights_can_be_packed_where_torch_has_onednn() -> None:
    assert can_pack(CPU) is torch.backends.mkldnn.is_available()
    assert can_pack(torch.device("meta")) is False
