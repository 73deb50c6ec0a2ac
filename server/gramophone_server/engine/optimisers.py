"""Optimisers that move the pixels of a batch along their gradients: gradient descent, Adam, L-BFGS.

All state and all decisions are tensors on the device, with an entry per job. A step works in place on the same memory
and does not wait for the device, so no job waits for another, and the step can be captured once and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Optimiser, Recipe
from gramophone_server import ops
from gramophone_server.domain.job_state import SlotTensors

__all__ = ["LBFGS", "Adam", "Canvas", "Descent", "Stepper", "make_stepper", "resampled_state", "slot_layout"]


@dataclass(eq=False)
class Canvas:
    """The pictures of a batch at one scale, and the tensors that control their steps, in fixed buffers."""

    image: Tensor  # float32 [B, 3, H, W], contiguous
    last_good: Tensor  # like image: the picture before the step, which a job that diverged shows
    mean: Tensor | None  # like image: running average of the iterates, zeros at the start; None without an average
    average: float  # of the recipe: the decay of the running average, 0 for none
    step: Tensor  # float32 [B], of the recipe
    count: Tensor  # int64 [B], gradients that the job's optimiser has seen
    alive: Tensor  # bool [B], False for an empty slot and for a job that diverged
    diverged_at: Tensor  # int64 [B], the count at the gradient that was not finite, 0 for none

    @classmethod
    def empty(cls, jobs: int, height: int, width: int, average: float, device: torch.device) -> Canvas:
        """A canvas of ``jobs`` empty slots: black pictures that are not alive."""
        image = torch.zeros(jobs, 3, height, width, device=device)
        return cls(
            image=image,
            last_good=torch.zeros_like(image),
            mean=torch.zeros_like(image) if average else None,
            average=average,
            step=torch.zeros(jobs, device=device),
            count=torch.zeros(jobs, dtype=torch.int64, device=device),
            alive=torch.zeros(jobs, dtype=torch.bool, device=device),
            diverged_at=torch.zeros(jobs, dtype=torch.int64, device=device),
        )

    def slot(self, index: int) -> SlotTensors:
        """The pictures of one job, as views of the buffers."""
        pictures = {"image": self.image[index], "last_good": self.last_good[index]}
        return pictures if self.mean is None else {**pictures, "mean": self.mean[index]}


class Stepper(Protocol):
    """An optimiser and its state for a batch at one scale."""

    def step_(self, grad: Tensor) -> None:
        """Moves the canvas's image, after `ops.check_finite_` was called for this gradient."""

    def slot(self, index: int) -> SlotTensors:
        """The state of one job, as views of the buffers. All zeros is the state of a new job."""


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


def resampled_state(optimiser: Optimiser, state: SlotTensors, height: int, width: int) -> SlotTensors:
    """The state of one job at a scale of ``height`` x ``width`` px. Tensors that it leaves out start at zero."""
    match optimiser:
        case Optimiser.ADAM:
            return Adam.resampled_state(state, height, width)
        case Optimiser.LBFGS:
            return LBFGS.resampled_state(state, height, width)
    return {}


def slot_layout(recipe: Recipe, height: int, width: int) -> SlotTensors:
    """The tensors that a slot holds for one job, on the meta device: with a type and a shape but no memory."""
    canvas = Canvas.empty(1, height, width, recipe.average, torch.device("meta"))
    return canvas.slot(0) | make_stepper(recipe.optimiser, canvas).slot(0)


class Descent:
    """Gradient descent: X <- X - step * dJ/dX.

    If ``normalised``, the gradient is first divided by its root mean square.
    """

    def __init__(self, canvas: Canvas, normalised: bool) -> None:
        self.canvas, self.normalised = canvas, normalised

    def step_(self, grad: Tensor) -> None:
        """See `ops.descent_`."""
        c = self.canvas
        ops.descent_(c.image, c.last_good, c.mean, grad, c.step, c.alive, c.average, self.normalised)

    def slot(self, index: int) -> SlotTensors:
        """Descent has no state."""
        return {}


class Adam:
    """Adam (Kingma, Ba 2015, arXiv:1412.6980, algorithm 1).

    The second beta is 0.99 instead of 0.999, because runs have a hundred steps, not millions. epsilon is 1e-16, because
    gradients of losses that are means over pixels are 1e-6 and less, where the usual 1e-8 would damp the steps. The
    kernels have the same constants from csrc/optimiser_math.h.
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

    def slot(self, index: int) -> SlotTensors:
        """The running moments of the gradient. The number of gradients in them is the canvas's count."""
        return {"first": self.first[index], "second": self.second[index]}

    @staticmethod
    def resampled_state(state: SlotTensors, height: int, width: int) -> SlotTensors:
        """Resamples the moments to a scale of ``height`` x ``width`` px."""
        # The gradient of a pixel is inversely proportional to the number of pixels. Without this correction the old,
        # larger squares would shorten the steps of the new scale for about 1 / (1 - 0.99) iterations.
        first, second = (_resized(state[name][None], height, width)[0] for name in ("first", "second"))
        shrink = state["first"].numel() / first.numel()
        return {"first": first * shrink, "second": second * shrink**2}


class LBFGS:
    """L-BFGS (Nocedal 1980, Mathematics of Computation 35) with `PAIRS` correction pairs and without a line search.

    A pair without positive curvature is left out of its job's history, and a step is never longer than ``step`` (root
    mean square over the pixels): together these do the work of a line search, at one gradient per iteration. The
    attributes are the arguments of `ops.lbfgs_`; the kernels have the same constants from csrc/optimiser_math.h.
    """

    PAIRS = 10  # 20 image-sized tensors, 240 MB for a 1024 px square
    MIN_CURVATURE = 1e-6  # of s.y / (|s| |y|), for a pair that is used

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
        state = (self.history, self.before, self.products, self.inverse, self.scale, self.seen)
        ops.lbfgs_(c.image, c.last_good, c.mean, *state, grad, c.step, c.alive, c.average)

    def slot(self, index: int) -> SlotTensors:
        """The pairs and the values computed from them; see `ops.lbfgs_`."""
        return {
            "history": self.history[:, :, index],
            "before": self.before[index],
            "products": self.products[index],
            "inverse": self.inverse[index],
            "scale": self.scale[index],
            "seen": self.seen[:, index],
        }

    @classmethod
    def resampled_state(cls, state: SlotTensors, height: int, width: int) -> SlotTensors:
        """Resamples the pairs to a scale of ``height`` x ``width`` px, and computes their products anew.

        The next gradient forms no pair, because it is the first at this scale.
        """
        shrink = state["before"].numel() / (3 * height * width)  # of gradients, and so of y, as in Adam
        history = torch.stack([_resized(pairs, height, width) for pairs in state["history"]])
        history *= history.new_tensor([1.0, shrink]).view(2, 1, 1, 1, 1)
        is_used = state["inverse"] > 0  # a pair that is left out stays left out
        history = torch.where(is_used.view(1, -1, 1, 1, 1), history, 0.0)
        seen = torch.stack([state["seen"][0], torch.zeros_like(state["seen"][1])])
        return {"history": history, "seen": seen, **cls._products(history, seen[0])}

    @classmethod
    def _products(cls, history: Tensor, pairs: Tensor) -> SlotTensors:
        """The tensors that `ops.lbfgs_` computes from the history; ``pairs``: the number ever written to it."""
        slots, vectors = cls.PAIRS, 2 * cls.PAIRS
        rows = history.reshape(1, vectors, -1)
        products = rows.new_zeros(1, vectors + 1, vectors + 1, dtype=torch.float64)
        for first in range(0, rows.shape[2], 65536):  # 10 MB at a time in float64
            wide = rows[:, :, first : first + 65536].double()
            products[:, :vectors, :vectors] += wide @ wide.mT
        squares = products[0].diagonal()
        ss, yy = squares[:slots], squares[slots:vectors]
        sy = products[0].diagonal(offset=slots)[:slots]
        good = sy > cls.MIN_CURVATURE * (ss * yy).sqrt()
        age = (pairs - 1 - torch.arange(slots, device=sy.device)) % slots
        newest = torch.where(good, age, slots).argmin(0, keepdim=True)
        return {
            "products": products[0],
            "inverse": torch.where(good, 1 / sy, 0.0),
            "scale": torch.where(good, sy / yy, 0.0).gather(0, newest)[0],
        }


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, because squares must stay positive."""
    return F.interpolate(x, (height, width), mode="bilinear", antialias=True)
