"""All kernels compute the same convolution, and the autotuner measures each once and drops those that are wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone_server.network.convolutions import Autotuner, CuDnn, Library, OneDnn, can_pack, find_fault
from gramophone_server.network.precision import MODES
from gramophone_server.network.tuning import MEASURED, Tuning
from tests.support import emulated
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


KERNELS = {"slow": slow, "quick": quick}  # they agree, because the relative errors are small
X = torch.full((1, 1, 1, 1), 1000.0)


def test_each_kernel_is_measured_once_per_key() -> None:
    autotuner = FakeAutotuner(slow=2.0, quick=1.0)
    autotuner.measuring = True
    assert float(autotuner("a", KERNELS, X, slow)) == float(autotuner("a", KERNELS, X, slow)) == 1002
    assert autotuner.measurements == 2
    autotuner("b", KERNELS, X, slow)
    assert autotuner.measurements == 4
    autotuner.measuring = False
    assert float(autotuner("a", KERNELS, X, slow)) == 1002
    assert autotuner.milliseconds["a"] == {"slow": 2.0, "quick": 1.0}


def test_without_a_measurement_the_first_kernel_runs() -> None:
    autotuner = FakeAutotuner()
    assert float(autotuner("a", KERNELS, X, slow)) == 1001
    assert not autotuner.measurements


class Faulty:
    """Kernels of the wrong kind."""

    def __init__(self) -> None:
        self.calls = 0

    def missing(self, x: Tensor) -> Tensor:
        raise RuntimeError("no engine for these arguments\nand more lines")

    def wrong(self, x: Tensor) -> Tensor:
        return 1.02 * (x + 1)

    def reads_its_output(self, x: Tensor) -> Tensor:
        """Has NaN from the second call on, as if the memory of its result was fresh in the first one."""
        self.calls += 1
        return x + (1 if self.calls == 1 else math.nan)

    def hides_nan(self, x: Tensor) -> Tensor:
        return (x + 1).nan_to_num(0.0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "cannot run: no engine for these arguments"),
        ("wrong", "is 2.0e-02 away from the convolution in float32"),
        ("reads_its_output", "is nan away"),
        ("hides_nan", "hides NaN"),
    ],
)
def test_a_kernel_that_is_not_right_is_logged_and_never_chosen(
    name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    autotuner, bad = FakeAutotuner(slow=2.0, **{name: 1.0}), getattr(Faulty(), name)
    autotuner.measuring = True
    assert float(autotuner("a", {name: bad, "slow": slow}, X, slow)) == 1001
    assert autotuner.milliseconds["a"] == {name: math.inf, "slow": 2.0}
    assert f"convolution kernel {name} for a is not used: it {reason}" in caplog.text
    with pytest.raises(RuntimeError, match=f"no kernel of {name} computes the convolution b; see the log"):
        autotuner("b", {name: bad}, X, slow)


def test_zeros_are_right_where_zeros_are_expected() -> None:
    zeros = torch.zeros(1, 2, 3, 3)
    assert not find_fault(lambda x: 0 * x, zeros, zeros)
    assert find_fault(lambda x: x + 1e-9, zeros, zeros)


def test_running_out_of_memory_is_no_fault_of_a_kernel() -> None:
    def too_large(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        find_fault(too_large, X, X)


def test_the_forms_of_a_convolution_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """All are measured; a CPU lacks cuDNN's fused form, and one without a ReLU is wrong."""
    monkeypatch.setattr(torch.ops, "gramophone", emulated.library())
    monkeypatch.setattr(CuDnn, "flipped", lambda self, grad: F.conv2d(grad, self.back, None, padding=1).relu_())
    autotuner = FakeAutotuner(split=3.0, biased=2.0, fused=1.0, dgrad=2.0, **{"<lambda>": 1.0})
    tuning = Tuning(forward=MEASURED)
    kernel = CuDnn(make_tiny_vgg(widths=(8,) * 5).convolutions[3], CPU, MODES["fp16"], autotuner, tuning)
    autotuner.measuring = True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 9, 7, generator=generator).half().contiguous(memory_format=torch.channels_last)
    grad = x.bfloat16()
    with torch.inference_mode():
        assert torch.equal(kernel.forward(x), kernel.biased(x))
        assert torch.equal(kernel.backward(grad), kernel.dgrad(grad))
    assert autotuner.milliseconds == {
        ("forward", 8, 8): {"split": 3.0, "biased": 2.0, "fused": math.inf},
        ("backward", 8, 8): {"flipped": math.inf, "dgrad": 2.0},
    }
    assert "fused for ('forward', 8, 8) is not used: it cannot run: Could not run 'aten::cudnn_convolution_relu'" in (
        caplog.text
    )
    assert "flipped for ('backward', 8, 8) is not used: it is " in caplog.text


def test_weights_can_be_packed_where_torch_has_onednn() -> None:
    assert can_pack(CPU) is torch.backends.mkldnn.is_available()
    assert can_pack(torch.device("meta")) is False
