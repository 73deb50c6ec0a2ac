"""The content of a checkpoint, and how to restore a job from it; `engine.checkpoint_format` has the bytes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gramophone.recipe import Recipe
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, SlotTensors

__all__ = ["CHECKPOINT_START", "Checkpoint", "InvalidCheckpoint"]

CHECKPOINT_START = b"GRAMCKP"  # the first bytes of every checkpoint, of any version; no image starts so


class InvalidCheckpoint(ValueError):
    """The bytes are no checkpoint, or not one of this job. The text continues a sentence that starts with its name."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint, valid in itself. `restore` checks whether it belongs to a job."""

    recipe: Recipe  # with the updates that the job had received
    seed: int
    width: int  # of the picture, in pixels
    height: int
    content_digest: bytes  # of the job's content image, see `job.digest`
    style_digests: tuple[bytes, ...]
    style_weights: tuple[float, ...]
    counts: dict[str, int]  # by the fields of `JobState`
    tensors: SlotTensors

    def restore(self, job: StyleJob) -> JobState:
        """The state of ``job`` as of this checkpoint.

        The fields of `RecipeUpdate` and the time budget are taken from ``job``, so to continue unchanged, pass a job
        with this checkpoint's recipe. The job needs no start image. Raises `InvalidCheckpoint` if the job has other
        images, another blend of styles, or a recipe that differs in any other field.
        """
        for f in dataclasses.fields(Recipe):
            mine, other = getattr(self.recipe, f.name), getattr(job.recipe, f.name)
            if f.name in ("content_layers", "style_layers"):
                mine, other = (", ".join(layer for layer, _ in named) for named in (mine, other))
            elif f.name in RecipeUpdate.__optional_keys__ or f.name == "time_budget":
                continue
            if mine != other:
                raise InvalidCheckpoint(
                    f"is of a job with {f.name} {mine or 'none'}, and this one has {other or 'none'}"
                )
        if (self.content_digest, self.style_digests) != (job.content_digest, job.style_digests):
            raise InvalidCheckpoint("is of a job with other images")
        if not all(map(math.isclose, _shares(self.style_weights), _shares(job.style_weights))):
            mine, other = (", ".join(f"{w:g}" for w in weights) for weights in (self.style_weights, job.style_weights))
            raise InvalidCheckpoint(f"is of a job with style weights {mine}, and this one has {other}")
        state = JobState(job, tensors=dict(self.tensors), **self.counts)  # type: ignore[arg-type]
        before = sum(scale.iterations for scale in state.scales[: state.scale_index])
        if (
            state.scale_index >= len(state.scales)
            or not 0 <= state.done - before <= state.scales[state.scale_index].iterations
        ):
            raise InvalidCheckpoint(
                f"is at iteration {state.done} of scale {state.scale_index}, which the job does not have"
            )
        if (self.width, self.height) != state.scales[state.scale_index][:2]:
            expected = "x".join(map(str, state.scales[state.scale_index][:2]))
            raise InvalidCheckpoint(
                f"has a {self.width}x{self.height} picture, and the job a {expected} one at this scale"
            )
        unseen = state.done - state.gradients
        if (
            unseen < 0
            or state.averaged > state.done - before
            or not (state.diverged_at == 0 or unseen < state.diverged_at <= state.done)
        ):
            raise InvalidCheckpoint("is damaged: its counts contradict each other")
        return state


def _shares(weights: tuple[float, ...]) -> list[float]:
    """The weights as shares of 1, because only their proportions matter."""
    return [weight / sum(weights) for weight in weights]
