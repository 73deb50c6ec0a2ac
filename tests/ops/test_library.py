"""The ops through torch's library: their results have the types and layouts of the kernels', and nothing waits.

Their values are tested with those of the kernels: `by_kernels_and_library` in this folder, and in tests/cuda.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gramophone_server.ops import functional, library
from gramophone_server.ops.self_test import ENGINE_OPS
from gramophone_server.ops.self_test_cases import Case, cases

TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)]
CASES = [case for types in TYPES for case in cases(*types, large=False)]


def described(results: object) -> list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]:
    return [(x.shape, x.dtype, x.stride()) for x in tree_leaves(results) if isinstance(x, Tensor)]


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("op", ENGINE_OPS)
def test_results_have_the_types_and_layouts_of_the_kernels_results(op: str) -> None:
    of_op = [case for case in CASES if case.op == op]
    assert of_op, f"add a case of {op} to ops/self_test_cases.py"
    for case in of_op:
        arguments = on_meta(case)
        by_kernel = getattr(functional, op)(*arguments)
        # The meta device has no values, so an op that needs them on the host raises here.
        assert described(getattr(library, op)(*arguments)) == described(by_kernel), case.name


def on_meta(case: Case) -> tuple[object, ...]:
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, case.arguments())


@pytest.mark.parametrize("op", ENGINE_OPS)
def test_float64_arguments_have_float64_results(op: str) -> None:
    for case in CASES:
        if case.op == op:
            doubles = tree_map(
                lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, case.arguments()
            )
            results = [x for x in tree_leaves(getattr(library, op)(*doubles)) if isinstance(x, Tensor)]
            assert all(x.dtype in (torch.float64, torch.uint8) for x in results)


@pytest.mark.parametrize("op", ENGINE_OPS)
def test_every_op_runs_under_the_sanitizer(op: str) -> None:
    """Directly or, for the steps of the optimisers, through the engine's."""
    root = Path(__file__).parents[2]
    programs = [root / "tests/gpu/small_shapes.py", root / "server/gramophone_server/engine/optimisers.py"]
    assert any(f"ops.{op}(" in program.read_text() for program in programs), f"call {op} in tests/gpu/small_shapes.py"
