"""Style targets: the Gram matrices of style images, kept for the next job in the same style.

A style is asked for again at every scale of every job that paints in it, and its way through the network costs half an
iteration (benchmarks/RESULTS.md). What is kept is what would be computed, to the last bit. Caches belong to one network in one precision, and
like their engine to one thread, so that no two callers ever compute the same entry at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from gramophone.recipe import Pooling
from gramophone_server import ops
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.engine import losses
from gramophone_server.engine.scales import resize
from gramophone_server.network.features import VggFeatures

__all__ = ["STYLE_CACHE_BYTES", "StyleTargets", "gram_scale", "style_grams"]

STYLE_CACHE_BYTES = 256 * 2**20  # the five layers of a style at one size are 2.4 MB: about 100 of these


class StyleTargets:
    """Gram matrices by image, size, layers and pooling, on the device; the least recently used goes first."""

    def __init__(self, chain: VggFeatures, most_bytes: int = STYLE_CACHE_BYTES) -> None:
        self._chain, self._most_bytes = chain, most_bytes
        self._kept: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()
        self._hits = self._misses = self._bytes = 0

    @property
    def counts(self) -> CacheCounts:
        """For whoever watches; can be asked for on any thread."""
        return CacheCounts(self._hits, self._misses, self._bytes, self._most_bytes)

    @torch.inference_mode()
    def grams(
        self, image: Tensor, digest: bytes, width: int, height: int, layers: Sequence[str], pooling: Pooling
    ) -> tuple[Tensor, ...]:
        """`style_grams` of ``image``, uint8 [3, h, w] with this `job.digest`, at ``width`` x ``height`` px."""
        key = digest, width, height, tuple(layers), pooling
        if key in self._kept:
            self._hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self._misses += 1
        made = style_grams(self._chain, resize(image.to(self._chain.device), width, height), layers, pooling)
        self._kept[key] = made
        self._bytes += _bytes(made)
        while self._bytes > self._most_bytes:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Drops what is kept."""
        self._kept.clear()
        self._bytes = 0


@torch.inference_mode()
def style_grams(chain: VggFeatures, image: Tensor, layers: Sequence[str], pooling: Pooling) -> tuple[Tensor, ...]:
    """The Gram matrices, float32 [C, C], of the layers for ``image`` [1, 3, h, w], each divided by the layer's pixels."""
    if not layers:
        return ()
    trace = chain.forward(image, layers, pooling)
    return tuple(
        ops.gram(features, gram_scale(chain, layer, features[0, 0].numel()))[0]
        for layer, features in ((layer, trace[layer]) for layer in layers)
    )


def gram_scale(chain: VggFeatures, layer: str, pixels: int) -> float:
    """The scale of `ops.gram` for the activations of ``layer`` as the chain keeps them."""
    return losses.gram_scale(pixels) * chain.gain(layer) ** 2


def _bytes(grams: tuple[Tensor, ...]) -> int:
    return sum(gram.nbytes for gram in grams)
