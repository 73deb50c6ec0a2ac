"""The CUDA kernels and their bindings, compiled for the CPU and registered as torch.ops.gramophone_emulated.*

The sources are those of csrc/cuda; tests/emulator replaces the GPU. They are compiled into `BUILD`, in half a minute,
on first use and when a source has changed. Tensors are CPU tensors.

With GRAMOPHONE_TEST_ON=cuda the same tests run on the GPU: `library` is then torch.ops.gramophone, with copies of the
tensors to the GPU and back.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent.parent
# One for each Python and torch, whose headers it is compiled with.
BUILD = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}-torch-{torch.__version__}"
ON_GPU = os.environ.get("GRAMOPHONE_TEST_ON") == "cuda"

FLAGS = [
    "-DGRAMOPHONE_EMULATED",
    "-DGRAMOPHONE_LIBRARY=gramophone_emulated",
    "-U_FORTIFY_SOURCE",  # its check of longjmp rejects jumps between fibers
    "-O2",
    "-fopenmp",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
]


@functools.cache
def library() -> Any:
    """`torch.ops.gramophone_emulated`, compiled if necessary, or the real kernels with GRAMOPHONE_TEST_ON=cuda."""
    if ON_GPU:
        return OnGpu()
    sources = [ROOT / "csrc" / "schemas.cpp", ROOT / "tests" / "emulator" / "emulator.cpp"]
    BUILD.mkdir(parents=True, exist_ok=True)
    cuda = ROOT / "csrc" / "cuda"
    for source in sorted([*cuda.rglob("*.cpp"), *cuda.rglob("*.cu")]):
        # A file that includes the source, because `load` names objects by their stems alone (each family has a
        # bindings.cpp), and the compiler knows C++ by the suffix.
        wrapped = BUILD / ("_".join(source.relative_to(cuda).with_suffix("").parts) + ".cpp")
        text = f'#include "{source}"\n'
        if not wrapped.exists() or wrapped.read_text() != text:
            wrapped.write_text(text)
        sources.append(wrapped)
    path = cpp_extension.load(
        "gramophone_emulated",
        [str(source) for source in sources],
        extra_cflags=FLAGS,
        extra_ldflags=["-fopenmp"],
        extra_include_paths=[str(ROOT / "tests" / "emulator"), str(ROOT / "csrc")],
        build_directory=str(BUILD),
        is_python_module=False,
        with_cuda=False,
    )
    del path
    return torch.ops.gramophone_emulated


def order(seed: int) -> None:
    """Sets the order in which blocks and warps run: 0 ascending, 1 descending, any other seeds a shuffle."""
    library()
    if ON_GPU:
        return  # a GPU has its own order, which differs from run to run
    _emulator().gramophone_emulator_order(ctypes.c_uint64(seed))


class Fault(enum.IntEnum):
    """What can be made wrong in a kernel; see emulator.h."""

    LAST_BLOCK = 1  # the last block does not run
    LAST_THREAD = 2  # the last thread of a block has the index of the one before it
    BARRIER = 3  # threads do not wait at __syncthreads
    COPY = 4  # waits for asynchronous copies return one group too early
    PRODUCT = 5  # a tensor core leaves out one of its products
    UNREPEATABLE = 6  # every second launch lacks its last block
    REFUSED = 7  # the launch fails


@contextlib.contextmanager
def broken(kernel: str, fault: Fault) -> Iterator[None]:
    """While open, kernels that are launched as ``kernel`` have the fault. Not for a GPU."""
    library()
    _emulator().gramophone_emulator_break(kernel.encode(), int(fault))
    try:
        yield
    finally:
        _emulator().gramophone_emulator_break(b"", 0)


def launched() -> set[str]:
    """The names of the kernels that were launched since the last call. Not for a GPU."""
    library()
    call = _emulator().gramophone_emulator_launched
    call.restype = ctypes.c_char_p
    return set(call().decode().split(",")[:-1])


def _emulator() -> ctypes.CDLL:
    return ctypes.CDLL(str(BUILD / "gramophone_emulated.so"))


class OnGpu:
    """torch.ops.gramophone for CPU tensors: arguments are copied to the GPU, and results and changed arguments back."""

    def __getattr__(self, name: str) -> Any:
        import gramophone_server.ops.functional  # noqa: F401 - registers the ops

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
