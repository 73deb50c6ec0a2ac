"""Makes the job that a call sends, and sends again if it is lost."""

from __future__ import annotations

import asyncio
import uuid

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.values import shown
from gramophone_client.errors import InvalidRequestError
from gramophone_client.streams.recovery import ResendableJob
from gramophone_client.transport.attachments import Attachments, detach
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import job_spec, uploaded_images
from gramophone_client.types.options import CheckpointOptions, FrameOptions, ImageInput, JobOptions, Styles

__all__ = ["prepare_job"]


async def prepare_job(
    connection: Connection,
    content: ImageInput,
    styles: Styles,
    options: JobOptions,
    *,
    patience_s: float,
    request_id: str | None,
    frames: FrameOptions | None = None,
    checkpoints: CheckpointOptions | None = None,
) -> ResendableJob:
    """Reads the job's files and builds its message, without those that are too large for it. Raises the error of a
    client that cannot be used here.

    Then waits until the channel is connected or has failed, so that a later loss can be told from a server that was
    never there; see `Recovery`.
    """
    connection.check()
    if request_id is not None and not (isinstance(request_id, str) and request_id.isascii()):
        rule = f"must be the text of a UUID, got {shown(request_id)}"
        rule += "" if isinstance(request_id, str) else "; write str(...)"
        raise InvalidRequestError(f"request_id: {rule}", violations=(Violation("request_id", rule),))
    spec, attachments = await asyncio.to_thread(_read, content, styles, options, frames, checkpoints)
    if connection.max_retries == 0:
        patience_s = 0.0
    else:
        await connection.wait_until_connected()
    return ResendableJob(spec, str(uuid.uuid4()) if request_id is None else request_id, attachments, patience_s)


def _read(
    content: ImageInput,
    styles: Styles,
    options: JobOptions,
    frames: FrameOptions | None,
    checkpoints: CheckpointOptions | None,
) -> tuple[pb.JobSpec, Attachments]:
    """The job's message, and what it names by digest only."""
    spec = job_spec(content, styles, options, frames=frames, checkpoints=checkpoints)
    return spec, uploaded_images(content, styles, options.get("start_image")) | detach(spec)
