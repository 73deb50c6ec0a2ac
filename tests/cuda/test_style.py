"""The style kernels of csrc/cuda/style, in the emulator, against float64, and how `schedule` divides their work."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.support import emulated

SUM_ERROR = 1e-5
ROUNDING = 2.0**-8  # of bfloat16: of differences, gradients, and float16 features that are multiplied with a difference
MULTIPROCESSORS = 6  # of the emulated device (csrc/cuda/common/device_context.h)
ORDERS = (0, 1, 7)  # of blocks and warps

LAST = torch.channels_last
types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

# Every unit of work: less than one stage, stages and a rest, several slices of 512, 256 and 128 pixels. Features with
# other numbers of channels have no kernel and are computed with torch's library.
SHAPES = [
    (1, 64, 1, 1),
    (2, 64, 37, 29),
    (3, 128, 13, 7),
    (1, 128, 30, 31),
    (2, 256, 3, 11),
    (1, 256, 17, 29),
    (1, 512, 15, 23),
    (2, 512, 3, 5),
    (2, 96, 9, 7),
    (1, 3, 4, 5),
]


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated.library()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN: results, workspaces and, in the emulator, shared memory."""
    torch.use_deterministic_algorithms(True)  # makes torch.empty fill its result
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    emulated.order(0)


def relu_features(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).relu().to(dtype).contiguous(memory_format=LAST)


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).contiguous(memory_format=LAST)


def symmetric(batch: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    half = torch.randn(batch, channels, channels, generator=torch.Generator().manual_seed(seed))
    return (half + half.mT).to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@types
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(ops: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features = relu_features(shape, dtype)
    grams = []
    for order in ORDERS:
        emulated.order(order)
        grams.append(ops.gram(features, 0.25))
    assert grams[0].dtype == torch.float32 and torch.equal(grams[0], grams[0].mT)
    assert error(grams[0], reference.gram(features, 0.25)) < SUM_ERROR
    assert torch.equal(grams[1], grams[0]) and torch.equal(grams[2], grams[0])


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_every_pixel_and_every_pair_of_channels_counts_once(ops: Any, channels: int) -> None:
    # Small integers, whose sums are exact in float32 in any order. Each channel has a different pattern.
    pixels, c = torch.arange(701)[:, None], torch.arange(channels)[None]
    values = ((pixels * (2 * c + 1) + c * c // 7) % 5 - 2).to(torch.bfloat16)
    features = values.T.reshape(1, channels, 701, 1).contiguous(memory_format=LAST)
    assert torch.equal(ops.gram(features, 1.0).double(), reference.gram(features, 1.0))


@types
def test_style_fwd_of_many_layers_at_once(ops: Any, dtype: torch.dtype) -> None:
    # Nine layers have kernels and take two launches, two are computed with the library, one is copied to channels_last.
    sizes = [(64, 23, 31), (128, 9, 17), (512, 3, 7), (96, 5, 5), (256, 4, 9), (64, 4, 4), (64, 1, 2)]
    sizes += [(128, 2, 3), (3, 6, 6), (64, 3, 3), (64, 5, 2), (64, 2, 2)]
    features = [relu_features((2, *size), dtype, seed=l) for l, size in enumerate(sizes)]
    features[5] = features[5].contiguous()
    targets = [symmetric(2, f.shape[1], seed=l) for l, f in enumerate(features)]
    weights = torch.rand(2, len(sizes), generator=torch.Generator().manual_seed(2)).T  # not contiguous
    scales = [0.5 / (l + 1) for l in range(len(sizes))]
    results = []
    for order in ORDERS:
        emulated.order(order)
        results.append(ops.style_fwd(features, targets, weights, scales))
    losses, diffs = results[0]
    assert losses.shape == (len(sizes), 2) and losses.dtype == torch.float32
    for f, a, w, scale, loss, diff in zip(features, targets, weights, scales, losses, diffs, strict=True):
        difference = reference.gram(f, scale) - a.double()
        assert error(loss, w.double() * difference.square().sum((1, 2))) < SUM_ERROR
        assert diff.dtype == torch.bfloat16 and torch.equal(diff, diff.mT)
        assert error(diff, 4 * scale * w.double().view(-1, 1, 1) * difference) < ROUNDING
    for other_losses, other_diffs in results[1:]:
        assert torch.equal(other_losses, losses)
        assert all(torch.equal(a, b) for a, b in zip(other_diffs, diffs, strict=True))


@types
def test_persistent_blocks_compute_the_same_bits(ops: Any, dtype: torch.dtype) -> None:
    """Of all units of work, with more items than the emulated device has multiprocessors."""
    features = [relu_features((3, c, *s), dtype, seed=c) for c, s in ((64, (33, 31)), (128, (9, 17)), (256, (5, 9)))]
    features += [relu_features((3, 512, 6, 7), dtype, seed=s) for s in (1, 2)]
    targets = [symmetric(3, f.shape[1], seed=l) for l, f in enumerate(features)]
    weights, scales = torch.rand(5, 3, generator=torch.Generator().manual_seed(2)), [0.5 / (l + 1) for l in range(5)]
    losses, diffs = ops.style_fwd(features, targets, weights, scales, False)
    for order in ORDERS:
        emulated.order(order)
        other_losses, other_diffs = ops.style_fwd(features, targets, weights, scales, True)
        assert torch.equal(other_losses, losses)
        assert all(torch.equal(a, b) for a, b in zip(other_diffs, diffs, strict=True))


def test_layers_of_both_types_in_one_call(ops: Any) -> None:
    features = [relu_features((1, 64, 9, 9), dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    targets = [symmetric(1, 64)] * 3
    losses, diffs = ops.style_fwd(features, targets, torch.ones(3, 1), [1.0] * 3)
    assert [d.dtype for d in diffs] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for f, loss in zip(features, losses, strict=True):
        assert error(loss, (reference.gram(f, 1.0) - targets[0].double()).square().sum((1, 2))) < SUM_ERROR


def test_style_loss_is_style_fwd_of_one_layer(ops: Any) -> None:
    features, target = relu_features((2, 64, 9, 9), torch.float16), symmetric(2, 64)
    loss, diff = ops.style_loss(features, target, 0.5, 0.1)
    losses, diffs = ops.style_fwd([features], [target], torch.full((1, 2), 0.5), [0.1])
    assert torch.equal(loss, losses[0]) and torch.equal(diff, diffs[0])


def test_a_weight_of_zero_is_neither_loss_nor_gradient(ops: Any) -> None:
    features = relu_features((2, 64, 9, 9), torch.float16)
    losses, (diff,) = ops.style_fwd([features], [symmetric(2, 64)], torch.tensor([[0.0, 1.0]]), [1.0])
    assert losses[0, 0] == 0 and not diff[0].any() and losses[0, 1] > 0 and diff[1].any()


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_jobs_of_a_batch_do_not_mix(ops: Any, channels: int) -> None:
    shape = (1, channels, 23, 37) if channels < 512 else (1, channels, 15, 10)
    alone = relu_features(shape, torch.float16)
    broken = relu_features(shape, torch.float16, seed=9)
    broken[0, 5, 3, 3] = float("nan")
    batch = torch.cat([broken, alone, broken]).contiguous(memory_format=LAST)
    targets, weights = symmetric(3, channels), torch.tensor([[0.5, 0.25, 2.0]])
    losses, (diff,) = ops.style_fwd([batch], [targets], weights, [0.1])
    losses_alone, (diff_alone,) = ops.style_fwd([alone], [targets[1:2]], weights[:, 1:2], [0.1])
    assert torch.equal(losses[:, 1:2], losses_alone) and torch.equal(diff[1:2], diff_alone)
    assert losses[0, [0, 2]].isnan().all() and diff[0, 5].isnan().all() and diff[2, :, 5].isnan().all()
    assert diff[0].isnan().sum() == 2 * channels - 1

    grad = noise(batch.shape)
    grad_alone = grad[1:2].clone()
    ops.style_bwd_(grad, batch, diff, True)
    ops.style_bwd_(grad_alone, alone, diff_alone, True)
    assert torch.equal(grad[1:2], grad_alone) and not grad_alone.isnan().any()
    assert grad[0, :, 3, 3][(broken[0, :, 3, 3] > 0) | broken[0, :, 3, 3].isnan()].isnan().all()


@types
@pytest.mark.parametrize("relu_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("size", [1.0, 1e-9], ids=["diff of 1", "diff of 1e-9"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_style_bwd(ops: Any, shape: tuple[int, ...], dtype: torch.dtype, relu_mask: bool, size: float) -> None:
    features = relu_features(shape, dtype)
    before = noise(shape) * size  # bfloat16 represents a gradient of 1e-9 as precisely as one of 1
    diff = (symmetric(shape[0], shape[1]) * size).bfloat16()
    expected = reference.style_bwd(before, features, diff, relu_mask)
    results = []
    for order in ORDERS if size == 1 and relu_mask else ORDERS[:1]:
        emulated.order(order)
        grad = before.clone()
        ops.style_bwd_(grad, features, diff, relu_mask)
        results.append(grad)
    assert error(results[0], expected) < ROUNDING
    assert not relu_mask or not results[0][features <= 0].any()
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("channels", [64, 128, 512])
def test_the_mask_does_not_hide_nan(ops: Any, channels: int) -> None:
    features, grad = relu_features((1, channels, 3, 5), torch.float16), noise((1, channels, 3, 5))
    features[0, 4, 1, 1] = features[0, channels - 3, 2, 2] = float("nan")
    diff = symmetric(1, channels, torch.bfloat16)
    expected = reference.style_bwd(grad, features, diff, True)
    ops.style_bwd_(grad, features, diff, True)
    assert expected.isnan().any() and torch.equal(grad.isnan(), expected.isnan())


def test_style_bwd_of_a_float16_gradient(ops: Any) -> None:
    features, grad = relu_features((2, 64, 5, 7), torch.float16), noise((2, 64, 5, 7), torch.float16)
    diff = symmetric(2, 64, torch.bfloat16)
    expected = reference.style_bwd(grad, features, diff, True)
    ops.style_bwd_(grad, features, diff, True)
    assert error(grad, expected) < 2.0**-11


@types
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
def test_style_bwd_without_a_difference_masks(ops: Any, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for grad_type in (torch.bfloat16, dtype):
        features = relu_features((2, 5, 31, 29), dtype).contiguous(memory_format=layout)
        features[0, 0, 0, 0] = float("nan")
        grad = noise((2, 5, 31, 29), grad_type).contiguous(memory_format=layout)
        expected = torch.where(features <= 0, 0, grad)
        unmasked = grad.clone()
        ops.style_bwd_(unmasked, features, None, False)
        assert torch.equal(unmasked, grad)
        ops.style_bwd_(grad, features, None, True)
        assert torch.equal(grad, expected) and grad[0, 0, 0, 0] != 0


def test_arguments_in_other_layouts_and_at_odd_addresses(ops: Any) -> None:
    wide = relu_features((2, 64, 7, 20), torch.float16)
    odd = torch.empty(2 * 7 * 9 * 64 + 1, dtype=torch.float16)[1:].view(2, 7, 9, 64).permute(0, 3, 1, 2)
    odd.copy_(wide[..., :9])
    diff = symmetric(2, 64, torch.bfloat16)
    shifted = torch.empty(diff.numel() + 1, dtype=torch.bfloat16)[1:].view(2, 64, 64).copy_(diff)
    for features in (wide[..., :9], wide[..., ::2], wide.contiguous(), odd):
        assert error(ops.gram(features, 1.0), reference.gram(features, 1.0)) < SUM_ERROR
        for mine in (noise((*features.shape[:3], 2 * features.shape[3]))[..., ::2], noise(features.shape).contiguous()):
            for any_diff in (diff, shifted, None):
                grad = mine.clone(memory_format=torch.preserve_format)
                expected = reference.style_bwd(grad, features, any_diff, True)
                ops.style_bwd_(grad, features, any_diff, True)
                assert error(grad, expected) < ROUNDING


@types
@pytest.mark.parametrize("channels", [64, 3])
def test_gradients_for_autograd(ops: Any, dtype: torch.dtype, channels: int) -> None:
    features = relu_features((2, channels, 5, 7), dtype)
    diff, by = symmetric(2, channels, torch.bfloat16), torch.tensor([0.3, 2.0])
    product = torch.einsum("bij,bjhw->bihw", diff.double() * by.double().view(-1, 1, 1), features.double())
    got = ops.style_bwd(features, diff, by)
    assert got.dtype == dtype and got.stride() == features.stride() and error(got, product) < ROUNDING
    outer = symmetric(2, channels)
    product = 2 * 0.5 * torch.einsum("bij,bjhw->bihw", outer.double(), features.double())
    got = ops.gram_bwd(outer, features, 0.5)
    assert got.dtype == dtype and got.stride() == features.stride() and error(got, product) < ROUNDING


def test_wrong_arguments_are_refused(ops: Any) -> None:
    features = relu_features((2, 64, 3, 3), torch.float16)
    with pytest.raises(RuntimeError, match=r"style_bwd_: diff must be BFloat16 for features of Half, got Float"):
        ops.style_bwd_(noise(features.shape), features, symmetric(2, 64), True)
    with pytest.raises(RuntimeError, match=r"style_bwd_: grad must be Half or BFloat16 .* got Float"):
        ops.style_bwd_(features.float(), features, None, True)


# How the work is divided
# ----------------------------------------------------------------------------------------------------------------

SCHEDULE = """
#include "cuda/style/style.h"
extern "C" void schedule(int count, int jobs, const int64_t* pixels, const int* channels, int multiprocessors,
                         int64_t* cut) {
  gramophone::StyleLaunch launch;
  launch.count = count, launch.jobs = jobs;
  for (int l = 0; l < count; ++l) launch.layers[l].pixels = pixels[l], launch.layers[l].channels = channels[l];
  gramophone::schedule(launch, multiprocessors, false);
  for (int l = 0; l < count; ++l) {
    const auto& layer = launch.layers[l];
    for (int64_t x : {int64_t{layer.slice_pixels}, int64_t{layer.slices}, int64_t{layer.first_item},
                      int64_t{layer.first_band}, layer.first_tile})
      *cut++ = x;
  }
  for (int64_t x : {int64_t{launch.items}, int64_t{launch.bands}, launch.tiles}) *cut++ = x;
}
"""


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`schedule` of style.h: ((pixels, channels) per layer, jobs, multiprocessors) -> 5 numbers per layer, totals."""
    if emulated.ON_GPU:
        pytest.skip("code of the host, which the tests on the emulator cover")
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "schedule.cpp").write_text(SCHEDULE)
    includes = [f"-I{emulated.ROOT / path}" for path in ("csrc", "tests/emulator")]
    command = ["c++", "-std=c++17", "-shared", "-fPIC", "-DGRAMOPHONE_EMULATED", "-Wno-unknown-pragmas", *includes]
    subprocess.run([*command, "schedule.cpp", "-o", "schedule.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "schedule.so"))

    def run(layers: list[tuple[int, int]], jobs: int, multiprocessors: int) -> tuple[list[list[int]], list[int]]:
        n = len(layers)
        cut = (ctypes.c_int64 * (5 * n + 3))()
        pixels, channels = (ctypes.c_int64 * n)(*(p for p, _ in layers)), (ctypes.c_int * n)(*(c for _, c in layers))
        library.schedule(n, jobs, pixels, channels, multiprocessors, cut)
        return [list(cut[5 * l : 5 * l + 5]) for l in range(n)], list(cut[5 * n :])

    return run


def vgg_layers(side: int) -> list[tuple[int, int]]:
    return [((side >> l) ** 2, channels) for l, channels in enumerate((64, 128, 256, 512, 512))]


@pytest.mark.parametrize("multiprocessors", [MULTIPROCESSORS, 84, 108, 132])
@pytest.mark.parametrize("layers", [*map(vgg_layers, (16, 250, 512, 1024, 3000, 8192)), [(1, 512)], [(10**9, 64)]])
def test_every_pixel_is_in_one_slice(schedule: Any, layers: list[tuple[int, int]], multiprocessors: int) -> None:
    cut, (items, bands, tiles) = schedule(layers, 1, multiprocessors)
    next_item = next_band = next_tile = 0
    least = 0
    for (pixels, channels), (slice_pixels, slices, first_item, first_band, first_tile) in zip(layers, cut, strict=True):
        units, side = 4 if channels == 512 else 1, channels // 64
        assert (slices - 1) * slice_pixels < pixels <= slices * slice_pixels  # no slice is empty or missing
        assert slice_pixels <= 16384 and slice_pixels % max(32, 8192 // channels) == 0
        assert (first_item, first_band, first_tile) == (next_item, next_band, next_tile)
        next_item += slices * units
        next_band += 16 * side * (side + 1) // 2
        next_tile += slices * side * (side + 1) // 2
        least += -(-pixels // 16384) * units
    assert (items, bands, tiles) == (next_item, next_band, next_tile)
    assert items <= -(-least // multiprocessors) * multiprocessors  # no additional round of blocks
    # Items cost about the same: none more than 1.5 times the mean.
    work = [min(channels, 256) * slice_pixels for (_, channels), (slice_pixels, *_) in zip(layers, cut, strict=True)]
    total = sum(
        w * slices * (4 if c == 512 else 1) for w, (_, c), (_, slices, *_) in zip(work, layers, cut, strict=True)
    )
    assert max(work) <= max(1.5 * total / min(items, multiprocessors), 65536)


def test_a_batch_does_not_change_the_slices_of_a_job(schedule: Any) -> None:
    layers = vgg_layers(512)
    one, (items, bands, tiles) = schedule(layers, 1, 132)
    five, totals = schedule(layers, 5, 132)
    assert [c[:2] for c in five] == [c[:2] for c in one]
    assert totals == [5 * items, 5 * bands, 5 * tiles]
    assert 0.85 * 132 <= items <= 132  # a job fills an H200
