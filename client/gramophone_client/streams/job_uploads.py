"""Uploads what the server of a job is missing."""

from __future__ import annotations

import logging
import time

from gramophone.options import INLINE_BYTES
from gramophone.recipe import Violation
from gramophone_client.errors import ImageNotFoundError, InvalidRequestError
from gramophone_client.transport.attachments import Attachments
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.uploads import upload_once
from gramophone_client.types.updates import UploadProgress

__all__ = ["JobUploads"]

log: logging.Logger = logging.getLogger("gramophone_client")

# Rounds of uploads for one call. The server may remove a file for the uploads of others before the job arrives. Or a
# proxy sends each call to the next of several servers. Then an upload and its job may never meet, so the second round
# uploads each file twice, and the third three times, which reaches three servers.
MAX_ROUNDS = 3


class JobUploads:
    """The uploads of one job: of the images and the checkpoint that its request names by digest only.

    The job is sent first, and what its server is missing is uploaded when the server has answered so. For a server that
    has nothing, this takes one round trip more than uploading at once, beside the many of a transfer of more than
    4 MiB. For one that has them, from an earlier job with the same photo or from before a retry, it saves the transfer.
    And a server that would refuse the job, because it is full, shuts down or finds an error in it, is not sent any.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.progress: UploadProgress | None = None  # None unless something is being uploaded
        self._connection = connection
        self._timeout_s = timeout_s
        self._rounds = 0

    def start_call(self) -> None:
        """The next call may reach another server."""
        self._rounds = 0

    async def send_missing(self, error: ImageNotFoundError, attachments: Attachments, left_s: float, job: str) -> None:
        """Uploads what the server is missing, within `left_s` seconds. `job` is its name in the log.

        Raises `ImageNotFoundError` if that does not help, and the error of an upload.
        """
        missing = {name: attachments[name] for name in error.digests or attachments if name in attachments}
        if not missing:
            raise error
        if self._rounds == MAX_ROUNDS:
            raise _of_full_store(error, attachments)
        self._rounds += 1
        total = self._rounds * sum(len(attachment.data) for attachment in missing.values())
        log.info("%s: uploads %d files (%.1f MiB) that its server does not have", job, len(missing), total / 2**20)
        end_s, sent = time.monotonic() + left_s, 0

        def on_sent(count: int) -> None:
            nonlocal sent
            sent += count
            self.progress = UploadProgress(sent, total)

        on_sent(0)
        try:
            for digest, attachment in (file for file in missing.items() for _ in range(self._rounds)):
                left_s = max(0.0, end_s - time.monotonic())
                try:
                    await upload_once(
                        self._connection,
                        digest,
                        attachment.data,
                        left_s,
                        timeout_s=self._timeout_s,
                        on_sent=on_sent,
                    )
                except InvalidRequestError as refusal:
                    raise _of_field(refusal, attachment.field) from refusal
        finally:
            self.progress = None


def _of_field(refusal: InvalidRequestError, field: str) -> InvalidRequestError:
    """The refusal of an upload as that of a field of the job's request."""
    kind = "is not taken as a checkpoint: " if field == "spec.resume" else ""
    reason = f"uploaded, because images and checkpoints of more than {INLINE_BYTES / 2**20:g} MiB are"
    violations = tuple(
        Violation(field, f"{kind}{violation.description} ({reason})") for violation in refusal.violations
    )
    text = "; ".join(f"{field}: {violation.description}" for violation in violations) or str(refusal)
    return InvalidRequestError(text, code=refusal.code, reason=refusal.reason, violations=violations)


def _of_full_store(error: ImageNotFoundError, attachments: Attachments) -> ImageNotFoundError:
    """The error of a server that does not keep what was uploaded, with what may be the cause."""
    total = sum(len(attachment.data) for attachment in attachments.values())
    text = (
        f"{error}. It was uploaded before each of {MAX_ROUNDS} attempts: the server keeps too few bytes of uploads "
        f"(its setting GRAMOPHONE_MAX_UPLOADS_BYTES) for the {total / 2**20:.1f} MiB of this job beside those of other "
        "jobs, or a proxy sends each call to another server"
    )
    full = ImageNotFoundError(text, code=error.code, reason=error.reason)
    full.digests = error.digests
    return full
