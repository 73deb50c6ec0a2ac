"""The state of a job, as a value that moves from batch to batch.

    state = engine.admit(job)
    batch = engine.batch(state.shape, slots=4)
    slot = batch.join(state)
    report = batch.advance(10)[slot]
    state = batch.leave(slot)  # continues in a batch of `state.shape`, which may be that of the next scale by now

Nothing here computes, so a scheduler and its tests need no kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypedDict, Unpack

from torch import Tensor

from gramophone.recipe import InvalidRecipeError, LayerWeight, Optimiser, Pooling, Recipe, Violation
from gramophone_server.domain.job import Losses, Report, Scale, StyleJob

__all__ = ["JobState", "RecipeUpdate", "Shape", "SlotTensors"]

SlotTensors = dict[str, Tensor]  # the tensors of one job in a slot, by name, without the batch dimension


class Shape(NamedTuple):
    """The properties that all jobs of a batch share, because a captured iteration depends on them.

    Everything else is data of a slot.
    """

    height: int  # of the current scale, in pixels
    width: int
    content_layers: tuple[str, ...]
    style_layers: tuple[str, ...]
    pooling: Pooling
    optimiser: Optimiser
    average: float

    @classmethod
    def of(cls, recipe: Recipe, height: int, width: int) -> Shape:
        """The shape of a recipe's jobs at ``height`` x ``width`` px."""
        content, style = (tuple(layer for layer, _ in named) for named in (recipe.content_layers, recipe.style_layers))
        return cls(height, width, content, style, recipe.pooling, recipe.optimiser, recipe.average)


class RecipeUpdate(TypedDict, total=False):
    """The fields of a recipe that can change after the job is accepted; layers keep their names and order."""

    alpha: float
    beta: float
    tv_weight: float
    step: float
    content_layers: tuple[LayerWeight, ...]
    style_layers: tuple[LayerWeight, ...]
    iterations: int  # at the final scale, including those done there


@dataclass(eq=False)
class JobState:
    """The state of one job, from its acceptance to its last iteration.

    `tensors` holds the picture and the optimiser's state while the job is in no batch: by the names of `Canvas.slot`
    and `Stepper.slot`, at the scale `scale_index`; a missing tensor is zero. It is None before the first batch and
    while the job is in a batch. The header of a checkpoint has five of the fields: see `checkpoint_format.COUNTS`.
    """

    job: StyleJob
    recipe: Recipe = None  # type: ignore[assignment]  # the job's, with the updates so far
    scale_index: int = 0  # of the picture, in `scales`
    done: int = 0  # iterations completed, over all scales
    gradients: int = 0  # gradients that the optimiser has seen; fewer than `done` after a light checkpoint
    averaged: int = 0  # iterates in the running average, which starts anew at every scale
    diverged_at: int = 0  # the iteration whose loss was not finite, 0 for none; the picture does not change after it
    joined: bool = False  # whether the job is in a batch
    tensors: SlotTensors | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.recipe = self.recipe or self.job.recipe
        *coarse, final = self.job.scales
        self.scales: tuple[Scale, ...] = (*coarse, final._replace(iterations=self.recipe.iterations))
        # Of the batches at each scale. No update changes them, and the scheduler asks for them all the time.
        self.shapes = tuple(Shape.of(self.recipe, height, width) for width, height, _ in self.scales)
        # Of all style images together, at each scale.
        self.style_pixels = tuple(
            sum(w * h for w, h in self.job.style_sizes(max(width, height))) for width, height, _ in self.scales
        )

    @property
    def iterations(self) -> int:
        """Iterations of the whole job, over all scales."""
        return sum(scale.iterations for scale in self.scales)

    @property
    def finished(self) -> bool:
        """Whether no iteration is left."""
        return self.done == self.iterations

    @property
    def iterations_left(self) -> int:
        """Iterations left at the scale of the picture.

        At 0 the job must leave its batch, and continues at the next scale.
        """
        return sum(scale.iterations for scale in self.scales[: self.scale_index + 1]) - self.done

    @property
    def iterations_at_final_scale(self) -> int:
        """Iterations completed at the last scale."""
        return max(0, self.done - sum(scale.iterations for scale in self.scales[:-1]))

    @property
    def next_scale_index(self) -> int:
        """Index of the scale of the next iteration; that of the last scale if no iteration is left."""
        is_last_scale = self.scale_index + 1 == len(self.scales)
        return self.scale_index if self.iterations_left or is_last_scale else self.scale_index + 1

    @property
    def shape(self) -> Shape:
        """The shape of the batch that the job can join."""
        return self.shapes[self.next_scale_index]

    @property
    def pixel_iterations_left(self) -> int:
        """Pixel-iterations still to do: the sum of width x height over the iterations left."""
        width, height, _ = self.scales[self.scale_index]
        finer = sum(scale.width * scale.height * scale.iterations for scale in self.scales[self.scale_index + 1 :])
        return width * height * self.iterations_left + finer

    @property
    def bytes(self) -> int:
        """Size of `tensors`: 276 bytes per pixel with L-BFGS, 48 with Adam."""
        return sum(tensor.nbytes for tensor in (self.tensors or {}).values())

    def move_to_host(self) -> None:
        """Moves `tensors` from a device to the host's memory. The next batch that the job joins copies them back."""
        if self.tensors is not None:
            self.tensors = {name: tensor.cpu() for name, tensor in self.tensors.items()}

    def report(self, losses: Losses) -> Report:
        """The report of the last iteration, with its ``losses``."""
        width, height, _ = self.scales[self.scale_index]
        return Report(
            iteration=self.done,
            iterations=self.iterations,
            width=width,
            height=height,
            scale=self.scale_index + 1,
            scales=len(self.scales),
            losses=losses,
            pixel_iterations_left=self.pixel_iterations_left,
            diverged_at=self.diverged_at or None,
        )

    def count_iterations(self, iterations: int) -> None:
        """Adds iterations that a batch has completed to the counts."""
        self.done += iterations
        self.gradients += iterations
        self.averaged += iterations

    def update(self, **changes: Unpack[RecipeUpdate]) -> int:
        """Changes the recipe from the next iteration on, and returns the number of that iteration.

        For a job in a batch, call `Batch.update` instead. Raises `InvalidRecipeError` if a field cannot change or has
        an invalid value.
        """
        fixed = sorted(changes.keys() - RecipeUpdate.__optional_keys__)
        if fixed:
            raise InvalidRecipeError(Violation(name, "cannot change after the job is accepted") for name in fixed)
        recipe = replace(self.recipe, **changes)
        for name in ("content_layers", "style_layers"):
            old, new = (", ".join(layer for layer, _ in getattr(r, name)) for r in (self.recipe, recipe))
            if old != new:
                raise InvalidRecipeError(
                    [Violation(name, f"must name the job's layers, {old or 'none'}, got {new or 'none'}")]
                )
        if "iterations" in changes:
            *coarse, final = self.scales
            if recipe.iterations < (done := self.iterations_at_final_scale):
                raise InvalidRecipeError(
                    [Violation("iterations", f"must be at least the {done} that are done, got {recipe.iterations}")]
                )
            self.scales = (*coarse, final._replace(iterations=recipe.iterations))
        self.recipe = recipe
        return self.done + 1
