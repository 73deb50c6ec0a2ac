"""Pictures off the device without holding it up.

On a GPU the picture is made on the compute stream, copied on a stream of its own into pinned memory, and waited for by
whoever encodes it. torch's allocators are the rotating slots: the device's keeps the picture until the copy is done
(record_stream), the pinned one takes a buffer back when its reader has dropped it and its copy is over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DeviceToHostCopier"]


class DeviceToHostCopier:
    """Takes pictures of images on one device."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def take(self, image: Tensor) -> Callable[[], Tensor]:
        """Begins to copy ``image``, float32 [3, H, W] in [0, 1]; the result waits for it on any thread and returns uint8
        [H, W, 3] on the CPU. The image may change at once."""
        picture = image.mul(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous()
        if self._stream is None:
            return lambda: picture
        self._stream.wait_stream(torch.cuda.current_stream())
        # Blocking: the waiting thread sleeps, and the interpreter lock is free.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            host = torch.empty(picture.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(picture, non_blocking=True)
            picture.record_stream(self._stream)
            copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait
