"""Copies of pictures from the device to the host, without making the device wait.

On a GPU the picture is made on the compute stream and copied on a stream of its own into pinned memory; the thread that
encodes the picture waits for the copy. torch's allocators manage the buffers: that of the device keeps the picture
until the copy is done (record_stream), and that of pinned memory reuses a buffer once its reader has dropped it and its
copy is over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DeviceToHostCopier"]


class DeviceToHostCopier:
    """Copies images of one device to the host."""

    def __init__(self, device: torch.device, *, own_stream: bool = True) -> None:
        """Without ``own_stream`` the pictures of a GPU are copied on the stream on which they are made."""
        self._on_gpu = device.type == "cuda"
        self._own: torch.cuda.Stream | None = None
        if self._on_gpu and own_stream:
            self._own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def take(self, image: Tensor) -> Callable[[], Tensor]:
        """Starts to copy ``image``, float32 [3, H, W] in [0, 1], which may change as soon as this returns.

        Returns a function that waits for the copy, on any thread, and returns the picture, uint8 [H, W, 3] on the CPU.
        """
        rows = image.mul(255).round_().permute(1, 2, 0)
        picture = rows.to(torch.uint8, memory_format=torch.contiguous_format)  # converts and reorders in one pass
        if not self._on_gpu:
            return lambda: picture
        stream = torch.cuda.current_stream() if self._own is None else self._own
        stream.wait_stream(torch.cuda.current_stream())
        # With blocking=True a thread that waits sleeps, and releases the interpreter lock.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            host = torch.empty(picture.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(picture, non_blocking=True)
            picture.record_stream(stream)
            copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait
