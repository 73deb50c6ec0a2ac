"""A job for tests of checkpoints, and checkpoints with other fields in their header."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from gramophone.recipe import Optimiser
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.engine.optimisers import slot_layout

MAX_BYTES = 2**24  # more than the checkpoint of `lbfgs_state`


def lbfgs_state(make_job: Callable[..., StyleJob]) -> JobState:
    """A job with L-BFGS after three iterations at its second scale, 48 x 40 px."""
    job = make_job(optimiser=Optimiser.LBFGS, average=0.0, smallest_size=34, coarse_iterations=4, iterations=6)
    tensors = {
        name: torch.zeros(like.shape, dtype=like.dtype) for name, like in slot_layout(job.recipe, 40, 48).items()
    }
    tensors["image"] = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    return JobState(job, scale_index=1, done=7, gradients=7, averaged=3, tensors=tensors)


def header(data: bytes) -> dict[str, object]:
    """The header of a checkpoint."""
    fields: dict[str, object] = json.loads(data[12 : 12 + int.from_bytes(data[8:12], "little")])
    return fields


def with_fields(data: bytes, **fields: object) -> bytes:
    """The checkpoint with other fields in its header."""
    length = int.from_bytes(data[8:12], "little")
    changed = json.dumps(header(data) | fields).encode()
    return data[:8] + len(changed).to_bytes(4, "little") + changed + data[12 + length :]
