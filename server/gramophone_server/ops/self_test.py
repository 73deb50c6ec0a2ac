"""Which ops run on their kernels: those that are right on this device. Decided once, before the network is loaded.

A kernel that a compiler, a driver or a device makes wrong would paint wrong pictures without any error. So every op
runs the cases of `self_test_cases` on the device. An op whose results differ from the reference, differ between two
calls, or that raises, is replaced by its version in `library` for as long as the process lives. That is slower and
right. The log, GetServerInfo and `gramophone info` report it.

The reference is the function of `library` for float64 arguments, on the CPU, so no library of the device is needed for
it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gramophone_server.domain.engine_api import KernelReport
from gramophone_server.domain.job import ran_out_of_memory
from gramophone_server.errors import StartupError
from gramophone_server.ops import functional, library
from gramophone_server.ops.self_test_cases import Case, cases

__all__ = ["ENGINE_OPS", "KernelTester", "choose_kernels"]

log = logging.getLogger(__name__)

ENGINE_OPS = tuple(library.__all__)

# Of cases that are not exact: the largest error of a value, by the type of the result, relative to the root mean square
# of the reference. A norm over all values would hide a single wrong one of a million. Right kernels, on the CPU and in
# the emulator, reach half of it in 16 bits, where the rounding of the result makes the error, and a tenth in float32,
# where the order of the sums does, which differs between devices.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Of the float32 results of matrix products, where cuBLAS multiplies with 10 bits of mantissa. If it truncates the rest,
# the error is 3e-3.
TF32_TOLERANCE = 1e-2
MATRIX_PRODUCTS = ("gram", "style_bwd_", "style_fwd", "style_loss")


def choose_kernels(
    device: torch.device,
    forward: torch.dtype,
    backward: torch.dtype,
    *,
    requested: str = "",
    ops: Collection[str] | None = None,
) -> KernelReport:
    """Tests the ops on ``device`` and fills `functional.by_library` for this process.

    ``forward`` and ``backward``: the types of activations and gradients that the engine uses. ``requested``: ops that
    run through the library without a test, as names with commas between them, or "all". ``ops``: the ops to test; None
    for those that an engine calls on this device. Raises `StartupError` if ``requested`` names no op, if the device has
    too little memory or no longer works after a kernel, and if torch's library is wrong on it, too.
    """
    start = time.perf_counter()
    on_request = _requested_ops(requested)
    if ops is None:
        has_cuda_ops = device.type == "cuda" and forward.itemsize == 2
        ops = [op for op in ENGINE_OPS if has_cuda_ops or op not in functional.CUDA_OPS]
    reasons = dict.fromkeys(on_request, "requested by --library-ops")
    for op in on_request:
        functional.by_library[op] = getattr(library, op)
    tester = KernelTester(device, forward, backward)
    for op in ops:
        log.debug("self-test of %s", op)  # names a kernel that hangs
        if op in functional.by_library:
            reasons.setdefault(op, "replaced earlier in this process")
        elif fault := tester.fault_of_kernel(op):
            tester.require_library(op, fault)
            functional.by_library[op] = getattr(library, op)
            reasons[op] = fault
            log.warning(
                "the kernel of %s is wrong on this device: %s. The op runs through torch's library instead, which is "
                "slower. Please report this line with the device, its driver and the version of the server",
                op,
                fault,
            )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # up to 0.1 GB, which the engine would not count as free
    seconds = time.perf_counter() - start
    by_kernels = sum(op not in reasons for op in ops)
    log.info("self-test of the kernels: %d of %d ops run on kernels, %.0f ms", by_kernels, len(ops), seconds * 1e3)
    return KernelReport(reasons, seconds)


def _requested_ops(requested: str) -> list[str]:
    names = [name.strip() for name in requested.split(",") if name.strip()]
    if names == ["all"]:
        return list(ENGINE_OPS)
    if unknown := [name for name in names if name not in ENGINE_OPS]:
        raise StartupError(
            f"--library-ops must be all, or some of {', '.join(ENGINE_OPS)}, with commas between them; "
            f"got {', '.join(unknown)}"
        )
    return names


class KernelTester:
    """Runs the cases of one device and one precision."""

    def __init__(self, device: torch.device, forward: torch.dtype, backward: torch.dtype) -> None:
        self._device = device
        self._cases: dict[str, list[Case]] = {}
        for case in cases(forward, backward, large=device.type == "cuda"):
            self._cases.setdefault(case.op, []).append(case)

    def fault_of_kernel(self, op: str) -> str:
        """What is wrong with the kernel of ``op`` in its first case with a fault; empty if all are right."""
        return self._fault(op, getattr(functional, op), exact=True)

    def require_library(self, op: str, fault: str) -> None:
        """Raises `StartupError` if the library is wrong, too. ``fault``: what is wrong with the kernel."""
        # Not exact: a library may transform a convolution (Winograd) and so round integers, and may add in any order.
        if also := self._fault(op, getattr(library, op), exact=False):
            raise StartupError(
                f"this device computes {op} wrong, by its kernel ({fault}) and by torch's library ({also}); "
                "check the device and its driver, or run the server with --device cpu"
            )

    @torch.inference_mode()
    def _fault(self, op: str, call: Callable[..., Any], *, exact: bool) -> str:
        for case in self._cases[op]:
            arguments = case.arguments()
            try:
                first, second = self._run_twice(call, case, arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, the op must not be used
                self._require_memory(op, error)
                self._require_device(op, error)
                return f"case {case.name!r} raised {type(error).__name__}: {_first_line(error)}"
            # The results come first, and then the tensors of the arguments.
            expected, of_arguments = _reference(op, arguments), _tensors(arguments)
            before = [None] * (len(expected) - len(of_arguments)) + of_arguments
            for i, (one, two, reference, old) in enumerate(zip(first, second, expected, before, strict=True)):
                if old is not None and _same_bits(old.to(reference.dtype), reference):
                    fault = "" if _same_bits(two, old) else "this argument must keep its values"
                else:
                    fault = self._difference(op, two, reference, exact and case.exact)
                if not fault and not _same_bits(one, two):
                    fault = "two calls had different results" if exact else self._difference(op, one, reference, False)
                if fault:
                    return f"case {case.name!r}, output {i}: {fault}"
        return ""

    def _run_twice(
        self, call: Callable[..., Any], case: Case, arguments: tuple[Any, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The results of two calls, and after them the tensors of the arguments, on the CPU."""
        one, two = ([self._moved(argument, case.aligned) for argument in arguments] for _ in range(2))
        results = call(*one)
        first = _on_cpu((results, one))
        # The allocator gives this memory to the results of the second call, so values that it leaves out show.
        _spoil_(results)
        del results
        return first, _on_cpu((call(*two), two))

    def _moved(self, argument: Any, aligned: bool) -> Any:
        """A copy on the device, in the same layout."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if aligned:
                return x.to(self._device, copy=True)
            memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=self._device)
            return memory.as_strided(x.shape, x.stride(), 1).copy_(x)

        return tree_map(moved, argument)

    def _difference(self, op: str, got: Tensor, reference: Tensor, exact: bool) -> str:
        """How a result differs from the reference; empty if it is right."""
        if exact or not got.is_floating_point():
            equal = _equal(got, reference)
            return "" if equal else f"error {_error(got, reference):.2g}, and the result must be exact"
        error, tolerance = _error(got, reference), self._tolerance(op, got.dtype)
        return "" if error <= tolerance else f"error {error:.2g}, tolerance {tolerance:.2g}"  # NaN is never right

    def _tolerance(self, op: str, dtype: torch.dtype) -> float:
        tf32 = self._device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return TF32_TOLERANCE if tf32 and dtype == torch.float32 and op in MATRIX_PRODUCTS else TOLERANCES[dtype]

    def _require_memory(self, op: str, error: Exception) -> None:
        """Raises `StartupError` if a call of ``op`` has raised ``error`` because it got no memory."""
        if ran_out_of_memory(error):
            raise StartupError(
                f"too little free memory on {self._device.type} for the self-test of {op} ({_first_line(error)}); "
                "end other programs that use this device, or run the server on another one (--device)"
            ) from error

    def _require_device(self, op: str, error: Exception) -> None:
        """Raises `StartupError` if the device no longer works after the kernel of ``op`` has raised ``error``."""
        try:
            torch.ones(1, device=self._device).add_(1).item()
        except RuntimeError:
            raise StartupError(
                f"the kernel of {op} has broken the device until this process ends ({_first_line(error)}); "
                f"run the server with --library-ops {op}, or all if another kernel then does the same, and report this "
                "with the device and its driver"
            ) from error


def _reference(op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The results of ``op`` in float64, and after them the tensors of its arguments."""

    def doubled(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True)

    changed = tree_map(doubled, arguments)
    return _tensors((getattr(library, op)(*changed), changed))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _spoil_(tree: Any) -> None:
    for tensor in _tensors(tree):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 255)


def _on_cpu(tree: Any) -> list[Tensor]:
    """Copies; waits for the device."""
    return [x.to("cpu", copy=True) for x in _tensors(tree)]


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether the tensors are equal to the last bit: NaN is equal to itself, and 0 differs from -0."""
    if one.is_floating_point():
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
        one, two = one.view(integers), two.view(integers)
    return torch.equal(one, two)


def _equal(got: Tensor, reference: Tensor) -> bool:
    """Whether shapes and values are equal; NaN is equal to NaN."""
    expected = reference.to(got.dtype)
    if torch.equal(got, expected):
        return True
    return got.shape == expected.shape and bool(((got == expected) | (got.isnan() & expected.isnan())).all())


def _error(got: Tensor, reference: Tensor) -> float:
    """The largest error of a value, relative to the root mean square of the reference."""
    if got.shape != reference.shape:
        return torch.inf
    got, reference = got.double(), reference.double()
    difference = got - reference
    error, square = difference.abs().max(), reference.square().mean()
    if not (error + square).isfinite():
        same = (got == reference) | (got.isnan() & reference.isnan())
        error = difference.masked_fill_(same, 0).abs().max()
        square = reference.masked_fill(~reference.isfinite(), 0).square().mean()
    return float(error / square.sqrt().clamp_min(1e-30))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
