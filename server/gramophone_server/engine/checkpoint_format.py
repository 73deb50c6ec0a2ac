"""The format of checkpoints: the state of a job as bytes, to continue it later or on another server.

    magic, version   8 bytes
    length           4 bytes, little endian, of the header
    header           JSON: the job's counts, its recipe and seed, the digests of its images, the styles' weights, and
                     "full" or "light"
    tensors          their bytes in the order of the engine's layout; in a light checkpoint the picture, uint8 [H, W, 3]

Types and shapes of the tensors are not stored: they follow from the recipe and the size, so a checkpoint cannot ask for
others. A job continues from a full checkpoint bit for bit, on the same kind of device in the same precision. A full one
has 48 bytes per pixel with Adam (13 MB at 512 x 512 px), 276 with L-BFGS (72 MB), and 12 more with a running average. A
light one has 3 bytes per pixel (0.8 MB): the picture, rounded to 8 bits, and the iteration; the optimiser starts anew
from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gramophone.recipe import FIELD_TYPES, Recipe, Violation
from gramophone_server.domain.byte_copies import fill, memory_of, pieces
from gramophone_server.domain.checkpoint import CHECKPOINT_START, Checkpoint, InvalidCheckpoint
from gramophone_server.domain.job_state import JobState, SlotTensors
from gramophone_server.errors import InvalidRequest

__all__ = ["CheckpointFormat"]

MAGIC = (
    CHECKPOINT_START + b"\x01"
)  # the last byte is the version; a new layout of any optimiser's state needs a new version
MAX_HEADER_BYTES = 64 * 1024  # accepted by `read`; a header with 32 layers and their weights has 4 KB
HEADER_ROOM = 8192  # bytes that `fits` counts for a header
# The keys of the header for counts, and the fields of `JobState` that hold them.
COUNTS = {
    "at": "scale_index",
    "done": "done",
    "gradients": "gradients",
    "averaged": "averaged",
    "diverged_at": "diverged_at",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a checkpoint; see `Checkpoint`."""

    length: int  # bytes before the tensors
    recipe: Recipe
    seed: int
    width: int
    height: int
    light: bool
    digests: tuple[bytes, ...]  # of the content image, and of the styles
    weights: tuple[float, ...]
    counts: dict[str, int]


class CheckpointFormat:
    """Writes and reads checkpoints; implements `engine_api.Checkpoints`."""

    def __init__(self, layout: Callable[[Recipe, int, int], SlotTensors]) -> None:
        """``layout``: returns the tensors of a slot for a recipe, a height and a width, on the meta device."""
        self._layout = layout

    def fits(self, state: JobState, *, light: bool = False, max_bytes: int) -> bool:
        """Whether a checkpoint of the job takes at most ``max_bytes``, as `most_bytes` counts."""
        return self.most_bytes(state, light=light) <= max_bytes

    def most_bytes(self, state: JobState, *, light: bool = False) -> int:
        """Upper bound of the bytes of a checkpoint of the job. It counts `HEADER_ROOM` for the header, which is not
        built: that would hash the images of the job, 2 ms a megapixel."""
        return HEADER_ROOM + self.tensor_bytes(state, light)

    def size(self, state: JobState, *, light: bool = False) -> int:
        """Bytes of a checkpoint of the job, including its header. The first call for a job hashes its images."""
        return len(MAGIC) + 4 + len(_header(state, light)) + self.tensor_bytes(state, light)

    def require_room(self, state: JobState, *, light: bool = False, max_bytes: int) -> None:
        """Raises `InvalidRequest` if a checkpoint of the job takes more than ``max_bytes``."""
        total = self.size(state, light=light)
        if total > max_bytes:
            width, height, _ = state.scales[state.scale_index]
            instead = "" if light else "; a light one is smaller"
            description = f"of a {width}x{height} picture takes {total} bytes, at most {max_bytes} are allowed{instead}"
            raise InvalidRequest([Violation("checkpoint", description)])

    def write(self, state: JobState, *, picture: Tensor | None = None, max_bytes: int) -> bytes:
        """The checkpoint of a job that is in no batch, such as one from `Batch.copy` or `Batch.leave`.

        With ``picture``, uint8 [height, width, 3] from `Batch.snapshot`, the checkpoint is light and needs no tensors.
        Raises `InvalidRequest` if it takes more than ``max_bytes``, and `ValueError` for a full checkpoint of a job
        that has not started or is in a batch.
        """
        light = picture is not None
        if state.tensors is None and not light:
            raise ValueError("only a job that has started and is in no batch can be written")
        self.require_room(state, light=light, max_bytes=max_bytes)
        header = _header(state, light)
        parts = [MAGIC, len(header).to_bytes(4, "little"), header]
        if picture is not None:
            parts += pieces(memory_of(picture.contiguous()))
        else:
            width, height, _ = state.scales[state.scale_index]
            tensors = {name: tensor.cpu().contiguous() for name, tensor in (state.tensors or {}).items()}
            for name, like in self._layout(state.recipe, height, width).items():
                parts += pieces(memory_of(tensors[name])) if name in tensors else [bytes(like.nbytes)]
        return b"".join(parts)

    def picture_size(self, data: bytes, *, max_bytes: int) -> tuple[int, int]:
        """(width, height) in pixels of the picture of a checkpoint, from its header, in less than a millisecond.

        Raises `InvalidCheckpoint` as `read` does, except for values of the tensors, which are not looked at.
        """
        header = self._read_header(data, max_bytes)
        return header.width, header.height

    def read(self, data: bytes, *, max_bytes: int) -> Checkpoint:
        """Reads bytes from `write`. The tensors are on the CPU and take no more memory than ``data``.

        Raises `InvalidCheckpoint` if the bytes are more than ``max_bytes``, or are not a whole checkpoint.
        """
        header = self._read_header(data, max_bytes)
        width, height, recipe, counts = header.width, header.height, header.recipe, header.counts
        tensors = (
            _light(data, header.length, height, width)
            if header.light
            else _full(data, header.length, self._layout(recipe, height, width))
        )
        _check(tensors, counts)
        return Checkpoint(
            recipe, header.seed, width, height, header.digests[0], header.digests[1:], header.weights, counts, tensors
        )

    def _read_header(self, data: bytes, max_bytes: int) -> Header:
        """The header of a checkpoint whose tensors have the number of bytes that it needs. Raises
        `InvalidCheckpoint`."""
        if len(data) > max_bytes:
            raise InvalidCheckpoint(f"has {len(data)} bytes, at most {max_bytes} are allowed")
        if not data.startswith(CHECKPOINT_START):
            raise InvalidCheckpoint("is not a checkpoint")
        if data[: len(MAGIC)] != MAGIC:
            raise InvalidCheckpoint(
                f"has version {data[len(MAGIC) - 1 : len(MAGIC)].hex() or 'none'}, this server reads version 01"
            )
        start = len(MAGIC) + 4
        length = int.from_bytes(data[len(MAGIC) : start], "little")
        if length > min(MAX_HEADER_BYTES, len(data) - start):
            raise InvalidCheckpoint("is cut off or damaged: its header does not fit")
        try:
            header = _parsed(json.loads(data[start : start + length]), start + length)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise InvalidCheckpoint("is damaged: its header cannot be read") from error
        width, height = header.width, header.height
        body, pixels = len(data) - header.length, width * height
        # A picture has fewer pixels than bytes. This is checked before the layout is made, whose sizes must fit in 64
        # bits.
        if pixels > body or body != (
            3 * pixels if header.light else _bytes(self._layout(header.recipe, height, width))
        ):
            raise InvalidCheckpoint(
                f"is cut off or damaged: {body} bytes of tensors do not make a {width}x{height} picture"
            )
        return header

    def tensor_bytes(self, state: JobState, light: bool = False) -> int:
        """Bytes of a checkpoint of the job without its header: of the tensors of its current scale, or of a light
        checkpoint's picture. Costs microseconds."""
        width, height, _ = state.scales[state.scale_index]
        return width * height * 3 if light else _bytes(self._layout(state.recipe, height, width))


def _parsed(fields: dict[str, Any], length: int) -> Header:
    """The header with these fields. Raises `ValueError`, or another error of a conversion, if one is invalid."""
    digests = tuple(bytes.fromhex(text) for text in (fields["content"], *fields["styles"]))
    weights = tuple(_number(weight) for weight in fields["style_weights"])
    width, height, kind = _count(fields["width"]), _count(fields["height"]), fields["kind"]
    if kind not in ("full", "light") or not width or not height:
        raise ValueError
    if len(weights) + 1 != len(digests) or not all(weight > 0 for weight in weights):
        raise ValueError
    return Header(
        length=length,
        recipe=_recipe(fields["recipe"]),
        seed=_count(fields["seed"], below=2**64),
        width=width,
        height=height,
        light=kind == "light",
        digests=digests,
        weights=weights,
        counts={field: _count(fields[key]) for key, field in COUNTS.items()},
    )


def _header(state: JobState, light: bool) -> bytes:
    width, height, _ = state.scales[state.scale_index]
    counts = {key: getattr(state, field) for key, field in COUNTS.items()}
    if light:
        counts |= {"gradients": 0, "averaged": 0, "diverged_at": 0}
    return json.dumps({
        "kind": "light" if light else "full", "width": width, "height": height, **counts,
        "recipe": dataclasses.asdict(state.recipe), "seed": state.job.seed, "content": state.job.content_digest.hex(),
        "styles": [digest.hex() for digest in state.job.style_digests], "style_weights": state.job.style_weights,
    }).encode()  # fmt: skip


def _full(data: bytes, at: int, layout: SlotTensors) -> SlotTensors:
    tensors = {}
    for name, like in layout.items():
        tensor = torch.empty(like.shape, dtype=like.dtype)
        tensors[name] = fill(tensor, memoryview(data)[at : at + like.nbytes])
        at += like.nbytes
    return tensors


def _light(data: bytes, at: int, height: int, width: int) -> SlotTensors:
    picture = fill(torch.empty((height, width, 3), dtype=torch.uint8), memoryview(data)[at:])
    image = picture.permute(2, 0, 1).float().contiguous() / 255
    return {"image": image, "last_good": image}


def _check(tensors: SlotTensors, counts: dict[str, int]) -> None:
    """Raises `InvalidCheckpoint` for values that the kernels do not check. L-BFGS uses `seen` as an index into its
    ring of pairs."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InvalidCheckpoint(f"is damaged: {name} has values that are not finite")
        if name in ("image", "last_good") and not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise InvalidCheckpoint(f"is damaged: {name} has values outside of 0 to 1")
        if name == "seen" and not bool(((tensor >= 0) & (tensor <= counts["gradients"])).all()):
            raise InvalidCheckpoint("is damaged: it has more pairs than gradients")


def _recipe(fields: dict[str, Any]) -> Recipe:
    """A field that is missing is newer than the checkpoint. Its default stands for what all servers did before."""
    if fields.keys() - FIELD_TYPES.keys():
        raise ValueError
    return Recipe(**fields)


def _count(value: Any, below: int = 2**31) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _bytes(tensors: SlotTensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
