"""A job's state as it was read from a checkpoint, and the way back to a job. The bytes are the engine's business."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gramophone.recipe import Recipe, Violation
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, RecipeUpdate, SlotTensors
from gramophone_server.errors import InvalidRequest

__all__ = ["Checkpoint", "resume_refused"]

FIELD = "spec.resume"  # of the request that brings a checkpoint


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What was read from bytes and holds by itself; whether it belongs to a job is checked by `restore`."""

    recipe: Recipe  # with what can be tuned as it was when this was written
    seed: int
    width: int  # of the picture, in pixels
    height: int
    content_digest: bytes  # of the job's images, see `job.digest`
    style_digests: tuple[bytes, ...]
    style_weights: tuple[float, ...]
    counts: dict[str, int]  # fields of `JobState`
    tensors: SlotTensors

    def restore(self, job: StyleJob) -> JobState:
        """The job where it stood. What can be tuned and the time budget are ``job``'s, so whoever wants it to go on as it
        was gives a job of this checkpoint's recipe; a start image it needs no more. Raises `InvalidRequest` for a job of
        other images, another blend of styles or another structure."""
        for f in dataclasses.fields(Recipe):
            mine, other = getattr(self.recipe, f.name), getattr(job.recipe, f.name)
            if f.name in ("content_layers", "style_layers"):
                mine, other = (", ".join(layer for layer, _ in named) for named in (mine, other))
            elif f.name in RecipeUpdate.__optional_keys__ or f.name == "time_budget":
                continue
            if mine != other:
                raise resume_refused(f"is of a job with {f.name} {mine or 'none'}, and this one has {other or 'none'}")
        if (self.content_digest, self.style_digests) != (job.content_digest, job.style_digests):
            raise resume_refused("is of a job with other images")
        if not all(map(math.isclose, _shares(self.style_weights), _shares(job.style_weights))):
            mine, other = (", ".join(f"{w:g}" for w in weights) for weights in (self.style_weights, job.style_weights))
            raise resume_refused(f"is of a job with style weights {mine}, and this one has {other}")
        state = JobState(job, tensors=dict(self.tensors), **self.counts)  # type: ignore[arg-type]
        before = sum(scale.iterations for scale in state.scales[: state.at])
        if state.at >= len(state.scales) or not 0 <= state.done - before <= state.scales[state.at].iterations:
            raise resume_refused(f"says iteration {state.done} at scale {state.at}, which the job does not have")
        if (self.width, self.height) != state.scales[state.at][:2]:
            expected = "x".join(map(str, state.scales[state.at][:2]))
            raise resume_refused(
                f"has a {self.width}x{self.height} picture, and the job a {expected} one at this scale"
            )
        unseen = state.done - state.gradients
        if (
            unseen < 0
            or state.averaged > state.done - before
            or not (state.diverged_at == 0 or unseen < state.diverged_at <= state.done)
        ):
            raise resume_refused("is damaged: its counts contradict each other")
        return state


def resume_refused(description: str) -> InvalidRequest:
    """The error for a checkpoint that cannot be used; ``description`` goes on from the name of its field."""
    return InvalidRequest([Violation(FIELD, description)])


def _shares(weights: tuple[float, ...]) -> list[float]:
    """Only proportions matter."""
    return [weight / sum(weights) for weight in weights]
