"""The terms of the objective J = alpha * J_content + beta * J_style + tv_weight * J_tv: formulas, and their factors.

F is a layer's activations, N channels by M pixels; G = F F^T / M is its Gram matrix, and A that of the style, divided
by the style's own number of pixels. So a style image of another size than the picture's counts as if it had as many
pixels, and every normalisation is one factor of sum (G - A)^2:

    NONE       M^2            the textbook's sum (F F^T - M A)^2
    GATYS      1 / (4 N^2)    the textbook's sum / (4 N^2 M^2): Gatys, Ecker, Bethge 2015, arXiv:1508.06576, equation 4
    ELEMENTS   1 / N^4        F F^T / (N M), and the mean over its N^2 entries, as in jcjohnson/neural-style
    RELATIVE   1 / sum A^2    equal weights look alike at every size, for every layer and every painting

The factors of the content's sum (F - T)^2, where T is the content's activations: 1/2, 1/2, 1 / (N M), 1 / sum T^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramophone.recipe import Normalisation

__all__ = ["content_factor", "gram_scale", "style_factor"]

EPSILON = 1e-12  # keeps RELATIVE finite for a target that is zero everywhere, such as a layer of a black image


def gram_scale(pixels: int) -> float:
    """The scale of `ops.gram` for G as defined above, for a layer of ``pixels``."""
    return 1.0 / pixels


def style_factor(normalisation: Normalisation, target: Tensor, pixels: int) -> Tensor:
    """The factor of sum (G - A)^2, float32 [B], for ``target`` A [B, N, N] and a layer of ``pixels`` M."""
    channels = target.shape[1]
    match normalisation:
        case Normalisation.NONE:
            return target.new_full((target.shape[0],), float(pixels) ** 2)
        case Normalisation.GATYS:
            return target.new_full((target.shape[0],), 1 / (4 * channels**2))
        case Normalisation.ELEMENTS:
            return target.new_full((target.shape[0],), 1 / channels**4)
        case Normalisation.RELATIVE:
            return 1 / target.square().sum((1, 2)).clamp_min(EPSILON)


def content_factor(normalisation: Normalisation, target: Tensor, gain: float) -> Tensor:
    """The factor of sum (F - T)^2, float32 [B], for ``target`` T [B, N, H, W].

    F and T are kept ``gain`` times smaller than they are; see `VggFeatures.gain`.
    """
    jobs, elements = target.shape[0], target[0].numel()
    match normalisation:
        case Normalisation.NONE | Normalisation.GATYS:
            return torch.full((jobs,), 0.5 * gain**2, device=target.device)
        case Normalisation.ELEMENTS:
            return torch.full((jobs,), gain**2 / elements, device=target.device)
        case Normalisation.RELATIVE:
            return 1 / target.float().square().sum((1, 2, 3)).clamp_min(EPSILON)
