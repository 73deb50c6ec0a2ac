"""Pictures for a bench without files: smooth random colours, the same for the same seed."""

from __future__ import annotations

import io
import random

from PIL import Image

__all__ = ["synthetic"]


def synthetic(seed: int, size: int, cells: int = 6) -> bytes:
    """A PNG of `size` x 3/4 `size` pixels in which about `cells` patches of colour lie along the longer side.

    A style wants more cells than a content: its Gram matrices are of the small forms.
    """
    rows = max(1, cells * 3 // 4)
    coarse = Image.frombytes("RGB", (cells, rows), random.Random(seed).randbytes(3 * cells * rows))
    out = io.BytesIO()
    coarse.resize((size, max(1, size * 3 // 4)), Image.Resampling.BICUBIC).save(out, "png", compress_level=1)
    return out.getvalue()
