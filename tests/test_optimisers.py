"""Optimisers: each against the textbook, per job, without reading anything back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser
from gramophone_server.optimisers import LBFGS, Adam, Stepper, make_stepper

SHAPE = (2, 3, 4, 5)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def steps(*values: float) -> Tensor:
    return torch.tensor(values)


def minimise(stepper: Stepper, hessian: Tensor, image: Tensor, iterations: int) -> Tensor:
    """1/2 x^T H x with H [n, n] for each job; returns the losses [iterations, B]."""
    losses = []
    for _ in range(iterations):
        grad = (image.flatten(1) @ hessian).view(image.shape)
        losses.append(0.5 * (image * grad).sum((1, 2, 3)))
        image = stepper.proposal(image, grad)
    return torch.stack(losses)


def stretched() -> Tensor:
    """Positive definite, condition 1000."""
    n = 60
    q, _ = torch.linalg.qr(random(3, n, n))
    return (q * torch.logspace(0, 3, n)) @ q.T


def test_gradient_descent_is_the_textbooks() -> None:
    image, grad = random(1), random(2)
    got = make_stepper(Optimiser.GRADIENT_DESCENT, steps(0.1, 3.0)).proposal(image, grad)
    torch.testing.assert_close(got, torch.stack([image[0] - 0.1 * grad[0], image[1] - 3.0 * grad[1]]))


def test_normalised_descent_moves_by_its_step_whatever_the_gradients_size() -> None:
    image, grad = random(1), random(2) * torch.tensor([1e-12, 1e6]).view(2, 1, 1, 1)
    moved = make_stepper(Optimiser.NORMALISED_DESCENT, steps(0.1, 3.0)).proposal(image, grad) - image
    torch.testing.assert_close(moved.square().mean((1, 2, 3)).sqrt(), steps(0.1, 3.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved[0] / moved[0].norm(), -grad[0] / grad[0].norm(), rtol=1e-3, atol=1e-6)


def test_adam_is_torchs() -> None:
    image = random(1)
    leaf = image.clone().requires_grad_()
    expected = torch.optim.Adam([leaf], lr=0.05, betas=(0.9, 0.99), eps=1e-16)
    stepper = Adam(steps(0.05, 0.05))
    for i in range(10):
        leaf.grad = random(10 + i)
        image = stepper.proposal(image, leaf.grad)
        expected.step()
        torch.testing.assert_close(image, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_adam_does_not_stall_on_gradients_of_means() -> None:
    moved = Adam(steps(0.02, 0.02)).proposal(torch.zeros(SHAPE), 1e-9 * random(2))
    torch.testing.assert_close(moved.abs(), torch.full(SHAPE, 0.02), rtol=1e-2, atol=0)


def test_lbfgs_takes_the_direction_that_its_matrix_defines() -> None:
    """The two-loop recursion against the inverse Hessian built up as a matrix by BFGS updates."""
    hessian = stretched()
    stepper, image = LBFGS(steps(1e9)), random(1, 1, 3, 4, 5)
    inverse, last = None, None
    for _ in range(6):
        grad = (image.flatten(1) @ hessian).view(image.shape)
        if last is not None:
            s, y = (image - last[0]).flatten().double(), (grad - last[1]).flatten().double()
            if inverse is None:
                pairs = []
            pairs.append((s, y))
            inverse = torch.eye(60).double() * (s @ y) / (y @ y)
            for s_i, y_i in pairs:
                v = torch.eye(60).double() - torch.outer(y_i, s_i) / (s_i @ y_i)
                inverse = v.T @ inverse @ v + torch.outer(s_i, s_i) / (s_i @ y_i)
            expected = image.flatten().double() - inverse @ grad.flatten().double()
            got = stepper.proposal(image, grad)
            torch.testing.assert_close(got.flatten().double(), expected, rtol=1e-3, atol=1e-4)
        else:
            stepper.step = steps(1e-3)
            got = stepper.proposal(image, grad)
            stepper.step = steps(1e9)
        last, image = (image, grad), got


def test_lbfgs_beats_descent_where_the_valley_is_narrow() -> None:
    image = random(1)
    descent = minimise(make_stepper(Optimiser.GRADIENT_DESCENT, steps(1e-3, 1e-3)), stretched(), image, 40)
    lbfgs = minimise(LBFGS(steps(1.0, 1.0)), stretched(), image, 40)
    assert (lbfgs[-1] < descent[-1] / 50).all()


def test_lbfgs_leaves_out_a_pair_of_negative_curvature_for_that_job_alone() -> None:
    stepper = LBFGS(steps(0.1, 0.1))
    image, grad = random(1), random(2)
    following = stepper.proposal(image, grad)
    s = following - image
    bent = grad + s * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    stepper.proposal(following, bent)
    assert [float(x) > 0 for x in stepper.pairs[0][2]] == [True, False]
    moved = stepper.proposal(following, bent) - following
    assert moved.isfinite().all()


def test_lbfgs_history_is_bounded() -> None:
    stepper, image = LBFGS(steps(0.1, 0.1)), random(1)
    for i in range(LBFGS.PAIRS + 5):
        image = stepper.proposal(image, image + 0.01 * random(i))
    assert len(stepper.pairs) == LBFGS.PAIRS


@pytest.mark.parametrize("optimiser", Optimiser)
def test_a_zero_gradient_moves_nothing(optimiser: Optimiser) -> None:
    stepper, image = make_stepper(optimiser, steps(0.1, 0.1)), random(1)
    for _ in range(3):
        assert torch.equal(stepper.proposal(image, torch.zeros(SHAPE)), image)


@pytest.mark.parametrize("optimiser", Optimiser)
def test_jobs_do_not_mix(optimiser: Optimiser) -> None:
    both, alone = make_stepper(optimiser, steps(0.1, 0.02)), make_stepper(optimiser, steps(0.02))
    image = random(1)
    image_alone = image[1:]
    for i in range(5):
        grad = image + 0.1 * random(i)
        grad_alone = image_alone + 0.1 * random(i)[1:]
        image, image_alone = both.proposal(image, grad), alone.proposal(image_alone, grad_alone)
        torch.testing.assert_close(image[1:], image_alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", Optimiser)
def test_state_goes_on_at_the_next_scale(optimiser: Optimiser) -> None:
    stepper, image = make_stepper(optimiser, steps(0.1, 0.1)), random(1)
    for i in range(4):
        image = stepper.proposal(image, image + 0.1 * random(i))
    larger = stepper.resampled(8, 10)
    picture = random(7, 2, 3, 8, 10)
    assert larger.proposal(picture, picture / 4).isfinite().all()


def test_adam_keeps_the_ratio_of_its_moments_when_gradients_shrink_with_the_number_of_pixels() -> None:
    stepper, image = Adam(steps(0.1, 0.1)), random(1)
    stepper.proposal(image, torch.ones(SHAPE))
    larger = stepper.resampled(8, 10)
    moved = larger.proposal(torch.zeros(2, 3, 8, 10), torch.full((2, 3, 8, 10), 0.25))
    torch.testing.assert_close(moved, torch.full((2, 3, 8, 10), -0.1), rtol=1e-3, atol=0)
