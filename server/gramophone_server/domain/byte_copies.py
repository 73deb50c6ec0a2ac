"""Copies of megabytes, in slices. A copy holds the interpreter: 40 ms for a checkpoint of 64 MB in one piece. Between
slices, other threads run. For threads; the event loop copies nothing large."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from torch import Tensor

__all__ = ["SLICE_BYTES", "fill", "memory_of", "pieces", "slices"]

SLICE_BYTES = 2**20  # copying them takes 0.3 ms


def slices(data: bytes | memoryview) -> Iterator[memoryview]:
    """Yields the bytes in slices of at most `SLICE_BYTES`."""
    view = memoryview(data)
    for at in range(0, len(view), SLICE_BYTES):
        yield view[at : at + SLICE_BYTES]


def pieces(data: bytes | memoryview) -> list[bytes]:
    """Copies of the slices. `bytes.join` puts them together, which lets other threads run if all parts are `bytes`."""
    return [bytes(piece) for piece in slices(data)]


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, little endian as on all machines that torch runs on. It keeps the
    tensor. Without numpy, which torch does not need."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    if not tensor.nbytes:
        return memoryview(b"")
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


def fill(tensor: Tensor, data: memoryview) -> Tensor:
    """Copies bytes into a contiguous tensor on the CPU of the same size, and returns it."""
    memory, at = memory_of(tensor), 0
    assert len(memory) == len(data)
    for piece in slices(data):
        memory[at : at + len(piece)] = piece
        at += len(piece)
    return tensor
