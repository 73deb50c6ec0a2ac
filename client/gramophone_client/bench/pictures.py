"""Synthetic pictures for a bench without input files: smooth random colours that depend on the seed alone."""

from __future__ import annotations

import io
import random

from PIL import Image

__all__ = ["synthetic"]


def synthetic(seed: int, size: int, cells: int = 6) -> bytes:
    """A PNG of `size` x 3/4 `size` pixels with about `cells` patches of colour along the longer side.

    A style needs more cells than a content image, because its Gram matrices describe small shapes.
    """
    rows = max(1, cells * 3 // 4)
    coarse = Image.frombytes("RGB", (cells, rows), random.Random(seed).randbytes(3 * cells * rows))
    out = io.BytesIO()
    coarse.resize((size, max(1, size * 3 // 4)), Image.Resampling.BICUBIC).save(out, "png", compress_level=1)
    return out.getvalue()
