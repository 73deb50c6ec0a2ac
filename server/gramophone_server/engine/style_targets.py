"""Style targets: the Gram matrices of style images, cached for the next job in the same style.

Every scale of every job needs the Gram matrices of its style images, and their forward pass costs half an iteration
(benchmarks/RESULTS.md). A cached matrix equals a computed one bit for bit. A cache belongs to one network in one
precision, and to its engine's thread, so that no entry is ever computed twice at the same time.
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

__all__ = ["STYLE_CACHE_BYTES", "StyleTargets", "activation_gram_scale", "style_grams"]

STYLE_CACHE_BYTES = 256 * 2**20  # about 100 entries: the five layers of a style at one size take 2.4 MB


class StyleTargets:
    """A cache of Gram matrices by image, size, layers and pooling, on the device.

    The least recently used entries are dropped first.
    """

    def __init__(self, features: VggFeatures, max_bytes: int = STYLE_CACHE_BYTES) -> None:
        self._features, self._max_bytes = features, max_bytes
        self._kept: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()
        self._hits = self._misses = self._bytes = 0

    @property
    def counts(self) -> CacheCounts:
        """The counts since the start; thread-safe."""
        return CacheCounts(self._hits, self._misses, self._bytes, self._max_bytes)

    @torch.inference_mode()
    def grams(
        self, image: Tensor, digest: bytes, width: int, height: int, layers: Sequence[str], pooling: Pooling
    ) -> tuple[Tensor, ...]:
        """`style_grams` of ``image``, uint8 [3, h, w], at ``width`` x ``height`` px. ``digest``: its `job.digest`."""
        key = digest, width, height, tuple(layers), pooling
        if key in self._kept:
            self._hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self._misses += 1
        grams = style_grams(self._features, resize(image.to(self._features.device), width, height), layers, pooling)
        self._kept[key] = grams
        self._bytes += _bytes(grams)
        while self._bytes > self._max_bytes:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return grams

    def clear(self) -> None:
        """Drops all entries."""
        self._kept.clear()
        self._bytes = 0


@torch.inference_mode()
def style_grams(features: VggFeatures, image: Tensor, layers: Sequence[str], pooling: Pooling) -> tuple[Tensor, ...]:
    """The Gram matrices of ``image``, float32 [1, 3, h, w] in [0, 1].

    There is one for each layer, float32 [C, C], divided by the layer's pixels.
    """
    if not layers:
        return ()
    activations = features.forward(image, layers, pooling)
    return tuple(
        ops.gram(activations[layer], activation_gram_scale(features, layer, activations[layer][0, 0].numel()))[0]
        for layer in layers
    )


def activation_gram_scale(features: VggFeatures, layer: str, pixels: int) -> float:
    """The scale of `ops.gram` for the activations of ``layer`` in the units of ``features``; see `VggFeatures.gain`."""
    return losses.gram_scale(pixels) * features.gain(layer) ** 2


def _bytes(grams: tuple[Tensor, ...]) -> int:
    return sum(gram.nbytes for gram in grams)
