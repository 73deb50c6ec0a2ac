"""The forms of a convolution are one convolution, and the fastest is asked for once."""

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
def test_a_form_is_the_convolution_and_its_gradient(kernel: str) -> None:
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


class Stopwatch(Autotuner):
    """Knows how long everything takes."""

    def __init__(self, **times: float) -> None:
        super().__init__()
        self.times, self.asked = times, 0

    def measure(self, kernel: object, x: Tensor) -> float:
        self.asked += 1
        return self.times[kernel.__name__]  # type: ignore[attr-defined]


def slow(x: Tensor) -> Tensor:
    return x + 1


def quick(x: Tensor) -> Tensor:
    return x + 2


WAYS = {"slow": slow, "quick": quick}


def test_the_fastest_way_is_measured_once_per_question() -> None:
    fastest, x = Stopwatch(slow=2.0, quick=1.0), torch.zeros(1)
    fastest.measuring = True
    assert float(fastest("a", WAYS, x)) == float(fastest("a", WAYS, x)) == 2
    assert fastest.asked == 2
    fastest("b", WAYS, x)
    assert fastest.asked == 4
    fastest.measuring = False
    assert float(fastest("a", WAYS, x)) == 2
    assert fastest.milliseconds["a"] == {"slow": 2.0, "quick": 1.0}


def test_what_was_not_compared_goes_the_first_way() -> None:
    fastest = Stopwatch()
    assert float(fastest("a", WAYS, torch.zeros(1))) == 1
    assert not fastest.asked


def test_a_form_that_the_library_lacks_is_never_chosen() -> None:
    fastest = Stopwatch(slow=2.0, quick=math.inf)
    fastest.measuring = True
    assert float(fastest("a", WAYS, torch.zeros(1))) == 1
    fastest.times = {"slow": math.inf, "quick": math.inf}
    with pytest.raises(RuntimeError, match="none of the kernels slow, quick for b"):
        fastest("b", WAYS, torch.zeros(1))


def test_this_machine_packs_what_torch_can_pack() -> None:
    assert can_pack(CPU) is torch.backends.mkldnn.is_available()
    assert can_pack(torch.device("meta")) is False
