"""The images and the checkpoint of a job: which travel in its request, and which are uploaded and named by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from gramophone.options import INLINE_BYTES
from gramophone.v1 import style_transfer_pb2 as pb

__all__ = ["Attachment", "Attachments", "detach", "named"]


class Attachment(NamedTuple):
    """An image or a checkpoint that a request names by its digest."""

    field: str  # its path in the request if it were sent there: "spec.content.data"
    data: bytes


Attachments = dict[str, Attachment]
"""Attachments by their digests."""


class Part(NamedTuple):
    """A field of a request that has an image or the checkpoint."""

    field: str
    data: bytes
    name: Callable[[str], None]  # replaces the data by its digest


def detach(spec: pb.JobSpec, max_bytes: int = INLINE_BYTES) -> Attachments:
    """Replaces images and the checkpoint in a spec by their digests, the largest first, until the rest of them has at
    most `max_bytes`. Returns what it has replaced; equal files are one. Takes 1 ms per MiB, so it is for a thread."""
    attachments: Attachments = {}
    if spec.ByteSize() <= max_bytes:  # does not copy the bytes, as reading the fields does
        return attachments
    parts: dict[bytes, list[Part]] = {}
    for part in _parts(spec):
        parts.setdefault(part.data, []).append(part)
    left = sum(len(data) * len(same) for data, same in parts.items())
    for data, same in sorted(parts.items(), key=lambda item: len(item[0]), reverse=True):
        if left <= max_bytes:
            break
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        attachments[digest] = Attachment(same[0].field, data)
        for part in same:
            part.name(digest)
        left -= len(data) * len(same)
    return attachments


def named(spec: pb.JobSpec) -> set[str]:
    """The digests in a spec."""
    images = (spec.content, spec.start_image, *(style.image for style in spec.styles))
    return {digest for digest in (*(image.digest for image in images), spec.resume_digest) if digest}


def _parts(spec: pb.JobSpec) -> Iterator[Part]:
    yield from (
        Part(f"{field}.data", image.data, partial(setattr, image, "digest"))
        for field, image in (
            ("spec.content", spec.content),
            ("spec.start_image", spec.start_image),
            *((f"spec.styles[{i}].image", style.image) for i, style in enumerate(spec.styles)),
        )
        if image.HasField("data")
    )
    if spec.HasField("resume"):

        def name_checkpoint(digest: str) -> None:
            spec.ClearField("resume")
            spec.resume_digest = digest

        yield Part("spec.resume", spec.resume, name_checkpoint)
