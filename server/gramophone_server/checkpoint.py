"""A job on its way as bytes, for another time or another server.

    magic, version   8 bytes
    length           4 bytes, little endian, of the header
    header           JSON: where the job stands, its recipe and seed, digests of its images and the styles' weights, "full"
                     or "light"
    tensors          their bytes in the order of `optimisers.layout`, or of a light one the picture, uint8 [H, W, 3]

Types and shapes of the tensors are not in it: they follow from recipe and size, so a checkpoint cannot ask for others.
A full one goes on bit for bit where the job stood, on the same kind of device in the same precision: 48 bytes a pixel
with Adam (13 MB at 512 x 512 px), 276 with L-BFGS (72 MB), 12 more with a running average. A light one has 3 bytes a pixel
(0.8 MB): the picture, rounded to 8 bits, and the iteration; the optimiser begins anew at it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramophone.recipe import LayerWeight, Normalisation, Optimiser, Pooling, Recipe, Start, Violation
from gramophone_server.errors import InvalidRequest
from gramophone_server.job import StyleJob
from gramophone_server.optimisers import State, layout
from gramophone_server.scales import shown
from gramophone_server.work import Tuning, Work

__all__ = ["Checkpoint", "read", "require_room", "size", "write"]

FIELD = "spec.resume"  # of a request, for those who are told that it will not do
MAGIC = b"GRAMCKP\x01"  # the last byte is the version: another layout of any optimiser's state is another version
MOST_HEADER = 64 * 1024  # bytes; 32 layers with their weights and everything else are 4 KB

COUNTS = ("at", "done", "gradients", "averaged", "diverged_at")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What was read from bytes and holds by itself; whether it is of a job is asked by `work`."""

    recipe: Recipe  # with what can be tuned as it was when this was written
    seed: int
    width: int  # of the picture, in pixels
    height: int
    content_digest: bytes  # of the job's images, see `job.digest`
    style_digests: tuple[bytes, ...]
    style_weights: tuple[float, ...]
    counts: dict[str, int]  # fields of `Work`
    tensors: State

    def work(self, job: StyleJob) -> Work:
        """The job where it stood. What can be tuned and the time budget are ``job``'s, so whoever wants it to go on as it
        was gives a job of this checkpoint's recipe; a start image it needs no more. Raises `InvalidRequest` for a job of
        other images, another blend of styles or another structure."""
        for f in dataclasses.fields(Recipe):
            mine, other = getattr(self.recipe, f.name), getattr(job.recipe, f.name)
            if f.name in ("content_layers", "style_layers"):
                mine, other = (", ".join(layer for layer, _ in named) for named in (mine, other))
            elif f.name in Tuning.__optional_keys__ or f.name == "time_budget":
                continue
            if mine != other:
                raise _refusal(f"is of a job with {f.name} {mine or 'none'}, and this one has {other or 'none'}")
        if (self.content_digest, self.style_digests) != (job.content_digest, job.style_digests):
            raise _refusal("is of a job with other images")
        if not all(map(math.isclose, _shares(self.style_weights), _shares(job.style_weights))):
            mine, other = (", ".join(f"{w:g}" for w in weights) for weights in (self.style_weights, job.style_weights))
            raise _refusal(f"is of a job with style weights {mine}, and this one has {other}")
        work = Work(job, tensors=dict(self.tensors), **self.counts)  # type: ignore[arg-type]
        before = sum(scale.iterations for scale in work.scales[: work.at])
        if work.at >= len(work.scales) or not 0 <= work.done - before <= work.scales[work.at].iterations:
            raise _refusal(f"says iteration {work.done} at scale {work.at}, which the job does not have")
        if (self.width, self.height) != work.scales[work.at][:2]:
            expected = "x".join(map(str, work.scales[work.at][:2]))
            raise _refusal(f"has a {self.width}x{self.height} picture, and the job a {expected} one at this scale")
        unseen = work.done - work.gradients
        if (
            unseen < 0
            or work.averaged > work.done - before
            or not (work.diverged_at == 0 or unseen < work.diverged_at <= work.done)
        ):
            raise _refusal("is damaged: its counts contradict each other")
        return work


def size(work: Work, *, light: bool = False) -> int:
    """Bytes that `write` makes, but for the header's few hundred."""
    width, height, _ = work.scales[work.at]
    return width * height * 3 if light else _bytes(layout(*_key(work.recipe), height, width))


def require_room(work: Work, *, light: bool = False, most_bytes: int) -> None:
    """Raises `InvalidRequest` if a checkpoint of the job takes more than ``most_bytes``."""
    total = len(MAGIC) + 4 + len(_header(work, light)) + size(work, light=light)
    if total > most_bytes:
        width, height, _ = work.scales[work.at]
        instead = "" if light else "; a light one is smaller"
        taken = f"of a {width}x{height} picture takes {total} bytes, at most {most_bytes} are allowed{instead}"
        raise InvalidRequest([Violation("checkpoint", taken)])


def write(work: Work, *, light: bool = False, picture: Tensor | None = None, most_bytes: int) -> bytes:
    """A job that is in no batch, such as one of `Batch.copy` or `Batch.leave`, as bytes.

    ``picture`` is what `Batch.snapshot` gives: with it, a light one needs no tensors. Raises `InvalidRequest` if the bytes
    are more than ``most_bytes``, and `ValueError` if the job has not begun.
    """
    if work.tensors is None and not (light and picture is not None):
        raise ValueError("only a job that has begun and is in no batch can be written")
    require_room(work, light=light, most_bytes=most_bytes)
    header = _header(work, light)
    parts = [MAGIC, len(header).to_bytes(4, "little"), header]
    tensors = {name: tensor.cpu() for name, tensor in (work.tensors or {}).items()}
    if light:
        if picture is None:
            image = shown(tensors, work.recipe.average, work.averaged, not work.diverged_at)
            picture = image.mul(255).round().to(torch.uint8).permute(1, 2, 0)
        parts.append(_to_bytes(picture))
    else:
        width, height, _ = work.scales[work.at]
        for name, like in layout(*_key(work.recipe), height, width).items():
            parts.append(_to_bytes(tensors[name]) if name in tensors else bytes(like.nbytes))
    return b"".join(parts)


def read(data: bytes, *, most_bytes: int) -> Checkpoint:
    """What `write` wrote, on the CPU. Takes no more memory than ``data`` has. Raises `InvalidRequest`."""
    if len(data) > most_bytes:
        raise _refusal(f"has {len(data)} bytes, at most {most_bytes} are taken")
    if data[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise _refusal("is not a checkpoint")
    if data[: len(MAGIC)] != MAGIC:
        raise _refusal(f"has version {data[len(MAGIC) - 1 : len(MAGIC)].hex() or 'none'}, this server reads version 01")
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if length > min(MOST_HEADER, len(data) - start):
        raise _refusal("is cut off or damaged: its header does not fit")
    try:
        header = json.loads(data[start : start + length])
        recipe = _recipe(header["recipe"])
        digests = [bytes.fromhex(text) for text in (header["content"], *header["styles"])]
        weights = tuple(_number(weight) for weight in header["style_weights"])
        counts = {name: _count(header[name]) for name in COUNTS}
        seed = _count(header["seed"], below=2**64)
        width, height, kind = _count(header["width"]), _count(header["height"]), header["kind"]
        if kind not in ("full", "light") or not width or not height:
            raise ValueError
        if len(weights) + 1 != len(digests) or not all(weight > 0 for weight in weights):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise _refusal("is damaged: its header cannot be read") from error
    body, pixels, light = len(data) - start - length, width * height, kind == "light"
    # A picture has fewer pixels than bytes: only then is the layout asked for, whose sizes must fit in 64 bits.
    if pixels > body or body != (3 * pixels if light else _bytes(layout(*_key(recipe), height, width))):
        raise _refusal(f"is cut off or damaged: {body} bytes of tensors do not make a {width}x{height} picture")
    tensors = (
        _light(data, start + length, height, width) if light else _full(data, start + length, recipe, height, width)
    )
    _check(tensors, counts)
    return Checkpoint(recipe, seed, width, height, digests[0], tuple(digests[1:]), weights, counts, tensors)


def _header(work: Work, light: bool) -> bytes:
    width, height, _ = work.scales[work.at]
    counts = {name: getattr(work, name) for name in COUNTS}
    if light:
        counts |= {"gradients": 0, "averaged": 0, "diverged_at": 0}
    return json.dumps({
        "kind": "light" if light else "full", "width": width, "height": height, **counts,
        "recipe": dataclasses.asdict(work.recipe), "seed": work.job.seed, "content": work.job.content_digest.hex(),
        "styles": [digest.hex() for digest in work.job.style_digests], "style_weights": work.job.style_weights,
    }).encode()  # fmt: skip


def _shares(weights: tuple[float, ...]) -> list[float]:
    """Only proportions matter."""
    return [weight / sum(weights) for weight in weights]


def _key(recipe: Recipe) -> tuple[Optimiser, float]:
    return recipe.optimiser, recipe.average


def _full(data: bytes, at: int, recipe: Recipe, height: int, width: int) -> State:
    tensors = {}
    for name, like in layout(*_key(recipe), height, width).items():
        # A `bytearray`, as a tensor must own memory that may be written to.
        raw = bytearray(memoryview(data)[at : at + like.nbytes])
        tensors[name] = torch.frombuffer(raw, dtype=like.dtype).view(like.shape)
        at += like.nbytes
    return tensors


def _light(data: bytes, at: int, height: int, width: int) -> State:
    picture = torch.frombuffer(bytearray(memoryview(data)[at:]), dtype=torch.uint8).view(height, width, 3)
    image = picture.permute(2, 0, 1).float().contiguous() / 255
    return {"image": image, "last_good": image}


def _check(tensors: State, counts: dict[str, int]) -> None:
    """What the kernels take for granted. `seen` is an index in L-BFGS's ring; one that is negative is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise _refusal(f"is damaged: {name} has values that are not finite")
        if name in ("image", "last_good") and not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise _refusal(f"is damaged: {name} has values outside of 0 to 1")
        if name == "seen" and not bool(((tensor >= 0) & (tensor <= counts["gradients"])).all()):
            raise _refusal("is damaged: it has more pairs than gradients")


def _recipe(fields: dict[str, Any]) -> Recipe:
    layers = {
        name: tuple(LayerWeight(str(layer), _number(weight)) for layer, weight in fields[name])
        for name in ("content_layers", "style_layers")
    }
    choices = {"normalisation": Normalisation, "pooling": Pooling, "start": Start, "optimiser": Optimiser}
    chosen = {name: choice(fields[name]) for name, choice in choices.items()}
    whole = {name: _count(fields[name]) for name in ("size", "iterations", "coarse_iterations", "smallest_size")}
    names = {f.name for f in dataclasses.fields(Recipe)}
    if names != fields.keys():
        raise ValueError
    numbers = {name: _number(fields[name]) for name in names - layers.keys() - chosen.keys() - whole.keys()}
    return Recipe(**layers, **chosen, **whole, **numbers)  # type: ignore[arg-type]


def _count(value: Any, below: int = 2**31) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _bytes(tensors: State) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _to_bytes(tensor: Tensor) -> bytes:
    """Without numpy, which torch does not need. Little endian, as every machine that torch runs on."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([Violation(FIELD, description)])
