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

from gramophone.recipe import Optimiser, Recipe
from gramophone_server import ops
from gramophone_server.domain.job_state import SlotTensors

__all__ = ["LBFGS", "Adam", "Canvas", "Descent", "Stepper", "carried", "layout", "make_stepper"]


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

    @classmethod
    def empty(cls, jobs: int, height: int, width: int, average: float, device: torch.device) -> Canvas:
        """Black pictures and nobody alive."""
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
    """An optimiser with the state of a batch at one scale."""

    def step_(self, grad: Tensor) -> None:
        """Moves the canvas's image, after `ops.check_finite_` was called for this gradient."""

    def slot(self, index: int) -> SlotTensors:
        """All state of one job, as views of the buffers; zeros are a new one."""


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


def carried(optimiser: Optimiser, state: SlotTensors, height: int, width: int) -> SlotTensors:
    """The state of one job at a scale with other pixels, as far as it means something there; the rest is zero."""
    match optimiser:
        case Optimiser.ADAM:
            return Adam.carried(state, height, width)
        case Optimiser.LBFGS:
            return LBFGS.carried(state, height, width)
    return {}


def layout(recipe: Recipe, height: int, width: int) -> SlotTensors:
    """All that a slot holds of one job, as tensors that have a type and a shape but no memory."""
    canvas = Canvas.empty(1, height, width, recipe.average, torch.device("meta"))
    return canvas.slot(0) | make_stepper(recipe.optimiser, canvas).slot(0)


class Descent:
    """G <- G - step * dJ/dG; normalised: the gradient first divided by its root mean square."""

    def __init__(self, canvas: Canvas, normalised: bool) -> None:
        self.canvas, self.normalised = canvas, normalised

    def step_(self, grad: Tensor) -> None:
        """See `ops.descent_`."""
        c = self.canvas
        ops.descent_(c.image, c.last_good, c.mean, grad, c.step, c.alive, c.average, self.normalised)

    def slot(self, index: int) -> SlotTensors:
        """There is no state."""
        return {}


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

    def slot(self, index: int) -> SlotTensors:
        """The moments; how many gradients they are of is the canvas's count."""
        return {"first": self.first[index], "second": self.second[index]}

    @staticmethod
    def carried(state: SlotTensors, height: int, width: int) -> SlotTensors:
        """The moments at a scale with other pixels."""
        # A pixel's gradient shrinks as their number grows, and squares with it: without this the old, larger squares
        # would hold the steps of the new scale back for about 1 / (1 - 0.99) iterations.
        first, second = (_resampled(state[name][None], height, width)[0] for name in ("first", "second"))
        shrink = state["first"].numel() / first.numel()
        return {"first": first * shrink, "second": second * shrink**2}


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

    def slot(self, index: int) -> SlotTensors:
        """The pairs and what is known of them."""
        return {
            "history": self.history[:, :, index],
            "before": self.before[index],
            "products": self.products[index],
            "inverse": self.inverse[index],
            "scale": self.scale[index],
            "seen": self.seen[:, index],
        }

    @classmethod
    def carried(cls, state: SlotTensors, height: int, width: int) -> SlotTensors:
        """The pairs at a scale with other pixels, and what they say there. The next gradient forms none: it is the first
        at this scale."""
        shrink = state["before"].numel() / (3 * height * width)  # of y, as in Adam
        history = torch.stack([_resampled(pairs, height, width) for pairs in state["history"]])
        history *= history.new_tensor([1.0, shrink]).view(2, 1, 1, 1, 1)
        kept = state["inverse"] > 0  # a pair that was left out stays out
        history = torch.where(kept.view(1, -1, 1, 1, 1), history, 0.0)
        seen = torch.stack([state["seen"][0], torch.zeros_like(state["seen"][1])])
        return {"history": history, "seen": seen, **cls._judged(history, seen[0])}

    @classmethod
    def _judged(cls, history: Tensor, pairs: Tensor) -> SlotTensors:
        """All that is known of the pairs, from the history alone; ``pairs`` were written to it."""
        held, vectors = cls.PAIRS, 2 * cls.PAIRS
        rows = history.reshape(1, vectors, -1)
        products = rows.new_zeros(1, vectors + 1, vectors + 1, dtype=torch.float64)
        for first in range(0, rows.shape[2], 65536):  # 10 MB at a time in float64
            wide = rows[:, :, first : first + 65536].double()
            products[:, :vectors, :vectors] += wide @ wide.mT
        own = products[0].diagonal()
        ss, yy = own[:held], own[held:vectors]
        sy = products[0].diagonal(offset=held)[:held]
        good = sy > cls.LEAST_CURVATURE * (ss * yy).sqrt()
        age = (pairs - 1 - torch.arange(held, device=sy.device)) % held
        newest = torch.where(good, age, held).argmin(0, keepdim=True)
        return {
            "products": products[0],
            "inverse": torch.where(good, 1 / sy, 0.0),
            "scale": torch.where(good, sy / yy, 0.0).gather(0, newest)[0],
        }


def _resampled(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear: squares must stay positive."""
    return F.interpolate(x, (height, width), mode="bilinear", antialias=True)
