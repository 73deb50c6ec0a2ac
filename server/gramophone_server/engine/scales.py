"""The picture of a job from scale to scale: its start, its resizing for the next scale, and what clients see of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Start
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, SlotTensors
from gramophone_server.engine.optimisers import resampled_state

__all__ = ["current_picture", "resize", "tensors_for_scale"]

# Standard deviation of the noise around mid-grey. The traces of white noise over the whole range take hundreds of plain
# steps to disappear.
NOISE_SPREAD = 0.05


@torch.inference_mode()
def tensors_for_scale(state: JobState, content: Tensor) -> SlotTensors:
    """The tensors with which a job joins a batch of its shape: those it has, resized if a new scale starts.

    ``content``: the job's content image at the size of the shape, float32 [1, 3, H, W]. The tensors are on its device.
    The job itself does not change.
    """
    height, width = content.shape[2:]
    if state.tensors is None:
        image = _start(state.job, content, width, height)[0]
        return {"image": image, "last_good": image}
    tensors = {name: tensor.to(content.device) for name, tensor in state.tensors.items()}
    if state.next_scale_index == state.scale_index:
        return tensors
    # The last iterate, not the average, because the optimiser's state belongs to it.
    image = F.interpolate(tensors["image"][None], (height, width), mode="bicubic").clamp_(0, 1)[0]
    return {"image": image, "last_good": image, **resampled_state(state.recipe.optimiser, tensors, height, width)}


@torch.inference_mode()
def current_picture(pictures: SlotTensors, average: float, averaged: int, alive: bool) -> Tensor:
    """The picture of a job as its clients see it, float32 [3, H, W].

    It is the running average of ``averaged`` iterates if the recipe has one (``average`` > 0), else the last iterate.
    For a job that diverged (not ``alive``) it is the last good iterate, which is in "image" then.
    """
    if not average or not averaged or not alive:
        return pictures["image"]
    return (pictures["mean"] / (1 - average**averaged)).clamp_(0, 1)  # corrects for the zeros at the start


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """Resizes an image, uint8 [3, h, w] -> float32 [1, 3, height, width] in [0, 1], bicubic with antialiasing."""
    x = image[None].float() / 255
    if (width, height) == (image.shape[2], image.shape[1]):
        return x
    # torch's kernel for GPUs keeps its weights in shared memory, which has room for a reduction by up to 47.
    if x.is_cuda and max(image.shape[1] / height, image.shape[2] / width) > 40:
        return resize(image.cpu(), width, height).to(image.device)
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp_(0, 1)


def _start(job: StyleJob, content: Tensor, width: int, height: int) -> Tensor:
    """The first picture, [1, 3, height, width].

    Noise is drawn on the CPU, so that a seed gives the same on every device.
    """
    match job.recipe.start:
        case Start.CONTENT:
            return content
        case Start.NOISE:
            generator = torch.Generator().manual_seed(job.seed % 2**63)
            noise = torch.randn((1, 3, height, width), generator=generator)
            return (0.5 + NOISE_SPREAD * noise).clamp_(0, 1).to(content.device)
        case Start.IMAGE:
            if job.start is None:
                raise ValueError("start is image, but the job has none")
            return resize(job.start.to(content.device), width, height)
