"""The CUDA kernels and their bindings, compiled for the CPU and registered as torch.ops.gramophone_emulated.*

Same sources as the real ones, csrc/cuda/*; tests/emulator stands in for the GPU. Compiled once into build/emulated, in half
a minute, and again when a source changes. Tensors are CPU tensors.

With GRAMOPHONE_TEST_ON=cuda the same tests run on the GPU instead: `library` then stands for torch.ops.gramophone, and
copies the tensors there and back.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "emulated"
ON_GPU = os.environ.get("GRAMOPHONE_TEST_ON") == "cuda"

FLAGS = [
    "-DGRAMOPHONE_EMULATED",
    "-DGRAMOPHONE_LIBRARY=gramophone_emulated",
    "-U_FORTIFY_SOURCE",  # it takes a jump between fibers for a mistake
    "-O2",
    "-fopenmp",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
]


@functools.cache
def library() -> Any:
    """`torch.ops.gramophone_emulated`, built if need be; or the real kernels."""
    if ON_GPU:
        return OnGpu()
    sources = [ROOT / "csrc" / "ops.cpp", ROOT / "tests" / "emulator" / "emulator.cpp"]
    sources += sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    BUILD.mkdir(parents=True, exist_ok=True)
    for kernels in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        wrapped = BUILD / f"{kernels.stem}_cu.cpp"  # the compiler goes by the name
        text = f'#include "{kernels}"\n'
        if not wrapped.exists() or wrapped.read_text() != text:
            wrapped.write_text(text)
        sources.append(wrapped)
    path = cpp_extension.load(
        "gramophone_emulated",
        [str(source) for source in sources],
        extra_cflags=FLAGS,
        extra_ldflags=["-fopenmp"],
        extra_include_paths=[str(ROOT / "tests" / "emulator"), str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")],
        build_directory=str(BUILD),
        is_python_module=False,
        with_cuda=False,
    )
    del path
    return torch.ops.gramophone_emulated


def order(seed: int) -> None:
    """The order in which blocks and warps run: 0 as numbered, 1 backwards, any other number shuffled by it."""
    library()
    if ON_GPU:
        return  # it has an order of its own, another one each time
    ctypes.CDLL(str(BUILD / "gramophone_emulated.so")).gramophone_emulator_order(ctypes.c_uint64(seed))


class OnGpu:
    """torch.ops.gramophone for tensors on the CPU: a copy goes to the GPU, and what an op writes comes back."""

    def __getattr__(self, name: str) -> Any:
        import gramophone_server.ops.functional  # noqa: F401 - registers them

        op = getattr(torch.ops.gramophone, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            moved = tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, (args, kwargs))
            out = op(*moved[0], **moved[1])
            for mine, theirs in zip(tree_leaves((args, kwargs)), tree_leaves(moved), strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)
            return tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, out)

        call.default = call  # type: ignore[attr-defined]
        return call
