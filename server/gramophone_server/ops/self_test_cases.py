"""Arguments of the ops for `self_test`, which together cover every path of the kernels.

Most cases are small integers times powers of two. All their sums are exact in float32 in any order of the summands, so
even a single wrong product shows, however many there are. The shapes follow csrc: slices and tiles of pixels that are
not full, several blocks, all widths of channels, accesses of 16 bytes and of one value. A NaN must stay one, because
that is how a job that diverges is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from gramophone_server.ops import library
from gramophone_server.ops.library.optimisers import PAIRS

__all__ = ["Case", "cases"]

CHANNELS_LAST = torch.channels_last
NAN = float("nan")
RANDOM_VALUES = 32749  # a prime, so that no two rows, channels or blocks are the same
Images = tuple[Tensor, Tensor, Tensor | None]  # image, last_good, mean
SCALE, SHIFT, ORDER = [0.5, 2.0, -1.0], [-0.25, 0.5, 1.0], [2, 0, 1]  # of the colours, for the first layer


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    op: str
    name: str  # the path that it covers
    arguments: Callable[[], tuple[Any, ...]]  # makes them, on the CPU
    exact: bool = True  # all results must be those of the reference, to the last bit
    aligned: bool = True  # False: no tensor starts at a multiple of 16 bytes


def cases(forward: torch.dtype, backward: torch.dtype, *, large: bool) -> Iterator[Case]:
    """All cases, for features of type ``forward`` and gradients of type ``backward``.

    ``large``: also those that fill a GPU, of which a CPU or the emulator would take too long.
    """
    yield from _style_cases(forward, backward, large)
    yield from _term_cases(forward, backward, large)
    yield from _pooling_cases(forward, backward)
    if forward.itemsize == 2:
        yield from _fused_cases(forward, backward, large)
    yield from _optimiser_cases(large)


# Style ----------------------------------------------------------------------------------------------------------------

# [B, C, H, W] for every width of the kernels: three slices of pixels (two at 512 channels), the last not full.
WIDTHS = [(2, 64, 33, 35), (1, 128, 15, 37), (1, 256, 9, 31), (1, 512, 7, 19)]


def _style_cases(forward: torch.dtype, backward: torch.dtype, large: bool) -> Iterator[Case]:
    for shape in WIDTHS:
        yield Case("gram", f"{shape[1]} channels", partial(_gram, shape, forward))
    yield Case("gram", "normally distributed", partial(_normal_gram, forward), exact=False)
    yield Case("style_loss", "one layer", partial(_style_loss, forward))
    yield Case("style_fwd", "four widths", partial(_style_fwd, [(1, c, 5, 7) for c in (64, 128, 256, 512)], forward))
    # Nine layers are two launches.
    yield Case("style_fwd", "nine layers, two jobs", partial(_style_fwd, [(2, 64, 5, 7)] * 8 + WIDTHS[:1], forward))
    # More jobs than persistent blocks: one for each multiprocessor, 6 in the emulator, 132 on an H100.
    few = [(161 if large else 7, 64, 3, 5)]
    yield Case("style_fwd", "persistent blocks", partial(_style_fwd, few, forward, persistent=True))
    yield Case("style_fwd", "normally distributed", partial(_normal_style_fwd, forward), exact=False)
    # On a GPU more slices than one pass of the reduction adds, on a CPU two.
    yield Case("gram", "many slices", partial(_gram, (1, 64, 128, 133) if large else (1, 64, 65, 127), forward))

    for channels, (height, width), mask in ((64, (15, 19), True), (128, (15, 19), False), (512, (5, 9), True)):
        name = f"{channels} channels{', mask' if mask else ''}"
        shape = (2 if channels == 64 else 1, channels, height, width)
        yield Case("style_bwd_", name, partial(_style_bwd, shape, forward, backward, mask))
    yield Case("style_bwd_", "256 channels", partial(_style_bwd, (1, 256, 3, 43), forward, backward, True))
    yield Case("style_bwd_", "normally distributed", partial(_normal_style_bwd, forward, backward), exact=False)
    yield Case("style_bwd_", "unaligned", partial(_style_bwd, (1, 64, 3, 5), forward, backward, True), aligned=False)
    for shape in ((2, 64, 9, 17), (1, 3, 5, 7)):
        yield Case("style_bwd_", f"mask alone, {shape[1]} channels", partial(_mask, shape, forward, backward))
    yield Case("style_bwd_", "mask alone, unaligned", partial(_mask, (1, 8, 5, 7), forward, backward), aligned=False)


def _gram(shape: tuple[int, ...], forward: torch.dtype) -> tuple[Any, ...]:
    return _features(shape, forward, wide=True), 2.0**-7


def _normal_gram(forward: torch.dtype) -> tuple[Any, ...]:
    return _normal((1, 64, 11, 13)).abs_().to(forward).contiguous(memory_format=CHANNELS_LAST), 1 / 143


def _style_loss(forward: torch.dtype) -> tuple[Any, ...]:
    features, target, scale = _layer((2, 64, 5, 7), forward, 1)
    return features, target, 0.5, scale


def _style_fwd(shapes: Sequence[tuple[int, ...]], forward: torch.dtype, *, persistent: bool = False) -> tuple[Any, ...]:
    features, targets, scales = zip(*(_layer(shape, forward, i) for i, shape in enumerate(shapes)), strict=True)
    weights = 2.0 ** _integers((len(shapes), shapes[0][0]), -2, 2, seed=99)
    weights[0, 1:2] = 0  # as in an empty slot
    return list(features), list(targets), weights, list(scales), persistent


def _layer(shape: tuple[int, ...], forward: torch.dtype, seed: int) -> tuple[Tensor, Tensor, float]:
    """Features, a target near their Gram matrix, so that the loss is exact, too, and a scale."""
    features, scale = _features(shape, forward, seed, wide=True), 2.0 ** (-5 - seed % 3)
    distance = _symmetric(_integers((shape[0], shape[1], shape[1]), -1, 1, seed=seed + 50))
    return features, library.gram(features.float(), scale) + scale * distance, scale


def _normal_style_fwd(forward: torch.dtype) -> tuple[Any, ...]:
    features = _normal((2, 128, 11, 13)).relu_().to(forward).contiguous(memory_format=CHANNELS_LAST)
    return [features], [_symmetric(_normal((2, 128, 128), seed=1))], torch.tensor([[0.3, 1.7]]), [1 / 143]


def _style_bwd(shape: tuple[int, ...], forward: torch.dtype, backward: torch.dtype, mask: bool) -> tuple[Any, ...]:
    diff = _symmetric(_integers((shape[0], shape[1], shape[1]), -31, 31, seed=7))
    difference_type = torch.bfloat16 if forward.itemsize == 2 else forward
    grad, features = _features(shape, backward, seed=8), _features(shape, forward, seed=9, wide=True)
    features[0, 1:3, -1, 0] = NAN
    return grad, features, diff.to(difference_type), mask


def _normal_style_bwd(forward: torch.dtype, backward: torch.dtype) -> tuple[Any, ...]:
    grad, features = (
        _normal((2, 128, 9, 11), seed=seed).to(dtype).contiguous(memory_format=CHANNELS_LAST)
        for seed, dtype in ((2, backward), (3, forward))
    )
    diff = _symmetric(_normal((2, 128, 128), seed=4)) / 11
    return grad, features, diff.to(torch.bfloat16 if forward.itemsize == 2 else forward), True


def _mask(shape: tuple[int, ...], forward: torch.dtype, backward: torch.dtype) -> tuple[Any, ...]:
    grad, features = _features(shape, backward, seed=8), _features(shape, forward, seed=9)
    features[0, 1:3, 1, 1] = NAN
    grad[-1, -1, -1, -1], features[-1, -1, -1, -1] = 2, 0  # the last value is masked
    return grad, features, None, True


# Terms ----------------------------------------------------------------------------------------------------------------


def _term_cases(forward: torch.dtype, backward: torch.dtype, large: bool) -> Iterator[Case]:
    def content(shape: tuple[int, ...], mask: bool) -> tuple[Any, ...]:
        maps = [_features(shape, dtype, seed=seed) for seed, dtype in enumerate((backward, forward, forward), 11)]
        if mask and shape[0] > 1:
            maps[1][1, 1, 1, 1] = NAN
        return *maps, torch.tensor([0.5, 2.0][: shape[0]]), mask

    yield Case("content_", "two blocks per job", partial(content, (2, 8, 33, 35), False))
    yield Case("content_", "mask", partial(content, (2, 8, 33, 35), True))
    yield Case("content_", "values one by one", partial(content, (2, 3, 5, 7), True))
    yield Case("content_", "unaligned", partial(content, (1, 8, 3, 5), True), aligned=False)

    def tv(shape: tuple[int, ...]) -> tuple[Any, ...]:
        return _normal(shape), _normal(shape, seed=1), torch.tensor([0.3, 1.7])

    yield Case("tv_", "two blocks per job", partial(tv, (2, 3, 17, 23)), exact=False)
    yield Case("tv_", "four pixels", partial(tv, (2, 3, 2, 2)), exact=False)

    def checked(shape: tuple[int, ...]) -> tuple[Any, ...]:
        terms, grad, *of_jobs = _check_finite(shape)
        return grad, _normal(shape), torch.arange(1.0, shape[0] + 1), terms, *of_jobs

    yield Case("tv_check_finite_", "three blocks per job", partial(checked, (6, 3, 24, 32)), exact=False)
    if large:  # more blocks than the kernels that add their sums have threads
        yield Case("tv_", "many blocks", partial(tv, (2, 3, 301, 299)), exact=False)
        yield Case("tv_check_finite_", "many blocks", partial(checked, (2, 3, 301, 299)), exact=False)


# Layers ---------------------------------------------------------------------------------------------------------------

# Odd sides; more windows in a row than a block has threads; channels that are no multiple of 16 bytes.
MAPS = {"odd sides": (2, 16, 7, 9), "several blocks": (1, 64, 5, 140), "values one by one": (1, 3, 6, 5)}


def _pooling_cases(forward: torch.dtype, backward: torch.dtype) -> Iterator[Case]:
    def backwards(shape: tuple[int, ...], mask: bool) -> tuple[Any, ...]:
        features = _with_nan(shape, forward)
        pooled = library.max_pool(features)
        return _features(tuple(pooled.shape), backward, seed=21), features, pooled, mask

    def forwards(shape: tuple[int, ...]) -> tuple[Any, ...]:
        return (_with_nan(shape, forward),)

    for name, shape in MAPS.items():
        yield Case("max_pool", name, partial(forwards, shape))
        yield Case("max_pool_bwd", name, partial(backwards, shape, False))
    yield Case("max_pool_bwd", "mask", partial(backwards, MAPS["odd sides"], True))
    yield Case("max_pool", "unaligned", partial(forwards, (1, 8, 4, 6)), aligned=False)
    yield Case("max_pool_bwd", "unaligned", partial(backwards, (1, 8, 4, 6), True), aligned=False)


def _with_nan(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    features = _features(shape, dtype, seed=22)
    features[0, 0] = _normal(shape[2:], seed=23)
    features[0, 1, [0, 2, 3, 1], [0, 3, 0, 3]] = NAN  # one in each of four windows, and each in another place of it
    return features


def _fused_cases(forward: torch.dtype, backward: torch.dtype, large: bool) -> Iterator[Case]:
    def biased(shape: tuple[int, ...]) -> tuple[Any, ...]:
        bias = _integers((shape[1],), -2, 2, seed=31)
        bias[::2] += 2.0**-12  # lost if the bias has 16 bits
        return _with_nan(shape, forward), bias

    def by_codes(shape: tuple[int, ...]) -> tuple[Any, ...]:
        b, c, h, w = shape
        codes = _integers((b, c, h // 2, w // 2), 0, 7, seed=32).to(torch.uint8)
        grad = _features((b, c, h // 2, w // 2), backward, seed=33)
        return grad, codes.contiguous(memory_format=CHANNELS_LAST), h, w

    for name, shape in {"odd sides": (2, 24, 7, 9), "several blocks": (1, 64, 5, 66)}.items():
        yield Case("bias_relu_", name, partial(biased, shape))
        yield Case("bias_relu_pool", name, partial(biased, shape))
        yield Case("pool_codes_bwd", name, partial(by_codes, shape))

    def first(shape: tuple[int, ...]) -> tuple[Any, ...]:
        image = _integers(shape, 0, 4, seed=34) / 4
        if shape[0] > 2:
            image[1] = NAN
        return image, _first_weight(forward), _integers((64,), -2, 2, seed=35), SCALE, SHIFT, ORDER

    def first_bwd(shape: tuple[int, ...]) -> tuple[Any, ...]:
        return _features(shape, backward, seed=36), _first_weight(backward), SCALE, ORDER

    def normal_first() -> tuple[Any, ...]:
        weight = torch.nn.functional.pad(_normal((64, 27), seed=1) / 4, (0, 5)).to(forward)
        return _normal((1, 3, 5, 7)).sigmoid_(), weight, _normal((64,), seed=2), SCALE, SHIFT, ORDER

    for name, (b, h, w) in {"part of a tile": (1, 1, 3), "several tiles": (3, 27, 35)}.items():
        yield Case("first_layer", name, partial(first, (b, 3, h, w)))
        yield Case("first_layer_bwd", name, partial(first_bwd, (b, 64, h, w)))
    yield Case("first_layer", "normally distributed", normal_first, exact=False)
    if large:  # more tiles than blocks: 344, of 8 rows each, and two blocks for each multiprocessor
        yield Case("first_layer", "many tiles", partial(first, (2, 3, 1371, 2)))


def _first_weight(dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.pad(_integers((64, 27), -2, 2, seed=37), (0, 5)).to(dtype)


# Optimisers -----------------------------------------------------------------------------------------------------------

# [H, W] of images of two tiles of 1024 values, which the kernels read in runs of 16 bytes and one by one.
SIDES = {"wide": (20, 20), "values one by one": (17, 23)}
# Of images with more tiles than parts, and of those that do not fit into one pass over the blocks of a launch either.
TWO_TILES_A_PART, MANY_WIDE, MANY_ONE_BY_ONE = (296, 296), (592, 592), (299, 301)


def _optimiser_cases(large: bool) -> Iterator[Case]:
    for name, sides in SIDES.items():
        shape = (4, 3, *sides)
        yield Case("check_finite_", name, partial(_check_finite, (6, 3, *sides)))
        yield Case("descent_", name, partial(_descent, shape, False), exact=False)
        yield Case("descent_", f"{name}, normalised", partial(_descent, shape, True), exact=False)
        average, mean = (0.9, "mean") if name == "wide" else (0.0, "no mean")
        yield Case("adam_", f"{name}, {mean}", partial(_adam, shape, average), exact=False)
        yield Case("lbfgs_", f"{name}, {mean}", partial(_lbfgs, (6, 3, *sides), average), exact=False)
    if not large:
        return
    yield Case("check_finite_", "two tiles in a part", partial(_check_finite, (2, 3, *TWO_TILES_A_PART)))
    yield Case("descent_", "many values", partial(_descent, (1, 3, *MANY_WIDE), False), exact=False)
    shape = (1, 3, *MANY_ONE_BY_ONE)
    yield Case("check_finite_", "many values one by one", partial(_check_finite, shape))
    yield Case("descent_", "many values one by one", partial(_descent, shape, True), exact=False)
    yield Case("adam_", "many values one by one", partial(_adam, shape, 0.0), exact=False)
    yield Case("lbfgs_", "many values one by one", partial(_lbfgs, shape, 0.0), exact=False)


def _check_finite(shape: tuple[int, ...]) -> tuple[Any, ...]:
    jobs = shape[0]
    terms, grad = _normal((5, jobs)), _normal(shape, seed=1)
    alive, diverged_at = torch.ones(jobs, dtype=torch.bool), torch.zeros(jobs, dtype=torch.int64)
    grad[0, 2, -1, -1] = NAN
    if jobs == 2:
        grad[1, 0, 0, 0] = NAN
    if jobs == 6:  # the last one is right
        terms[3, 1] = -torch.inf
        grad[2].view(-1)[1023] = torch.inf  # the last one of a tile
        grad[3], alive[3], diverged_at[3] = NAN, False, 2  # diverged before
        grad[4].view(-1)[256] = NAN  # a thread has it among others that are finite
    return terms, grad, alive, diverged_at, torch.arange(7, 7 + jobs)


def _images(shape: tuple[int, ...], average: float) -> tuple[Images, Tensor, Tensor, Tensor]:
    """Images, the gradient, the steps and ``alive``: the second of several jobs has diverged. It is
    not the last one, whose blocks, the last of a launch, would then have nothing to do. The steps are short enough that
    few values are clamped, which would hide errors."""
    image = 0.2 + 0.6 * _uniform(shape, seed=41)
    grad, alive = _normal(shape, seed=42), torch.ones(shape[0], dtype=torch.bool)
    grad[1:2, 0, 1, 1], alive[1:2] = NAN, False
    mean = _uniform(shape, seed=43) if average else None
    last_good = image - 0.1 * _normal(shape, seed=44)
    return (image, last_good, mean), grad, 0.05 * torch.arange(1.0, shape[0] + 1), alive


def _descent(shape: tuple[int, ...], normalised: bool) -> tuple[Any, ...]:
    average = 0.9 if normalised else 0.0
    images, grad, step, alive = _images(shape, average)
    if normalised:
        grad[2:3], step[2:3] = 0, 8  # the rate would be infinite
    else:
        grad[2:3, 0, 0, 1] = NAN
    return *images, grad, step, alive, average, normalised


def _adam(shape: tuple[int, ...], average: float) -> tuple[Any, ...]:
    images, grad, step, alive = _images(shape, average)
    count = torch.tensor([1, 30, 7, 5][: shape[0]])
    first, second = _normal(shape, seed=45), _uniform(shape, seed=46)
    for state, size in ((grad, 1e-7), (first, 1e-7), (second, 1e-14)):  # as of a loss that is a mean over pixels
        state[3:] *= size
        state[0, 0, 0, 0] = 0
    return *images, first, second, grad, step, count, alive, average


# Of the jobs of `_lbfgs`: how many pairs were ever written and how many gradients seen, as in `functional.lbfgs_`.
LBFGS_SEEN = [
    (PAIRS + 4, 6),  # the ring has wrapped around; one pair is not used
    (PAIRS + 4, 6),  # diverged
    (0, 1),  # before the first pair
    (0, 0),  # before the first gradient
    (PAIRS + 3, 0),  # at a new scale: the gradient forms no pair; the step is shorter than its limit
    (3, 4),  # a ring with free slots; the new pair has no positive curvature
]


def _lbfgs(shape: tuple[int, ...], average: float) -> tuple[Any, ...]:
    """The jobs of `LBFGS_SEEN`. A single job is before its first pair: pairs of a large image take the CPU 0.1 s."""
    images, grad, step, alive = _images(shape, average)
    pairs, jobs = PAIRS, shape[0]
    seen = torch.tensor(LBFGS_SEEN if jobs > 1 else LBFGS_SEEN[2:3]).T.contiguous()
    grad[3:5] *= 0.02
    history = torch.zeros(2, pairs, *shape)
    with_pairs = [b for b in range(jobs) if seen[0, b]]
    if with_pairs:
        s = 0.1 * _normal((pairs, len(with_pairs), *shape[1:]), seed=47)
        y = s * (1 + 2 * _uniform(tuple(s.shape), seed=48))
        y[6, :2] *= -1
        history[:, :, with_pairs] = torch.stack([s, y])
        history[:, 3:, 5:] = 0
    curvature = torch.ones(jobs, 1, 1, 1)
    curvature[5:] = -1
    before = grad.nan_to_num() - curvature * (images[0] - images[1]) - 0.2 * _normal(shape, seed=49)

    products = torch.zeros(jobs, 2 * pairs + 1, 2 * pairs + 1, dtype=torch.float64)
    if with_pairs:
        rows = history.flatten(3).double().flatten(0, 1).transpose(0, 1)  # [B, 2 P, values]
        products[:, :-1, :-1] = torch.bmm(rows, rows.mT)
    sy = products.diagonal(pairs, 1, 2)[:, :pairs]
    inverse = torch.where(sy > 0, 1 / sy, 0)
    scale = torch.where(seen[0] > 0, 0.5, 0.0).double()
    return *images, history, before, products, inverse, scale, seen, grad, step, alive, average


# Values ---------------------------------------------------------------------------------------------------------------


def _features(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, wide: bool = False) -> Tensor:
    """Integers, channels_last: from -1 to 2, so that a quarter each is masked, 0 and so masked, and an equal maximum of
    many; ``wide``: from -4 to 7, so that sums of their products need more bits than 16-bit floats have."""
    low, high = (-4, 7) if wide else (-1, 2)
    return _integers(shape, low, high, seed=seed).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def _symmetric(x: Tensor) -> Tensor:
    return x.triu() + x.triu(1).mT


def _integers(shape: tuple[int, ...], low: int, high: int, *, seed: int) -> Tensor:
    """float32 from ``low`` to ``high``."""
    return _uniform(shape, seed=seed).mul_(high + 1 - low).floor_().add_(low)


def _normal(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    return _random(torch.randn, shape, seed)


def _uniform(shape: tuple[int, ...], *, seed: int) -> Tensor:
    return _random(torch.rand, shape, seed)


def _random(make: Callable[..., Tensor], shape: tuple[int, ...], seed: int) -> Tensor:
    """The same values for every case, but from another start for every ``seed``: a million new ones take 10 ms."""
    start, n = seed * 331 % RANDOM_VALUES, math.prod(shape)
    return _values(make).repeat(-(-(start + n) // RANDOM_VALUES))[start : start + n].reshape(shape)


@cache
def _values(make: Callable[..., Tensor]) -> Tensor:
    """From a generator of their own, so that the process's random state stays as it is."""
    return make(RANDOM_VALUES, generator=torch.Generator().manual_seed(0))
