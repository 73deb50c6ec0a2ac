"""How the pixels of a batch follow their gradients: gradient descent, Adam, L-BFGS.

All state and all decisions are tensors, per job and on the device, and every step works in place on the same memory and
reads nothing back: a job never waits for another, and the whole step can be captured once and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Optimiser
from gramophone_server import ops

__all__ = ["LBFGS", "Adam", "Canvas", "Descent", "Stepper", "make_stepper"]


@dataclass(eq=False)
class Canvas:
    """The pictures of a batch at one scale and what decides over their steps; fixed buffers, changed in place."""

    image: Tensor  # float32 [B, 3, H, W], contiguous
    last_good: Tensor  # like image: the picture before the step, and what a job that diverged shows
    mean: Tensor | None  # running average of the iterates (zeros at the start), None where the recipe has none
    average: float  # of the recipe
    step: Tensor  # float32 [B]
    count: Tensor  # int64 [B], gradients seen since the job began
    alive: Tensor  # bool [B]
    diverged_at: Tensor  # int64 [B], 0: has not


class Stepper(Protocol):
    """An optimiser with the state of a batch at one scale."""

    def step_(self, grad: Tensor) -> None:
        """Moves the canvas's image, after `ops.judge_` was called for this gradient."""

    def reset(self) -> None:
        """As new, for another job in the same buffers."""

    def carry(self, coarser: Stepper) -> None:
        """Takes over the state of the same optimiser at the scale before, where that means something."""

    @property
    def buffers(self) -> list[Tensor]:
        """All state."""


def make_stepper(optimiser: Optimiser, canvas: Canvas) -> Stepper:
    """A fresh optimiser for a canvas."""
    match optimiser:
        case Optimiser.GRADIENT_DESCENT:
            return Descent(canvas, normalised=False)
        case Optimiser.NORMALISED_DESCENT:
            return Descent(canvas, normalised=True)
        case Optimiser.ADAM:
            return Adam(canvas)
        case Optimiser.LBFGS:
            return LBFGS(canvas)


class Descent:
    """G <- G - step * dJ/dG; normalised: the gradient first divided by its root mean square."""

    def __init__(self, canvas: Canvas, normalised: bool) -> None:
        self.canvas, self.normalised = canvas, normalised

    def step_(self, grad: Tensor) -> None:
        """See `ops.descent_`."""
        c = self.canvas
        ops.descent_(c.image, c.last_good, c.mean, grad, c.step, c.alive, c.average, self.normalised)

    def reset(self) -> None:
        """There is no state."""

    def carry(self, coarser: Stepper) -> None:
        """There is no state."""

    @property
    def buffers(self) -> list[Tensor]:
        """None."""
        return []


class Adam:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980) with betas 0.9 and 0.99: runs are a hundred steps, not millions.

    epsilon is 1e-16: gradients of losses that are means over pixels are 1e-6 and less, where the usual 1e-8 would damp.
    The kernels have both constants from csrc/step.h.
    """

    BETAS = (0.9, 0.99)
    EPSILON = 1e-16

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.first, self.second = torch.zeros_like(canvas.image), torch.zeros_like(canvas.image)

    def step_(self, grad: Tensor) -> None:
        """See `ops.adam_`."""
        c = self.canvas
        ops.adam_(
            c.image, c.last_good, c.mean, self.first, self.second, grad, c.step, c.count, c.alive, c.average
        )  # fmt: skip

    def reset(self) -> None:
        """Forgets the moments; how many gradients they are of is the canvas's count."""
        for moment in self.buffers:
            moment.zero_()

    def carry(self, coarser: Stepper) -> None:
        """The moments of a scale with other pixels."""
        assert isinstance(coarser, Adam)
        # A pixel's gradient shrinks as their number grows, and squares with it: without this the old, larger squares
        # would hold the steps of the new scale back for about 1 / (1 - 0.99) iterations.
        shrink = coarser.first[0].numel() / self.first[0].numel()
        self.first.copy_(_resampled(coarser.first, self.first) * shrink)
        self.second.copy_(_resampled(coarser.second, self.second) * shrink**2)

    @property
    def buffers(self) -> list[Tensor]:
        """The moments."""
        return [self.first, self.second]


class LBFGS:
    """L-BFGS (Nocedal 1980) with `PAIRS` correction pairs and without a line search.

    A pair that shows no positive curvature is left out of that job's history, and a step is never longer than ``step``
    (root mean square over the pixels): together they do what a line search is for, at one gradient per iteration. The
    attributes are the arguments of `ops.lbfgs_`; the kernels have both constants from csrc/step.h.
    """

    PAIRS = 10  # 20 image-sized tensors, 240 MB for a 1024 px square
    LEAST_CURVATURE = 1e-6  # of s.y / (|s| |y|)

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        image, jobs, vectors = canvas.image, canvas.image.shape[0], 2 * self.PAIRS + 1
        self.history = image.new_zeros(2, self.PAIRS, *image.shape)
        self.before = torch.zeros_like(image)
        self.products = image.new_zeros(jobs, vectors, vectors, dtype=torch.float64)
        self.inverse = image.new_zeros(jobs, self.PAIRS, dtype=torch.float64)
        self.scale = image.new_zeros(jobs, dtype=torch.float64)
        self.seen = image.new_zeros(2, jobs, dtype=torch.int64)

    def step_(self, grad: Tensor) -> None:
        """See `ops.lbfgs_`."""
        c = self.canvas
        memory = (self.history, self.before, self.products, self.inverse, self.scale, self.seen)
        ops.lbfgs_(c.image, c.last_good, c.mean, *memory, grad, c.step, c.alive, c.average)

    def reset(self) -> None:
        """Forgets all pairs; what no pair was written to since is never read."""
        for memory in (self.products, self.inverse, self.scale, self.seen):
            memory.zero_()

    def carry(self, coarser: Stepper) -> None:
        """The pairs of a scale with other pixels, and what they say there. The next gradient forms none: it is the first
        at this scale."""
        assert isinstance(coarser, LBFGS)
        shrink = coarser.before[0].numel() / self.before[0].numel()  # of y, as in Adam
        good = coarser.inverse > 0
        for slot in range(self.PAIRS):
            kept = good[:, slot].view(-1, 1, 1, 1)  # a pair that was left out stays out
            for kind, factor in enumerate((1.0, shrink)):
                resampled = _resampled(coarser.history[kind, slot], self.before) * factor
                self.history[kind, slot] = torch.where(kept, resampled, 0.0)
        self.seen[0] = coarser.seen[0]
        self.seen[1] = 0
        self._judge_pairs()

    def _judge_pairs(self) -> None:
        """All that is known of the pairs, from the history alone."""
        vectors = 2 * self.PAIRS
        rows = self.history.view(vectors, len(self.scale), -1).transpose(0, 1)
        self.products.zero_()
        for first in range(0, rows.shape[2], 65536):  # 10 MB at a time in float64
            wide = rows[:, :, first : first + 65536].double()
            self.products[:, :vectors, :vectors] += wide @ wide.mT
        own = self.products.diagonal(dim1=1, dim2=2)
        ss, yy = own[:, : self.PAIRS], own[:, self.PAIRS : vectors]
        sy = self.products.diagonal(offset=self.PAIRS, dim1=1, dim2=2)[:, : self.PAIRS]
        good = sy > self.LEAST_CURVATURE * (ss * yy).sqrt()
        self.inverse.copy_(torch.where(good, 1 / sy, 0.0))
        age = (self.seen[0][:, None] - 1 - torch.arange(self.PAIRS, device=sy.device)) % self.PAIRS
        newest = torch.where(good, age, self.PAIRS).argmin(1, keepdim=True)
        self.scale.copy_(torch.where(good, sy / yy, 0.0).gather(1, newest)[:, 0])

    @property
    def buffers(self) -> list[Tensor]:
        """The pairs and what is known of them."""
        return [self.history, self.before, self.products, self.inverse, self.scale, self.seen]


def _resampled(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear: squares must stay positive."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", antialias=True)
