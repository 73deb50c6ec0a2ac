"""From scale to scale: how a picture begins, how it goes on at the next size, and what of it is shown."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gramophone.recipe import Start
from gramophone_server.domain.job import SMALLEST_SIDE, StyleJob, fit
from gramophone_server.domain.job_state import JobState, SlotTensors
from gramophone_server.engine.optimisers import carried

__all__ = ["prepared", "resize", "shown", "style_size"]

# Of the noise around mid-grey. White noise over the whole range takes hundreds of plain steps to be forgotten.
NOISE_SPREAD = 0.05


@torch.inference_mode()
def prepared(work: JobState, content: Tensor) -> SlotTensors:
    """The tensors that a job joins a batch of its shape with, on the device of ``content``, its image at that size,
    float32 [1, 3, H, W]. The job itself stays as it is."""
    height, width = content.shape[2:]
    if work.tensors is None:
        image = _start(work.job, content, width, height)[0]
        return {"image": image, "last_good": image}
    tensors = {name: tensor.to(content.device) for name, tensor in work.tensors.items()}
    if work.next_at == work.at:
        return tensors
    # The last iterate, not the average: it is what the optimiser's state is of.
    image = F.interpolate(tensors["image"][None], (height, width), mode="bicubic").clamp_(0, 1)[0]
    return {"image": image, "last_good": image, **carried(work.recipe.optimiser, tensors, height, width)}


@torch.inference_mode()
def shown(pictures: SlotTensors, average: float, averaged: int, alive: bool) -> Tensor:
    """What is seen of a job, [3, H, W]: the average of ``averaged`` iterates where its recipe has one, else the last
    iterate, and of a job that diverged the last good one."""
    if not average or not averaged or not alive:
        return pictures["image"]
    return (pictures["mean"] / (1 - average**averaged)).clamp_(0, 1)  # without the zeros that it began with


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """uint8 [3, h, w] -> float32 [1, 3, height, width] in [0, 1], bicubic with antialiasing."""
    x = image[None].float() / 255
    if (width, height) == (image.shape[2], image.shape[1]):
        return x
    # torch's kernel for GPUs keeps its weights in shared memory, which is enough for a reduction by 47.
    if x.is_cuda and max(image.shape[1] / height, image.shape[2] / width) > 40:
        return resize(image.cpu(), width, height).to(image.device)
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp_(0, 1)


def style_size(style: Tensor, longest: int, scale: float) -> tuple[int, int]:
    """(width, height) at which a style image is looked at, for a picture whose longest side is ``longest`` pixels."""
    width, height = fit(style.shape[2], style.shape[1], round(longest * scale))
    return max(width, SMALLEST_SIDE), max(height, SMALLEST_SIDE)


def _start(job: StyleJob, content: Tensor, width: int, height: int) -> Tensor:
    """[1, 3, height, width]. Noise is drawn on the CPU, so that a seed means the same picture on every device."""
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
