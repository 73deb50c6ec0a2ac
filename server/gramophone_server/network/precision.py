"""The numeric types of the network.

A mode has one type for the forward pass and one for the backward pass. Gram matrices, losses and the picture itself are
float32 in every mode.

    mode   forward    backward   relative error of the gradient against fp32 (192 px, benchmarks/RESULTS.md)
    fp32   float32    float32    -
    tf32   float32    float32    0.015 to 0.04: the GPU's tensor cores multiply with 10 bits of mantissa
    fp16   float16    bfloat16   0.02 to 0.035: the forward pass needs mantissa, the backward pass needs range
    bf16   bfloat16   bfloat16   0.07 to 0.13
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gramophone_server.errors import StartupError

__all__ = ["MODES", "Precision", "choose_precision", "cpu_multiplies_bf16"]


@dataclass(frozen=True)
class Precision:
    """A mode: the types of activations and of their gradients."""

    name: str  # as in `MODES`
    forward: torch.dtype  # of activations
    backward: torch.dtype  # of gradients


MODES = {
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "tf32": Precision("tf32", torch.float32, torch.float32),
    "fp16": Precision("fp16", torch.float16, torch.bfloat16),
    "bf16": Precision("bf16", torch.bfloat16, torch.bfloat16),
}
CPU_MODES = ("fp32", "bf16")
TENSOR_CORES = (8, 0)  # the first compute capability whose tensor cores multiply tf32 and bfloat16


def choose_precision(name: str, device: torch.device) -> Precision:
    """The mode ``name``, or for "auto" the fastest one whose pictures are as good as those of fp32 on this device.

    That is fp16 on a GPU (the picture after a whole run is as close to that of fp32 as that of tf32 is:
    tests/engine/test_numerics.py), bf16 on a CPU with instructions for it, else fp32. On a GPU this sets the
    process-wide switches of cuDNN and cuBLAS. Raises `StartupError` if the device cannot run the mode.
    """
    on_gpu = device.type == "cuda"
    capable = on_gpu and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    if name == "auto":
        name = ("fp16" if capable else "fp32") if on_gpu else "bf16" if cpu_multiplies_bf16() else "fp32"
    possible = tuple(MODES) if on_gpu else CPU_MODES
    if name not in possible:
        raise StartupError(f"precision on {device.type} must be auto, {' or '.join(possible)}, got {name!r}")
    if on_gpu:
        if name != "fp32" and not capable:
            major, minor = torch.cuda.get_device_capability(device)
            raise StartupError(
                f"precision {name} needs a GPU of compute capability 8.0 or newer, this one has {major}.{minor}; "
                "run the server with --precision fp32"
            )
        # By default torch runs a float32 convolution in tf32, but not a float32 matmul.
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        # The same seed must give the same picture; all other kernels here add in a fixed order anyway.
        torch.backends.cudnn.deterministic = True
    return MODES[name]


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16; without either bf16 is slower than fp32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
