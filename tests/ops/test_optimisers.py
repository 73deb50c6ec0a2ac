"""check_finite_, descent_, adam_ and lbfgs_ on the CPU, against slow float64 versions written from the papers.

Also their registration with torch and their argument checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone_server import ops
from tests.support.kernel_cases import by_kernels_and_library
from tests.support.optimiser_states import PAIRS, all_alive, empty_lbfgs_state, normal, random_images, step_sizes

# Part of a tile of 1024 values; several tiles and a rest; odd sides; parts of two tiles.
SHAPES = [(1, 3, 2, 2), (2, 3, 20, 22), (3, 3, 31, 33), (1, 3, 296, 300)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def clamped(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def per_job(x: Tensor) -> Tensor:
    return x.double().view(-1, 1, 1, 1)


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean((1, 2, 3), keepdim=True).sqrt()


@by_kernels_and_library
@shapes
@pytest.mark.parametrize("normalised", [False, True])
def test_descent_is_the_formula(shape: tuple[int, ...], normalised: bool) -> None:
    image, last_good, mean = random_images(shape)
    grad, step = 10 * normal(4, shape), step_sizes(shape[0])
    direction = grad / rms(grad) if normalised else grad.double()
    expected = clamped(image - per_job(step) * direction)
    expected_mean = 0.9 * mean.double() + 0.1 * expected
    before = image.clone()
    ops.descent_(image, last_good, mean, grad, step, all_alive(shape[0]), 0.9, normalised)
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=1e-6)
    assert torch.equal(last_good, before)
    assert ((image == 0) | (image == 1)).any() or normalised


@by_kernels_and_library
@shapes
def test_adam_is_the_formula(shape: tuple[int, ...]) -> None:
    image, last_good, _ = random_images(shape)
    first, second, step = torch.zeros(shape), torch.zeros(shape), step_sizes(shape[0])
    m, v, x = first.double(), second.double(), image.double()
    for t in (1, 2, 3, 4):
        grad = 1e-7 * normal(t, shape)
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad.double() ** 2
        x = clamped(x - per_job(step) * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-16))
        count = torch.full((shape[0],), t)
        ops.adam_(image, last_good, None, first, second, grad, step, count, all_alive(shape[0]), 0.0)
        torch.testing.assert_close(image.double(), x, rtol=0, atol=2e-6)


@by_kernels_and_library
def test_adam_corrects_the_bias_of_each_job_by_its_own_count() -> None:
    shape = (3, 3, 4, 4)
    grad, counts = normal(4, shape), torch.tensor([1, 30, 100000])
    moment, square = 0.1 * torch.ones(shape), torch.ones(shape)
    image, last_good, _ = random_images(shape)
    image.fill_(0.5)
    ops.adam_(image, last_good, None, moment, square, grad, torch.full((3,), 0.01), counts, all_alive(3), 0.0)
    unbiased = [(1 - 0.9**t) / (1 - 0.99**t) ** 0.5 for t in counts.tolist()]
    expected = 0.5 - 0.01 * moment / square.sqrt() / per_job(torch.tensor(unbiased))
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)


class ReferenceLbfgs:
    """L-BFGS of one job as in Nocedal (1980), in float64 on lists, with the rules of `optimisers.LBFGS`."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, bool]] = []
        self.scale: float | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    def step(self, image: Tensor, grad: Tensor, step: float) -> Tensor:
        x, g = image.double().flatten(), grad.double().flatten()
        if self.last is not None:
            s = (image - self.last[0]).double().flatten()  # rounded as in the op
            y = (grad - self.last[1]).double().flatten()
            good = bool(s @ y > 1e-6 * s.norm() * y.norm())
            self.pairs = [*self.pairs, (s, y, good)][-PAIRS:]
            if good:
                self.scale = float(s @ y / (y @ y))
        self.last = image.clone(), grad.clone()
        q, alphas = g.clone(), []
        for s, y, good in reversed(self.pairs):
            alpha = (s @ q) / (s @ y) if good else torch.zeros(())
            q = q - alpha * y
            alphas.append(alpha)
        q = q * (self.scale or 1.0)
        for (s, y, good), alpha in zip(self.pairs, reversed(alphas), strict=True):
            if good:
                q = q + (alpha - (y @ q) / (s @ y)) * s
        longest = step / float(q.square().mean().sqrt())
        return clamped(x - (min(longest, 1.0) if self.scale else longest) * q).view(image.shape)


@by_kernels_and_library
@shapes
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e12])
def test_lbfgs_matches_the_reference(shape: tuple[int, ...], size: float) -> None:
    """Until the ring of pairs has wrapped around, with steps that are shortened and pairs that are not used."""
    image, last_good, mean = random_images(shape)
    state, step = empty_lbfgs_state(shape), step_sizes(shape[0], 0.003)
    references = [ReferenceLbfgs() for _ in range(shape[0])]
    curve = size * 10 ** (1.5 * torch.rand(shape, generator=torch.Generator().manual_seed(9)))
    grad, unused = torch.zeros(shape), 0
    for i in range(2 * PAIRS + 4):
        if i % 8 == 5:  # opposite to the last change of the image: negative curvature
            grad = grad - size * (image - last_good)
        else:
            grad = curve * (image - 0.5) + 1e-3 * size * normal(i, shape)
        if i >= 8:
            step.fill_(10.0)  # too large to shorten a step
        jobs = zip(references, image, grad, step.tolist(), strict=True)
        expected = torch.stack([reference.step(x, g, length) for reference, x, g, length in jobs])
        ops.lbfgs_(image, last_good, mean, *state, grad, step, all_alive(shape[0]), 0.9)
        unused += sum(not reference.pairs[-1][2] for reference in references if reference.pairs)
        torch.testing.assert_close(image.double(), expected, rtol=0, atol=3e-6)
    assert 0 < unused < PAIRS * shape[0]
    assert state[-1].tolist() == [[2 * PAIRS + 3] * shape[0], [2 * PAIRS + 4] * shape[0]]


@by_kernels_and_library
def test_check_finite_stops_the_jobs_that_are_not_finite() -> None:
    shape = (5, 3, 40, 41)
    grad, terms = 1e30 * normal(1, shape), 1e30 * normal(2, (7, 5))  # their squares are beyond float32
    grad[1, 2, 39, 40], grad[2, 0, 0, 0], terms[3, 3], terms[0, 4] = torch.nan, -torch.inf, torch.nan, torch.inf
    alive = torch.tensor([True, True, True, True, False])
    diverged_at, count = torch.tensor([0, 0, 0, 0, 2]), torch.tensor([6, 7, 8, 9, 10])
    ops.check_finite_(terms, grad, alive, diverged_at, count)
    assert count.tolist() == [7, 8, 9, 10, 11]
    assert alive.tolist() == [True, False, False, False, False]
    assert diverged_at.tolist() == [0, 8, 9, 10, 2]


def arguments(op: str) -> tuple[Any, ...]:
    shape = (2, 3, 5, 6)
    image, last_good, mean = random_images(shape)
    grad, step, alive = normal(1, shape), step_sizes(2), all_alive(2)
    count = torch.ones(2, dtype=torch.int64)
    match op:
        case "check_finite_":
            return normal(2, (4, 2)), grad, alive, torch.zeros(2, dtype=torch.int64), count
        case "descent_":
            return image, last_good, mean, grad, step, alive, 0.9, True
        case "adam_":
            return image, last_good, mean, torch.zeros(shape), torch.ones(shape), grad, step, count, alive, 0.9
        case _:
            return image, last_good, mean, *empty_lbfgs_state(shape), grad, step, alive, 0.9


OPS = ("check_finite_", "descent_", "adam_", "lbfgs_")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("default")
def test_registration(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.gramophone, op).default, arguments(op))


@pytest.mark.parametrize("op", OPS[1:])
def test_results_do_not_depend_on_the_number_of_threads(op: str) -> None:
    shape, results = (2, 3, 200, 301), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            image, last_good, mean = random_images(shape)
            state = {
                "descent_": (),
                "adam_": (torch.zeros(shape), torch.zeros(shape)),
                "lbfgs_": empty_lbfgs_state(shape),
            }[op]
            counts = (torch.ones(2, dtype=torch.int64),) if op == "adam_" else ()
            last = (True,) if op == "descent_" else ()
            for i in range(3):
                getattr(ops, op)(
                    image, last_good, mean, *state, normal(i, shape), step_sizes(2), *counts, all_alive(2), 0.9, *last
                )
            results.append(image)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def with_argument(op: str, index: int, value: Any) -> Callable[[], None]:
    changed = list(arguments(op))
    changed[index] = value
    return lambda: getattr(ops, op)(*changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            with_argument("check_finite_", 0, torch.zeros(4, 3)),
            r"check_finite_: terms must be contiguous float32 \[T, 2\]",
        ),
        (
            with_argument("check_finite_", 1, torch.zeros(2, 4, 5, 6)),
            r"check_finite_: grad must be contiguous float32 \[B, 3, H, W\]",
        ),
        (with_argument("check_finite_", 4, torch.zeros(2)), r"check_finite_: count must be contiguous Long \[2\]"),
        (with_argument("descent_", 0, torch.zeros(2, 3, 5, 6).double()), r"descent_: image must be contiguous float32"),
        (with_argument("descent_", 3, torch.zeros(2, 3, 6, 5).mT), r"descent_: grad must be contiguous Float"),
        (with_argument("descent_", 4, torch.zeros(1)), r"descent_: step must be contiguous Float \[2\]"),
        (with_argument("adam_", 4, torch.zeros(2, 3, 5, 5)), r"adam_: second must be contiguous Float \[2, 3, 5, 6\]"),
        (with_argument("adam_", 8, torch.ones(2)), r"adam_: alive must be contiguous Bool \[2\]"),
        (
            with_argument("lbfgs_", 3, torch.zeros(2, 9, 2, 3, 5, 6)),
            r"lbfgs_: history must be contiguous Float \[2, 10",
        ),
        (
            with_argument("lbfgs_", 8, torch.zeros(2, dtype=torch.int64)),
            r"lbfgs_: seen must be contiguous Long \[2, 2\]",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments_are_refused(call: Callable[[], None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_an_image_may_not_be_its_own_last_good_image() -> None:
    image, _, mean = random_images((2, 3, 5, 6))
    with pytest.raises(RuntimeError, match="last_good and image must not share memory"):
        ops.descent_(image, image, mean, image.clone(), step_sizes(2), all_alive(2), 0.9, True)
