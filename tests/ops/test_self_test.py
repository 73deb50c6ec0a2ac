"""The self-test of the kernels on the CPU: what it finds, replaces and reports. tests/cuda breaks kernels."""

from __future__ import annotations

import itertools
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone_server.errors import StartupError
from gramophone_server.ops import functional, library
from gramophone_server.ops.self_test import ENGINE_OPS, KernelTester, choose_kernels

CPU = torch.device("cpu")
FLOAT32 = (torch.float32, torch.float32)
MIXED = (torch.float16, torch.bfloat16)
CPU_OPS = [op for op in ENGINE_OPS if op not in functional.CUDA_OPS]

pytestmark = pytest.mark.usefixtures("no_fallback")


class Replaced:
    """torch.ops.gramophone with other functions for some ops."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self._real, self._functions = torch.ops.gramophone, functions

    def __getattr__(self, op: str) -> Any:
        if op in self._functions:
            return type("Overload", (), {"default": staticmethod(self._functions[op])})
        return getattr(self._real, op)


@pytest.mark.parametrize("types", [FLOAT32, (torch.bfloat16, torch.bfloat16)], ids=str)
def test_all_kernels_of_the_cpu_are_right(
    types: tuple[torch.dtype, torch.dtype], caplog: pytest.LogCaptureFixture
) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with caplog.at_level(logging.INFO):
        report = choose_kernels(CPU, *types)
    assert not report.by_library and not functional.by_library and 0 < report.seconds < 30
    (line,) = caplog.messages
    assert line.startswith(f"self-test of the kernels: {len(CPU_OPS)} of {len(CPU_OPS)} ops run on kernels, ")
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("types", [FLOAT32, MIXED, (torch.bfloat16, torch.bfloat16)], ids=str)
def test_the_library_is_right_in_the_types_of_every_precision(types: tuple[torch.dtype, torch.dtype]) -> None:
    tester = KernelTester(CPU, *types)
    for op in ENGINE_OPS if types[0].itemsize == 2 else CPU_OPS:
        tester.require_library(op, "a test")


def test_every_op_of_the_interface_has_a_library_version() -> None:
    ops = set(functional.__all__) - {"build_info", "require_kernels"}
    assert ops == set(library.__all__) == set(ENGINE_OPS)


def off_by_one_value(features: Tensor) -> Tensor:
    pooled = library.max_pool(features)
    pooled[-1, -1, -1, -1] += 1
    return pooled


def leaves_a_value_out(features: Tensor) -> Tensor:
    pooled = library.max_pool(features)
    out = torch.empty_like(pooled)
    out[:, :-1] = pooled[:, :-1]
    return out


def changes_its_argument(features: Tensor) -> Tensor:
    pooled = library.max_pool(features)
    features[0, 0, 0, 0] += 1
    return pooled


def raises(features: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def returns_nan(features: Tensor) -> Tensor:
    return torch.full_like(library.max_pool(features), torch.nan)


def returns_another_shape(features: Tensor) -> Tensor:
    return library.max_pool(features)[:, :-1]


def test_the_memory_of_results_is_free_for_the_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[weakref.ref[Tensor]] = []

    def max_pool(features: Tensor) -> Tensor:
        assert len(results) % 2 == 0 or results[-1]() is None
        pooled = library.max_pool(features)
        results.append(weakref.ref(pooled))
        return pooled

    monkeypatch.setattr(torch.ops, "gramophone", Replaced(max_pool=max_pool))
    assert not KernelTester(CPU, *FLOAT32).fault_of_kernel("max_pool") and results


def test_the_library_may_add_in_another_order_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    real, factors = library.gram, itertools.cycle((1.0, 1 + 1e-6))

    def gram(features: Tensor, scale: float) -> Tensor:
        return real(features, scale * (next(factors) if features.dtype == torch.float32 else 1.0))

    monkeypatch.setattr(library, "gram", gram)
    KernelTester(CPU, *FLOAT32).require_library("gram", "a test")
    factors = itertools.cycle((1.001, 1.0))
    with pytest.raises(StartupError, match=r"torch's library \(case '64 channels', output 0: error \S+, tolerance"):
        KernelTester(CPU, *FLOAT32).require_library("gram", "a test")


calls = itertools.count()


def differs_from_call_to_call(features: Tensor) -> Tensor:
    pooled = library.max_pool(features)
    pooled[0, 0, 0, 0] += next(calls) % 2 == 0  # the first call is wrong, the second one right
    return pooled


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (off_by_one_value, r"case 'odd sides', output 0: error \d.*, and the result must be exact"),
        (leaves_a_value_out, r"case .odd sides., output 0: "),
        (changes_its_argument, r"case 'odd sides', output 1: this argument must keep its values"),
        (raises, r"case 'odd sides' raised RuntimeError: no kernel image is available$"),
        (returns_nan, r"output 0: error nan"),
        (returns_another_shape, r"output 0: error inf"),
        (differs_from_call_to_call, r"case 'odd sides', output 0: two calls had different results"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_op_is_replaced_and_reported(
    kernel: Callable[[Tensor], Tensor], words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops, "gramophone", Replaced(max_pool=kernel))
    with caplog.at_level(logging.INFO):
        report = choose_kernels(CPU, *FLOAT32, ops=["max_pool", "max_pool_bwd", "tv_"])
    assert list(report.by_library) == ["max_pool"]
    assert functional.by_library == {"max_pool": library.max_pool}
    fault = report.by_library["max_pool"]
    assert re.search(words, fault)
    warning, info = caplog.records
    assert warning.levelname == "WARNING" and info.levelname == "INFO"
    assert warning.message.startswith(
        f"the kernel of max_pool is wrong on this device: {report.by_library['max_pool']}"
    )
    assert "runs through torch's library instead, which is slower. Please report this line" in warning.message
    assert info.message.startswith("self-test of the kernels: 2 of 3 ops run on kernels, ")
    features = torch.rand(1, 2, 4, 4)
    assert torch.equal(functional.max_pool(features), library.max_pool(features))


def test_a_result_that_is_not_exact_has_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(factor: float) -> Callable[..., Tensor]:
        return lambda grad, image, weight: library.tv_(grad, image, weight) * factor

    for factor, replaced in ((1 + 1e-5, []), (1 + 1e-3, ["tv_"])):
        monkeypatch.setattr(torch.ops, "gramophone", Replaced(tv_=scaled(factor)))
        assert list(choose_kernels(CPU, *FLOAT32, ops=["tv_"]).by_library) == replaced


def test_an_op_stays_replaced_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(torch.ops, "gramophone", Replaced(max_pool=raises))
        choose_kernels(CPU, *FLOAT32, ops=["max_pool"])
    report = choose_kernels(CPU, *FLOAT32, ops=["max_pool"])
    assert report.by_library == {"max_pool": "replaced earlier in this process"}


def test_ops_run_through_the_library_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "gramophone", Replaced(gram=raises, style_fwd=raises))
    report = choose_kernels(CPU, *FLOAT32, requested="gram, style_fwd", ops=["gram", "style_fwd", "tv_"])
    assert report.by_library == dict.fromkeys(("gram", "style_fwd"), "requested by --library-ops")  # and not called
    monkeypatch.setattr(functional, "by_library", {})
    assert list(choose_kernels(CPU, *FLOAT32, requested="all").by_library) == list(ENGINE_OPS)
    assert list(functional.by_library) == list(ENGINE_OPS)


def test_a_request_for_an_unknown_op_is_refused() -> None:
    with pytest.raises(StartupError, match=r"--library-ops must be all, or some of adam_, .*; got grams, all$"):
        choose_kernels(CPU, *FLOAT32, requested="grams,tv_,all")
    assert not functional.by_library


def test_a_device_that_is_wrong_by_the_library_too_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "gramophone", Replaced(tv_=raises))
    tester = KernelTester(CPU, *FLOAT32)
    real = library.tv_
    # The reference is float64 and stays right.
    monkeypatch.setattr(library, "tv_", lambda grad, x, w: real(grad, x, w) + (x.dtype == torch.float32))
    with pytest.raises(StartupError, match=r"computes tv_ wrong, by its kernel \(why\) and by torch's library \(case"):
        tester.require_library("tv_", "why")
    with pytest.raises(StartupError, match="run the server with --device cpu"):
        choose_kernels(CPU, *FLOAT32, ops=["tv_"])
    assert not functional.by_library


def test_a_device_that_a_kernel_has_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.ops, "gramophone", Replaced(tv_=illegal))
    monkeypatch.setattr(torch, "ones", illegal)
    with pytest.raises(
        StartupError,
        match=r"^the kernel of tv_ has broken the device .*memory access was encountered\)"
        r"; run the server with --library-ops tv_, or all if another kernel then does the same, and report this",
    ):
        choose_kernels(CPU, *FLOAT32, ops=["tv_"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("gramophone: the device refused the kernel tv_: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_too_little_memory_is_not_taken_for_a_wrong_kernel(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Tensor:
        raise error

    monkeypatch.setattr(torch.ops, "gramophone", Replaced(tv_=out_of_memory))
    with pytest.raises(
        StartupError,
        match=r"^too little free memory on cpu for the self-test of tv_ \(.*\); end other programs that use",
    ):
        choose_kernels(CPU, *FLOAT32, ops=["tv_"])


def masks_nan(grad: Tensor, features: Tensor, diff: Tensor | None, relu_mask: bool) -> None:
    library.style_bwd_(grad, features, diff, relu_mask)
    grad.masked_fill_(~(features > 0) & relu_mask, 0)


def hides_nan(*arguments: Any) -> Tensor:
    return library.first_layer(*arguments).nan_to_num(0)


def sums_in_16_bits(features: Tensor, scale: float) -> Tensor:
    return library.gram(features, 1.0).half().float() * scale


def leaves_out_the_last_channels(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    losses, differences = library.style_fwd(*arguments)
    for difference in differences:
        difference[:, 256:, 256:] = 0
    return losses, differences


def scales_as_the_first_layer(features: Any, targets: Any, weights: Tensor, scales: Any, persistent: bool) -> Any:
    return library.style_fwd(features, targets, weights, [scales[0]] * len(scales), persistent)


def leaves_out_later_jobs(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    losses, differences = library.style_fwd(*arguments)
    losses[:, 6:] = 0
    return losses, differences


def rounds_the_bias(features: Tensor, bias: Tensor) -> None:
    library.bias_relu_(features, bias.half().float())


def compares_whole_numbers(features: Tensor) -> Tensor:
    return library.max_pool(features.floor())


def overlooks_nan_in_the_last_pixel(features: Tensor) -> Tensor:
    features = features.clone()
    features[:, :, 1::2, 1::2].nan_to_num_(-torch.inf)
    return library.max_pool(features)


def looks_at_every_fourth_value(terms: Tensor, grad: Tensor, *verdicts: Tensor) -> None:
    library.check_finite_(terms, grad[..., 3::4].contiguous(), *verdicts)


def revives_the_dead(terms: Tensor, grad: Tensor, alive: Tensor, diverged_at: Tensor, count: Tensor) -> None:
    library.check_finite_(terms, grad, alive, diverged_at, count)
    alive.fill_(True)


def adds_a_larger_epsilon(*arguments: Any) -> None:
    library.adam_(*arguments)
    image, last_good, root = arguments[0], arguments[1], arguments[4].sqrt()
    image.sub_(last_good).mul_(root / (root + 1e-8)).add_(last_good)


def forgets_pairs_of_another_scale(*arguments: Any) -> None:
    inverse, seen = arguments[6], arguments[8]
    inverse[seen[1] == 0] = 0
    library.lbfgs_(*arguments)


def repairs_nan(*arguments: Any) -> None:
    library.descent_(*arguments)
    arguments[0].nan_to_num_(0)


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("style_bwd_", masks_nan),
        ("first_layer", hides_nan),
        ("gram", sums_in_16_bits),
        ("style_fwd", leaves_out_the_last_channels),
        ("style_fwd", scales_as_the_first_layer),
        ("style_fwd", leaves_out_later_jobs),
        ("bias_relu_", rounds_the_bias),
        ("max_pool", compares_whole_numbers),
        ("max_pool", overlooks_nan_in_the_last_pixel),
        ("check_finite_", looks_at_every_fourth_value),
        ("check_finite_", revives_the_dead),
        ("adam_", adds_a_larger_epsilon),
        ("lbfgs_", forgets_pairs_of_another_scale),
        ("descent_", repairs_nan),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_small_mistake_is_found(op: str, kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "gramophone", Replaced(**{op: kernel}))
    fault = KernelTester(CPU, *MIXED).fault_of_kernel(op)
    assert fault.startswith("case ") and "raised" not in fault
