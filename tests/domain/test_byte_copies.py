"""Copies in slices: the same bytes, and no step that copies many."""

import gc
import random
import weakref

import pytest
import torch

from gramophone_server.domain import byte_copies


def test_slices_have_all_bytes_and_none_is_long():
    for length in (0, 1, byte_copies.SLICE_BYTES, 3 * byte_copies.SLICE_BYTES + 5):
        data = random.Random(length).randbytes(length)
        pieces = list(byte_copies.slices(data))
        assert b"".join(pieces) == data and all(0 < len(piece) <= 2**20 for piece in pieces)


@pytest.mark.parametrize("slice_bytes", [1, 7, 100])
def test_pieces_are_copies(monkeypatch, slice_bytes):
    monkeypatch.setattr(byte_copies, "SLICE_BYTES", slice_bytes)
    data = bytearray(random.Random(0).randbytes(50))
    pieces, before = byte_copies.pieces(memoryview(data)), bytes(data)
    data[:] = bytes(50)
    assert b"".join(pieces) == before and all(type(piece) is bytes for piece in pieces)
    assert byte_copies.pieces(b"") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_a_tensor_is_read_and_filled(monkeypatch, dtype):
    monkeypatch.setattr(byte_copies, "SLICE_BYTES", 7)
    tensor = torch.randint(0, 200, (3, 4, 5)).to(dtype)
    memory = byte_copies.memory_of(tensor)
    assert list(memory) == tensor.flatten().view(torch.uint8).tolist()
    other = byte_copies.fill(torch.empty_like(tensor), memory)
    assert torch.equal(other, tensor) and other.data_ptr() != tensor.data_ptr()
    assert byte_copies.fill(torch.empty(0), memoryview(b"")).numel() == 0


def test_memory_keeps_its_tensor():
    tensor = torch.arange(10, dtype=torch.uint8)
    kept, memory = weakref.ref(tensor), byte_copies.memory_of(tensor)
    del tensor
    gc.collect()
    assert kept() is not None and bytes(memory) == bytes(range(10))
    del memory
    gc.collect()
    assert kept() is None


def test_everything_is_copied_in_slices(monkeypatch):
    """40 ms in one piece for a checkpoint of 64 MB, in which no other thread ran."""
    copied, slices = [], byte_copies.slices

    def noted(data):
        for piece in slices(data):
            copied.append(len(piece))
            yield piece

    monkeypatch.setattr(byte_copies, "slices", noted)
    data = bytes(5 * 2**20)
    assert b"".join(byte_copies.pieces(data)) == data and sum(copied) == len(data)
    byte_copies.fill(torch.empty(len(data), dtype=torch.uint8), memoryview(data))
    assert sum(copied) == 2 * len(data) and max(copied) <= 2**20
