"""Style targets: the Gram matrices of style images, cached for the next job in the same style.

Every scale of every job needs the Gram matrices of its style images. Their forward pass costs half an iteration of a
picture of their size (benchmarks/RESULTS.md): 13 s for a painting of 2048 px on two cores. So it is done in steps,
between which other jobs have their turns; jobs that wait for the same matrices share a pass. A cached matrix equals a
computed one bit for bit. A cache belongs to one network in one precision, and to its engine's thread.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gramophone.recipe import Pooling
from gramophone_server import ops
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.domain.job import ran_out_of_memory
from gramophone_server.domain.job_state import JobState
from gramophone_server.engine import losses
from gramophone_server.engine.scales import resize
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.network.features import Activations, VggFeatures

__all__ = ["STYLE_CACHE_BYTES", "StyleBeginning", "StyleTargets", "activation_gram_scale", "style_grams"]

STYLE_CACHE_BYTES = 256 * 2**20  # about 100 entries: the five layers of a style at one size take 2.4 MB
# A step of a style's pass takes as many convolutions as cost together at least what so many pixels cost in the whole
# network: 0.4 s on two cores without bf16. A step of a large picture is one convolution, at most a tenth of the pass.
STEP_PIXELS = 2**17
# Activations per pixel of the largest convolution's input and output together, and float32 pictures besides.
PASS_ACTIVATIONS, PASS_PICTURE_BYTES = 2 * 64, 2 * 12


class _Style(NamedTuple):
    """A style image at the size at which the network sees it."""

    image: Tensor  # uint8 [3, h, w], on the CPU
    digest: bytes
    width: int
    height: int
    layers: tuple[str, ...]
    pooling: Pooling

    @property
    def key(self) -> tuple[object, ...]:
        """What its Gram matrices depend on."""
        return self.digest, self.width, self.height, self.layers, self.pooling


class _Step(NamedTuple):
    """A part of a style's pass."""

    convolutions: int
    pixels: float  # for which the whole network costs as much


class _Pass:
    """The pass of one style, done in steps, at which the jobs that wait for it take turns."""

    def __init__(self, features: VggFeatures, style: _Style, steps: Sequence[_Step], first: StyleBeginning) -> None:
        self.style, self.steps = style, steps
        self.first = weakref.ref(first)  # whose memory it counts as
        self.steps_done = 0
        self._results: list[tuple[Tensor, ...]] = []
        # Without a reference to this object: its activations are freed with the last job that waits for it.
        self._work = _work(features, style, steps, self._results)

    @property
    def grams(self) -> tuple[Tensor, ...] | None:
        """The Gram matrices; None before the end."""
        return self._results[0] if self._results else None

    def advance(self) -> None:
        """Does the next step."""
        next(self._work, None)
        self.steps_done += 1


def _work(
    features: VggFeatures, style: _Style, steps: Sequence[_Step], results: list[tuple[Tensor, ...]]
) -> Iterator[None]:
    """A pass; yields between two steps, and adds the matrices to ``results`` at the end."""
    grams: dict[str, Tensor] = {}
    if style.layers:
        image = resize(style.image.to(features.device), style.width, style.height)
        convolutions = _gram_steps(features, image, style.layers, style.pooling, grams)
        del image
        for number, step in enumerate(steps):
            if number:
                yield
            for _ in range(step.convolutions):
                next(convolutions)
    results.append(tuple(grams[layer] for layer in style.layers))


class StyleTargets:
    """A cache of Gram matrices by image, size, layers and pooling, on the device.

    The least recently used entries are dropped first.
    """

    def __init__(self, features: VggFeatures, max_bytes: int = STYLE_CACHE_BYTES) -> None:
        self.features, self._max_bytes = features, max_bytes
        self._kept: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()
        self._hits = self._misses = self._bytes = 0
        # Passes under way, for as long as a job waits for them.
        self._passes: weakref.WeakValueDictionary[tuple[object, ...], _Pass] = weakref.WeakValueDictionary()

    @property
    def counts(self) -> CacheCounts:
        """The counts since the start; thread-safe."""
        return CacheCounts(self._hits, self._misses, self._bytes, self._max_bytes)

    def beginning(self, state: JobState, on_memory_out: Callable[[], None] = lambda: None) -> StyleBeginning:
        """The Gram matrices that a job needs at its next scale, nothing of them computed yet. ``on_memory_out`` frees
        what else can be freed when memory runs out."""
        shape, job = state.shape, state.job
        sizes = job.style_sizes(max(shape.width, shape.height))
        styles = [
            _Style(image, digest, *size, shape.style_layers, shape.pooling)
            for image, digest, size in zip(job.styles, job.style_digests, sizes, strict=True)
        ]
        return StyleBeginning(self, styles, on_memory_out)

    def find(self, style: _Style) -> tuple[Tensor, ...] | None:
        """The cached Gram matrices of a style. Counts a hit if there are any."""
        if style.key not in self._kept:
            return None
        self._hits += 1
        self._kept.move_to_end(style.key)
        return self._kept[style.key]

    def holds(self, style: _Style) -> bool:
        """Whether `find` would find a style."""
        return style.key in self._kept

    def keep(self, style: _Style, grams: tuple[Tensor, ...]) -> None:
        """Adds computed matrices. Counts a miss."""
        self._misses += 1
        self._bytes += _bytes(grams) - _bytes(self._kept.get(style.key, ()))
        self._kept[style.key] = grams
        while self._bytes > self._max_bytes:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])

    def under_way(self, style: _Style) -> _Pass | None:
        """The pass of a style that some job has begun."""
        return self._passes.get(style.key)

    def join_pass(self, style: _Style, steps: Sequence[_Step], beginning: StyleBeginning) -> _Pass:
        """The pass of a style, which a job begins if no other one has."""
        found = self._passes.get(style.key)
        if found is None:
            found = self._passes[style.key] = _Pass(self.features, style, steps, beginning)
        elif found.first() is None:
            found.first = weakref.ref(beginning)
        return found

    def end_pass(self, style: _Style) -> None:
        """The pass of a style is done, or has failed."""
        self._passes.pop(style.key, None)

    def clear(self) -> None:
        """Drops all entries."""
        self._kept.clear()
        self._bytes = 0


class StyleBeginning:
    """The Gram matrices of the style images of one job at one scale; implements `engine_api.Beginning`."""

    def __init__(self, targets: StyleTargets, styles: Sequence[_Style], on_memory_out: Callable[[], None]) -> None:
        self._targets, self._styles, self._on_memory_out = targets, styles, on_memory_out
        self._grams: list[tuple[Tensor, ...]] = []  # of the first styles; the cache may drop its own references
        self._steps = [_steps(targets.features, style) for style in styles]
        self._pass: _Pass | None = None  # of the next style, in which this job has taken part

    @property
    def next_pixels(self) -> float:
        """See `engine_api.Beginning.next_pixels`."""
        index = self._next_missing()
        if index is None:
            return 0.0
        under_way = self._targets.under_way(self._styles[index])
        return self._steps[index][0 if under_way is None else under_way.steps_done].pixels

    @property
    def next_bytes(self) -> int:
        """See `engine_api.Beginning.next_bytes`. A pass that another job has begun takes no more memory."""
        index = self._next_missing()
        if index is None:
            return 0
        style = self._styles[index]
        under_way = self._targets.under_way(style)
        if under_way is not None and under_way.first() not in (None, self):
            return 0
        activation = self._targets.features.precision.forward.itemsize
        return style.width * style.height * (PASS_ACTIVATIONS * activation + PASS_PICTURE_BYTES)

    @property
    def under_way(self) -> bool:
        """See `engine_api.Beginning.under_way`."""
        return self._pass is not None and self._pass.grams is None

    def advance(self) -> None:
        """See `engine_api.Beginning.advance`."""
        self._take_done()
        if len(self._grams) == len(self._styles):
            return
        index = len(self._grams)
        style = self._styles[index]
        self._pass = self._targets.join_pass(style, self._steps[index], self)
        try:
            with torch.inference_mode():
                self._pass.advance()
        except Exception as error:
            self._targets.end_pass(style)
            self._pass = None  # what is left of it holds nothing that another attempt could use
            if not ran_out_of_memory(error):
                raise
            self._targets.clear()
            self._on_memory_out()
            raise OutOfDeviceMemory(style.width, style.height) from error
        if self._pass.grams is not None:
            self._targets.end_pass(style)
            self._targets.keep(style, self._pass.grams)
            self._grams.append(self._pass.grams)
            self._pass = None
            self._take_done()
        if self._targets.features.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # so that the time of the step is that of its job

    def finish(self) -> list[tuple[Tensor, ...]]:
        """Does what is left, and returns the Gram matrices of each style: as `style_grams`."""
        while len(self._grams) < len(self._styles):
            self.advance()
        return self._grams

    def _next_missing(self) -> int | None:
        """The first style whose pass is not done and not cached."""
        missing = range(len(self._grams), len(self._styles))
        if self._pass is not None and self._pass.grams is not None:
            missing = missing[1:]  # another job has done its last step
        return next((index for index in missing if not self._targets.holds(self._styles[index])), None)

    def _take_done(self) -> None:
        """Takes the matrices that are cached, or that another job has computed the last of."""
        if self._pass is not None and self._pass.grams is not None:
            self._grams.append(self._targets.find(self._pass.style) or self._pass.grams)
            self._pass = None
        while len(self._grams) < len(self._styles):
            grams = self._targets.find(self._styles[len(self._grams)])
            if grams is None:
                return
            self._grams.append(grams)


@torch.inference_mode()
def style_grams(features: VggFeatures, image: Tensor, layers: Sequence[str], pooling: Pooling) -> tuple[Tensor, ...]:
    """The Gram matrices of ``image``, float32 [1, 3, h, w] in [0, 1].

    There is one for each layer, float32 [C, C], divided by the layer's pixels.
    """
    if not layers:
        return ()
    grams: dict[str, Tensor] = {}
    for _ in _gram_steps(features, image, layers, pooling, grams):
        pass
    return tuple(grams[layer] for layer in layers)


def _gram_steps(
    features: VggFeatures, image: Tensor, layers: Sequence[str], pooling: Pooling, grams: dict[str, Tensor]
) -> Iterator[None]:
    """Fills ``grams`` by layer, one convolution at a time, and keeps no activations that are not needed any more."""
    activations = Activations(pooling)
    before = ""
    for name in features.steps(image, layers, activations):
        for layer in ("conv" + name, "relu" + name):
            if layer in layers:
                features_of_layer = activations[layer]
                scale = activation_gram_scale(features, layer, features_of_layer[0, 0].numel())
                grams[layer] = ops.gram(features_of_layer, scale)[0]
        activations.free(before)
        before = name
        yield


def _steps(features: VggFeatures, style: _Style) -> list[_Step]:
    """The steps of a style's pass; without layers there is one, of nothing."""
    costs = features.costs(style.layers, style.height, style.width) if style.layers else []
    steps = [_Step(0, 0.0)]
    for cost in costs:
        if steps[-1].pixels >= STEP_PIXELS:
            steps.append(_Step(0, 0.0))
        convolutions, pixels = steps[-1]
        steps[-1] = _Step(convolutions + 1, pixels + cost * style.width * style.height)
    return steps


def activation_gram_scale(features: VggFeatures, layer: str, pixels: int) -> float:
    """The scale of `ops.gram` for the activations of ``layer`` in the units of ``features``; see `VggFeatures.gain`."""
    return losses.gram_scale(pixels) * features.gain(layer) ** 2


def _bytes(grams: tuple[Tensor, ...]) -> int:
    return sum(gram.nbytes for gram in grams)
