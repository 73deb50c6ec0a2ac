"""Small jobs: as requests of clients, and as the scheduler gets them."""

from __future__ import annotations

from typing import Any

import torch
from google.protobuf.duration_pb2 import Duration

from gramophone.recipe import Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState
from tests.support.pictures import png

LONG_GRACE = Duration(seconds=60)
SHORT_GRACE = Duration(nanos=50_000_000)


def spec(iterations: int = 5, **recipe: Any) -> pb.JobSpec:
    """A job of one scale that makes a picture of 64x32 pixels; keyword arguments are fields of its recipe."""
    recipe = {"size": 64, "smallest_size": 0, "iterations": iterations, **recipe}
    return pb.JobSpec(
        content=pb.ImageSource(data=png()),
        styles=[pb.StyleSource(image=pb.ImageSource(data=png(32, 32)))],
        recipe=overrides_to_message(recipe),
    )


def detachable_spec(iterations: int = 1000, grace: Duration = LONG_GRACE, **frames: Any) -> pb.JobSpec:
    """A job that outlives its watchers by `grace`, always with the same seed; keyword arguments are FrameOptions."""
    detachable = spec(iterations)
    detachable.seed = 7
    detachable.detach_grace.CopyFrom(grace)
    if frames:
        detachable.frames.CopyFrom(pb.FrameOptions(**frames))
    return detachable


def job_state(iterations: int = 3, **recipe: Any) -> JobState:
    """A job as an engine admits it, of one scale and 64x32 pixels; keyword arguments are fields of its recipe."""
    recipe = {"size": 64, "smallest_size": 0, "iterations": iterations, **recipe}
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    job = StyleJob(recipe=Recipe(**recipe), content=image, styles=(image,), style_weights=(1.0,), start=None, seed=1)
    return JobState(job)
