"""How the pixels of a batch follow their gradients: gradient descent, Adam, L-BFGS.

All state and all decisions are tensors, per job and on the device, so a step reads nothing back: a job never waits for
another, and the whole step can be captured once and replayed. ``image`` and ``grad`` are float32 [B, 3, H, W], ``step``
is float32 [B]. `proposal` returns the next image, before it is clamped to what can be shown.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Optimiser

__all__ = ["LBFGS", "Adam", "Descent", "Stepper", "make_stepper"]


class Stepper(Protocol):
    """An optimiser with the state of a batch at one scale."""

    def proposal(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image."""

    def resampled(self, height: int, width: int) -> Stepper:
        """The same optimiser for the next scale, its state carried over where that means something."""


def make_stepper(optimiser: Optimiser, step: Tensor) -> Stepper:
    """A fresh optimiser."""
    match optimiser:
        case Optimiser.GRADIENT_DESCENT:
            return Descent(step, normalised=False)
        case Optimiser.NORMALISED_DESCENT:
            return Descent(step, normalised=True)
        case Optimiser.ADAM:
            return Adam(step)
        case Optimiser.LBFGS:
            return LBFGS(step)


def _per_job(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each job, [B]; the smallest normal float where it is 0, so that one can divide by it."""
    return x.square().mean((1, 2, 3)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3))


class Descent:
    """G <- G - step * dJ/dG; normalised: the gradient first divided by its root mean square."""

    def __init__(self, step: Tensor, normalised: bool) -> None:
        self.step, self.normalised = step, normalised

    def proposal(self, image: Tensor, grad: Tensor) -> Tensor:
        rate = self.step / _rms(grad) if self.normalised else self.step
        return image - _per_job(rate) * grad

    def resampled(self, height: int, width: int) -> Descent:
        return self  # no state


class Adam:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980) with betas 0.9 and 0.99: runs are a hundred steps, not millions.

    epsilon is 1e-16: gradients of losses that are means over pixels are 1e-6 and less, where the usual 1e-8 would damp.
    """

    BETAS = (0.9, 0.99)
    EPSILON = 1e-16

    def __init__(self, step: Tensor) -> None:
        self.step = step
        self.taken = 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def proposal(self, image: Tensor, grad: Tensor) -> Tensor:
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(grad), torch.zeros_like(grad)
        first, second = self.BETAS
        self.taken += 1
        self.mean.lerp_(grad, 1 - first)
        self.square.mul_(second).addcmul_(grad, grad, value=1 - second)
        root = (self.square / (1 - second**self.taken)).sqrt_().add_(self.EPSILON)
        return image - _per_job(self.step / (1 - first**self.taken)) * self.mean / root

    def resampled(self, height: int, width: int) -> Adam:
        other = Adam(self.step)
        if self.mean is None or self.square is None:
            return other
        # A pixel's gradient shrinks as their number grows, and squares with it: without this the old, larger squares
        # would hold the steps of the new scale back for about 1 / (1 - 0.99) iterations.
        shrink = self.mean.shape[2] * self.mean.shape[3] / (height * width)
        other.taken = self.taken
        other.mean = _resample(self.mean, height, width) * shrink
        other.square = _resample(self.square, height, width) * shrink**2
        return other


class LBFGS:
    """L-BFGS (Nocedal 1980) with `PAIRS` correction pairs and without a line search.

    A pair that shows no positive curvature is left out of that job's history, and a step is never longer than ``step``
    (root mean square over the pixels): together they do what a line search is for, at one gradient per iteration.
    """

    PAIRS = 10  # 20 image-sized tensors, 240 MB for a 1024 px square
    LEAST_CURVATURE = 1e-6  # of s.y / (|s| |y|)

    def __init__(self, step: Tensor) -> None:
        self.step = step
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, y, 1 / s.y (0: left out), oldest first
        self.scale: Tensor | None = None  # s.y / y.y of each job's newest good pair
        self.last: tuple[Tensor, Tensor] | None = None

    def proposal(self, image: Tensor, grad: Tensor) -> Tensor:
        if self.last is not None:
            self._remember(image - self.last[0], grad - self.last[1])
        self.last = image.clone(), grad.clone()
        direction = self._direction(grad)
        longest = self.step / _rms(direction)
        # Without any curvature known the direction is the bare gradient, whose length means nothing.
        rate = longest if self.scale is None else torch.where(self.scale > 0, longest.clamp_max(1), longest)
        return image - _per_job(rate) * direction

    def _remember(self, s: Tensor, y: Tensor) -> None:
        sy, yy = _dot(s, y), _dot(y, y)
        good = sy > self.LEAST_CURVATURE * (_dot(s, s) * yy).sqrt()
        before = torch.zeros_like(sy) if self.scale is None else self.scale
        self.scale = torch.where(good, sy / yy, before)
        self.pairs = [*self.pairs, (s, y, torch.where(good, 1 / sy, 0.0))][-self.PAIRS :]

    def _direction(self, grad: Tensor) -> Tensor:
        """The two-loop recursion; a pair with 0 for 1 / s.y changes nothing."""
        q, alphas = grad.clone(), []
        for s, y, inverse in reversed(self.pairs):
            alpha = torch.where(inverse > 0, inverse * _dot(s, q), 0.0)
            q -= _per_job(alpha) * y
            alphas.append(alpha)
        if self.scale is not None:
            q *= _per_job(torch.where(self.scale > 0, self.scale, 1.0))
        for (s, y, inverse), alpha in zip(self.pairs, reversed(alphas), strict=True):
            beta = torch.where(inverse > 0, inverse * _dot(y, q), 0.0)
            q += _per_job(alpha - beta) * s
        return q

    def resampled(self, height: int, width: int) -> LBFGS:
        other = LBFGS(self.step)
        for s, y, inverse in self.pairs:
            shrink = s.shape[2] * s.shape[3] / (height * width)  # as in Adam
            other._remember(
                _per_job((inverse > 0).float()) * _resample(s, height, width), _resample(y, height, width) * shrink
            )
        return other


def _resample(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear: squares must stay positive."""
    return F.interpolate(x, (height, width), mode="bilinear", antialias=True)
