"""The steps of the optimisers, through torch's library; see `functional`."""

from __future__ import annotations

import torch
from torch import Tensor

from gramophone_server.ops.library.tensors import per_job

__all__ = [
    "PAIRS",
    "adam_",
    "check_finite_",
    "descent_",
    "lbfgs_",
]

# The constants of csrc/optimiser_math.h.
ADAM_BETAS = (0.9, 0.99)
ADAM_EPSILON = 1e-16
PAIRS = 10  # of L-BFGS
MIN_CURVATURE = 1e-6
FLOAT_MIN, FLOAT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_finite_(terms: Tensor, grad: Tensor, alive: Tensor, diverged_at: Tensor, count: Tensor) -> None:
    """See `functional.check_finite_`."""
    good = grad.isfinite().flatten(1).all(1) & terms.isfinite().all(0)
    count += 1
    diverged_at.copy_(torch.where(alive & ~good, count, diverged_at))
    alive &= good


def descent_(
    image: Tensor,
    last_good: Tensor,
    mean: Tensor | None,
    grad: Tensor,
    step: Tensor,
    alive: Tensor,
    average: float,
    normalised: bool,
) -> None:
    """See `functional.descent_`."""
    rate = step
    if normalised:
        squares = grad.double().square().flatten(1).sum(1)
        rate = _finite(step / _root_mean_square(squares, grad[0].numel())).to(step.dtype)
    _move_(image, last_good, mean, image - per_job(rate) * grad, alive, average)


def adam_(
    image: Tensor,
    last_good: Tensor,
    mean: Tensor | None,
    first: Tensor,
    second: Tensor,
    grad: Tensor,
    step: Tensor,
    count: Tensor,
    alive: Tensor,
    average: float,
) -> None:
    """See `functional.adam_`."""
    live, (beta_1, beta_2) = per_job(alive), ADAM_BETAS
    first.copy_(torch.where(live, first + (1 - beta_1) * (grad - first), first))
    second.copy_(torch.where(live, beta_2 * second + (1 - beta_2) * grad.square(), second))
    unbias_1, unbias_2 = (1 - torch.pow(beta, count.double()) for beta in ADAM_BETAS)
    rate, unbias = (per_job(_finite(x).to(step.dtype)) for x in (step / unbias_1, 1 / unbias_2))
    proposal = image - rate * first / ((second * unbias).sqrt_().add_(ADAM_EPSILON))
    _move_(image, last_good, mean, proposal, alive, average)


def lbfgs_(
    image: Tensor,
    last_good: Tensor,
    mean: Tensor | None,
    history: Tensor,
    before: Tensor,
    products: Tensor,
    inverse: Tensor,
    scale: Tensor,
    seen: Tensor,
    grad: Tensor,
    step: Tensor,
    alive: Tensor,
    average: float,
) -> None:
    """See `functional.lbfgs_`, and csrc/optimiser_math.h for the method."""
    forms = alive & (seen[1] > 0)  # whether the gradient forms a pair with the one before it
    newest = seen[0] % PAIRS  # the slot of that pair
    _add_pair_(history, forms, newest, (image - last_good, grad - before))
    before.copy_(torch.where(per_job(alive), grad, before))

    current = _with_products(products, history, grad, forms, newest)
    products.copy_(torch.where(alive.view(-1, 1, 1), current, products))
    ss, sy, yy = (
        _entry(current, newest + row, newest + column) for row, column in ((0, 0), (0, PAIRS), (PAIRS, PAIRS))
    )
    good = sy > MIN_CURVATURE * (ss * yy).sqrt()
    is_newest = torch.arange(PAIRS, device=image.device) == newest[:, None]
    inverse.copy_(torch.where(forms[:, None] & is_newest, torch.where(good, 1 / sy, 0)[:, None], inverse))
    scale.copy_(torch.where(forms & good, sy / yy, scale))

    weight = _direction(current, inverse, scale, seen[0], forms)
    square = (weight * torch.bmm(current, weight[:, :, None])[:, :, 0]).sum(1)
    longest = step / _root_mean_square(square, image[0].numel())
    rate = torch.where(scale > 0, longest.clamp_max(1), longest)  # without curvature the length has no meaning
    weight = _finite(-rate[:, None] * weight).to(image.dtype)
    change = per_job(weight[:, 2 * PAIRS]) * grad
    for slot in range(PAIRS):
        change.addcmul_(per_job(weight[:, slot]), history[0, slot])
        change.addcmul_(per_job(weight[:, PAIRS + slot]), history[1, slot])
    seen[0] += forms
    seen[1] += alive
    _move_(image, last_good, mean, change.add_(image), alive, average)


def _add_pair_(history: Tensor, forms: Tensor, newest: Tensor, pair: tuple[Tensor, Tensor]) -> None:
    """Writes s and y into each job's slot ``newest`` of the history, if it ``forms`` a pair."""
    slots = (newest, torch.arange(len(newest), device=newest.device))
    for vectors, vector in zip(history, pair, strict=True):
        vectors.index_put_(slots, torch.where(per_job(forms), vector, vectors[slots]))


def _with_products(products: Tensor, history: Tensor, grad: Tensor, forms: Tensor, newest: Tensor) -> Tensor:
    """``products`` with the inner products of the newest pair and of ``grad`` with all vectors; see `lbfgs_`."""
    slots = (newest, torch.arange(len(newest), device=newest.device))
    fresh = torch.stack([*(vectors[slots].flatten(1) for vectors in history), grad.flatten(1)], 1).double()
    rows = torch.zeros_like(products[:, :3])  # of the newest s and y, and of the gradient
    for slot in range(PAIRS):
        dots = torch.bmm(fresh, history[:, slot].flatten(2).permute(1, 2, 0).double())  # [B, 3, 2]
        rows[:, :, slot], rows[:, :, PAIRS + slot] = dots[:, :, 0], dots[:, :, 1]
    rows[:, 2, 2 * PAIRS] = fresh[:, 2].square().sum(1)
    for row, values in ((newest, rows[:, 0]), (newest + PAIRS, rows[:, 1])):
        products = torch.where(forms.view(-1, 1, 1), _with_row(products, row, values), products)
    return _with_row(products, torch.full_like(newest, 2 * PAIRS), rows[:, 2])


def _with_row(products: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """The symmetric ``products`` [B, V, V] with ``values`` [B, V] in row and column ``row`` [B]."""
    here = torch.arange(products.shape[1], device=row.device) == row[:, None]
    products = torch.where(here[:, :, None], values[:, None, :], products)
    return torch.where(here[:, None, :], values[:, :, None], products)


def _entry(products: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return products[torch.arange(len(row), device=row.device), row, column]


def _direction(products: Tensor, inverse: Tensor, scale: Tensor, pairs: Tensor, forms: Tensor) -> Tensor:
    """The direction of L-BFGS as weights of the vectors, float64 [B, V]: the two loops of the recursion."""
    vectors = products.shape[1]
    weight = torch.zeros_like(products[:, 0])
    weight[:, 2 * PAIRS] = 1
    along = products[:, 2 * PAIRS].clone()  # inner product of each vector with the direction so far
    held = (pairs + forms).clamp_max(PAIRS)
    latest = pairs + forms - 1

    def slot(age: int) -> tuple[Tensor, Tensor, Tensor]:
        """The slot [B, 1] of the pair of this age, 0 for the newest; its inverse; whether it is used."""
        at = ((latest - age) % PAIRS)[:, None]
        of_pair = inverse.gather(1, at)
        return at, of_pair, (age < held)[:, None] & (of_pair > 0)

    def add_(vector: Tensor, amount: Tensor, used: Tensor) -> None:
        column = products.gather(2, vector[:, :, None].expand(-1, vectors, 1))[:, :, 0]
        along.copy_(torch.where(used, along + amount * column, along))
        weight.scatter_(1, vector, torch.where(used, amount, weight.gather(1, vector)))

    alphas = []
    for age in range(PAIRS):
        at, of_pair, used = slot(age)
        alphas.append(of_pair * along.gather(1, at))
        add_(at + PAIRS, -alphas[-1], used)
    stretch = torch.where(scale > 0, scale, 1)[:, None]
    weight *= stretch
    along *= stretch
    for age in reversed(range(PAIRS)):
        at, of_pair, used = slot(age)
        add_(at, alphas[age] - of_pair * along.gather(1, at + PAIRS), used)
    return weight


def _move_(
    image: Tensor, last_good: Tensor, mean: Tensor | None, proposal: Tensor, alive: Tensor, average: float
) -> None:
    """The end of every step; see `functional.descent_`."""
    live = per_job(alive)
    before = torch.where(live, image, last_good)
    image.copy_(torch.where(live, proposal.clamp_(0, 1), last_good))
    last_good.copy_(before)
    if mean is not None:
        mean.mul_(average).add_(image, alpha=1 - average)


def _root_mean_square(squares: Tensor, values: int) -> Tensor:
    """The root of a mean from the sum of squares; at least the smallest normal float32, so that it can be a divisor."""
    return (squares.clamp_min(0) / values).sqrt().clamp_min(FLOAT_MIN)


def _finite(x: Tensor) -> Tensor:
    """``x`` limited to the range of float32, so that 0 times the result is 0."""
    return x.clamp(-FLOAT_MAX, FLOAT_MAX)
