"""Which precision runs on which device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gramophone_server.errors import StartupError
from gramophone_server.network import precision
from gramophone_server.network.precision import MODES, choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A fake GPU that has only a compute capability; torch's switches are restored."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic
    yield monkeypatch
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize(("multiplies", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_cpu_is_bf16_if_it_multiplies_bf16(
    multiplies: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: multiplies)
    assert choose_precision("auto", CPU) is MODES[expected]


def test_auto_on_a_gpu_is_fp16_forward_and_bf16_backward(gpu: pytest.MonkeyPatch) -> None:
    mode = choose_precision("auto", GPU)
    assert (mode.name, mode.forward, mode.backward) == ("fp16", torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_torch_uses_tf32_only_in_mode_tf32(gpu: pytest.MonkeyPatch, name: str) -> None:
    assert choose_precision(name, GPU) is MODES[name]
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (name == "tf32")


def test_an_old_gpu_runs_fp32_and_refuses_the_other_modes(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_precision("auto", GPU) is MODES["fp32"]
    with pytest.raises(
        StartupError, match=r"precision fp16 needs .* 8.0 or newer, this one has 7.5; .*--precision fp32"
    ):
        choose_precision("fp16", GPU)


def test_a_mode_that_a_cpu_does_not_have_is_refused() -> None:
    with pytest.raises(StartupError, match="precision on cpu must be auto, fp32 or bf16, got 'tf32'"):
        choose_precision("tf32", CPU)
