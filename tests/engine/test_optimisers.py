"""Optimisers over several steps, per job and in place. tests/ops/test_optimisers.py has the formulas of one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser
from gramophone_server import ops
from gramophone_server.engine.optimisers import (
    LBFGS,
    Adam,
    Canvas,
    Descent,
    SlotTensors,
    Stepper,
    make_stepper,
    resampled_state,
)

SHAPE = (2, 3, 4, 5)
ZERO = torch.zeros(SHAPE)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def new_canvas(image: Tensor, *step: float, average: float = 0.0) -> Canvas:
    jobs = image.shape[0]
    return Canvas(
        image=image.clone(),
        last_good=image.clone(),
        mean=torch.zeros_like(image) if average else None,
        average=average,
        step=torch.tensor(step if len(step) == jobs else step * jobs),
        count=torch.zeros(jobs, dtype=torch.int64),
        alive=torch.ones(jobs, dtype=torch.bool),
        diverged_at=torch.zeros(jobs, dtype=torch.int64),
    )


def grey(seed: int, *shape: int, spread: float = 0.1) -> Tensor:
    """Values around 0.5, so that no step is clamped to [0, 1]."""
    return 0.5 + spread * random(seed, *shape).clamp(-3, 3)


def step(canvas: Canvas, stepper: Stepper, grad: Tensor) -> Tensor:
    """One step as the engine makes it; returns the change of the image."""
    before = canvas.image.clone()
    ops.check_finite_(torch.zeros(1, grad.shape[0]), grad, canvas.alive, canvas.diverged_at, canvas.count)
    stepper.step_(grad)
    return canvas.image - before


def carry(optimiser: Optimiser, coarser: Stepper, finer: Stepper) -> None:
    """Carries the state of both jobs over to 8 x 10 px."""
    for index in range(2):
        state: SlotTensors = resampled_state(optimiser, coarser.slot(index), 8, 10)
        for name, tensor in state.items():
            finer.slot(index)[name].copy_(tensor)


def stretched() -> Tensor:
    """A positive definite matrix with condition number 1000."""
    n = 60
    q, _ = torch.linalg.qr(random(3, n, n))
    return (q * torch.logspace(0, 3, n)) @ q.T


def slope(canvas: Canvas, hessian: Tensor) -> Tensor:
    """The gradient of 1/2 (x - 1/2)^T H (x - 1/2)."""
    return torch.matmul((canvas.image - 0.5).flatten(1), hessian).view(canvas.image.shape)


def test_gradient_descent_is_that_of_the_textbook() -> None:
    canvas, grad = new_canvas(grey(1), 0.01, 0.1), random(2)
    moved = step(canvas, Descent(canvas, normalised=False), grad)
    torch.testing.assert_close(moved, torch.stack([-0.01 * grad[0], -0.1 * grad[1]]), rtol=1e-4, atol=1e-7)


def test_normalised_descent_moves_by_its_step_for_a_gradient_of_any_size() -> None:
    canvas, grad = new_canvas(grey(1), 0.01, 0.03), random(2) * torch.tensor([1e-12, 1e30]).view(2, 1, 1, 1)
    moved = step(canvas, Descent(canvas, normalised=True), grad)
    torch.testing.assert_close(moved.square().mean((1, 2, 3)).sqrt(), canvas.step, rtol=1e-4, atol=0)
    torch.testing.assert_close(moved[0] / moved[0].norm(), -grad[0] / grad[0].norm(), rtol=1e-3, atol=1e-6)


def test_adam_equals_that_of_torch() -> None:
    canvas = new_canvas(grey(1, spread=0.01), 0.01)
    leaf = canvas.image.clone().requires_grad_()
    expected = torch.optim.Adam([leaf], lr=0.01, betas=Adam.BETAS, eps=Adam.EPSILON)
    stepper = Adam(canvas)
    for i in range(10):
        leaf.grad = random(10 + i)
        step(canvas, stepper, leaf.grad)
        expected.step()
        torch.testing.assert_close(canvas.image, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_adam_does_not_stall_on_gradients_of_means() -> None:
    canvas = new_canvas(grey(1), 0.02)
    moved = step(canvas, Adam(canvas), 1e-9 * random(2))
    torch.testing.assert_close(moved.abs(), torch.full(SHAPE, 0.02), rtol=1e-2, atol=0)


def test_lbfgs_takes_the_direction_that_its_matrix_defines() -> None:
    """The two-loop recursion over products against the inverse Hessian as a matrix, built by BFGS updates."""
    hessian = stretched()
    canvas = new_canvas(grey(1, 1, 3, 4, 5), 1e-3)
    stepper = LBFGS(canvas)
    pairs: list[tuple[Tensor, Tensor]] = []
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(6):
        image, grad = canvas.image.flatten().double(), slope(canvas, hessian)
        g = grad.flatten().double()
        if last is None:
            step(canvas, stepper, grad)
            canvas.step.fill_(1e9)
        else:
            pairs.append((image - last[0], g - last[1]))
            s, y = pairs[-1]
            inverse = torch.eye(60).double() * (s @ y) / (y @ y)
            for s, y in pairs:
                v = torch.eye(60).double() - torch.outer(y, s) / (s @ y)
                inverse = v.T @ inverse @ v + torch.outer(s, s) / (s @ y)
            moved = step(canvas, stepper, grad)
            torch.testing.assert_close(moved.flatten().double(), -(inverse @ g), rtol=1e-3, atol=1e-6)
        last = image, g


def test_lbfgs_beats_descent_where_the_valley_is_narrow() -> None:
    left = []
    for optimiser, length in ((Optimiser.GRADIENT_DESCENT, 1e-3), (Optimiser.LBFGS, 0.1)):
        canvas = new_canvas(grey(1), length)
        stepper = make_stepper(optimiser, canvas)
        for _ in range(40):
            step(canvas, stepper, slope(canvas, stretched()))
        left.append(((canvas.image - 0.5) * slope(canvas, stretched())).sum((1, 2, 3)))
    assert (left[1] < left[0] / 50).all()


def test_lbfgs_leaves_out_a_pair_of_negative_curvature_for_that_job_alone() -> None:
    canvas, grad = new_canvas(grey(1), 0.01), random(2)
    stepper = LBFGS(canvas)
    s = step(canvas, stepper, grad)
    bent = grad + s * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    step(canvas, stepper, bent)
    assert [float(x) > 0 for x in stepper.inverse[:, 0]] == [True, False]
    assert [float(x) > 0 for x in stepper.scale] == [True, False]
    moved = step(canvas, stepper, bent)  # the second job has no pair: it moves along the gradient, by the full step
    torch.testing.assert_close(moved[1], -0.01 * bent[1] / bent[1].square().mean().sqrt(), rtol=1e-3, atol=1e-6)


def test_lbfgs_is_never_longer_than_its_step() -> None:
    canvas = new_canvas(grey(1, spread=0.01), 0.002, 0.01)
    stepper = LBFGS(canvas)
    for i in range(15):
        moved = step(canvas, stepper, 1e-6 * (canvas.image - 0.5 + 0.1 * random(i)))
        assert (moved.square().mean((1, 2, 3)).sqrt() <= canvas.step * 1.0001).all()


@pytest.mark.parametrize("optimiser", Optimiser)
def test_a_zero_gradient_moves_nothing(optimiser: Optimiser) -> None:
    canvas = new_canvas(grey(1), 30.0)  # divided by the smallest float this is infinite
    stepper = make_stepper(optimiser, canvas)
    for _ in range(3):
        assert torch.equal(step(canvas, stepper, ZERO), ZERO)


@pytest.mark.parametrize("optimiser", Optimiser)
def test_a_jobs_picture_does_not_depend_on_its_batch(optimiser: Optimiser) -> None:
    shape = (2, 3, 21, 33)  # three tiles, the last one ragged
    both, alone = new_canvas(grey(1, *shape), 0.1, 0.02), new_canvas(grey(1, *shape)[1:], 0.02)
    steppers = make_stepper(optimiser, both), make_stepper(optimiser, alone)
    for i in range(13):
        noise = random(i, *shape)
        if i == 5:
            noise[0] = torch.nan  # the other job diverges
        step(both, steppers[0], both.image + 0.1 * noise)
        step(alone, steppers[1], alone.image + 0.1 * noise[1:])
        assert torch.equal(both.image[1:], alone.image)
    assert both.diverged_at.tolist() == [6, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("optimiser", Optimiser)
def test_a_job_that_diverges_shows_its_last_good_picture_and_all_its_state_stays_finite(
    optimiser: Optimiser, bad: float
) -> None:
    canvas = new_canvas(grey(1), 0.01, average=0.9)
    stepper = make_stepper(optimiser, canvas)
    step(canvas, stepper, random(2))
    good = canvas.image[0].clone()
    step(canvas, stepper, random(3))
    grad = random(4)
    grad[0, 1, 2, 3] = bad
    for _ in range(3):
        step(canvas, stepper, grad)
        assert torch.equal(canvas.image[0], good)
        assert not torch.equal(canvas.image[1], canvas.last_good[1])
    assert canvas.mean is not None
    assert all(
        t.isfinite().all() for t in (canvas.image, canvas.mean, *stepper.slot(0).values(), *stepper.slot(1).values())
    )


@pytest.mark.parametrize("optimiser", Optimiser)
def test_a_stepper_whose_state_is_zero_is_like_a_new_one(optimiser: Optimiser) -> None:
    canvas = new_canvas(grey(1), 0.01)
    stepper = make_stepper(optimiser, canvas)
    pictures = []
    for _ in range(2):
        canvas.image.copy_(grey(1))
        canvas.count.zero_()
        for view in (*stepper.slot(0).values(), *stepper.slot(1).values()):
            view.zero_()
        for i in range(12):
            step(canvas, stepper, canvas.image + 0.1 * random(i))
        pictures.append(canvas.image.clone())
    assert torch.equal(*pictures)


@pytest.mark.parametrize("optimiser", Optimiser)
def test_state_is_carried_over_to_the_next_scale(optimiser: Optimiser) -> None:
    canvas = new_canvas(grey(1), 0.1)
    stepper = make_stepper(optimiser, canvas)
    for i in range(4):
        step(canvas, stepper, canvas.image + 0.1 * random(i))
    larger = new_canvas(grey(7, 2, 3, 8, 10), 0.1)
    larger.count.copy_(canvas.count)
    finer = make_stepper(optimiser, larger)
    carry(optimiser, stepper, finer)
    fresh = new_canvas(larger.image, 0.1)
    moved = step(larger, finer, larger.image / 4)
    assert moved.isfinite().all()
    stateless = optimiser in (Optimiser.GRADIENT_DESCENT, Optimiser.NORMALISED_DESCENT)
    assert torch.equal(moved, step(fresh, make_stepper(optimiser, fresh), fresh.image / 4)) == stateless


def test_adam_keeps_the_ratio_of_its_moments_when_gradients_shrink_with_the_number_of_pixels() -> None:
    canvas = new_canvas(grey(1), 0.1)
    stepper = Adam(canvas)
    step(canvas, stepper, torch.ones(SHAPE))
    larger = new_canvas(torch.full((2, 3, 8, 10), 0.5), 0.1)
    larger.count.copy_(canvas.count)
    finer = Adam(larger)
    carry(Optimiser.ADAM, stepper, finer)
    moved = step(larger, finer, torch.full((2, 3, 8, 10), 0.25))
    torch.testing.assert_close(moved, torch.full((2, 3, 8, 10), -0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("iterations", [4, 14])  # a ring that is not full, and one that has wrapped around
def test_lbfgs_carries_its_pairs_to_the_next_scale(iterations: int) -> None:
    canvas = new_canvas(grey(1), 0.01)
    stepper = LBFGS(canvas)
    for i in range(iterations):
        grad = canvas.image + 0.001 * random(i)
        if i == iterations - 1:  # the last pair of job 1 shows negative curvature
            grad[1] = stepper.before[1] - (canvas.image - canvas.last_good)[1]
        step(canvas, stepper, grad)
    larger = LBFGS(new_canvas(grey(7, 2, 3, 8, 10), 0.01))
    carry(Optimiser.LBFGS, stepper, larger)
    assert larger.seen.tolist() == [[iterations - 1] * 2, [0, 0]]
    newest, held = (iterations - 2) % LBFGS.PAIRS, min(iterations - 1, LBFGS.PAIRS)
    assert stepper.inverse[1, newest] == 0
    assert ((larger.inverse > 0).sum(1) == torch.tensor([held, held - 1])).all()
    s, y = larger.history.double()
    sy, yy = (s * y).sum((2, 3, 4)).T, (y * y).sum((2, 3, 4)).T
    good = larger.inverse > 0
    torch.testing.assert_close(larger.inverse[good], 1 / sy[good])
    newest_good = [newest, (newest - 1) % LBFGS.PAIRS]
    torch.testing.assert_close(larger.scale, (sy / yy)[[0, 1], newest_good])
    # The products equal those that a step would have computed.
    rows = torch.cat([s, y]).flatten(2).transpose(0, 1)
    torch.testing.assert_close(larger.products[:, :-1, :-1], rows @ rows.mT)
