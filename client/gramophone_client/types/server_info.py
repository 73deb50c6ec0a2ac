"""The properties and limits of a server, as frozen values; `transport.parsing` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gramophone.recipe import Recipe

__all__ = ["CacheStats", "Limits", "ServerInfo"]


@dataclass(frozen=True)
class Limits:
    """The limits of a server."""

    max_image_bytes: int  # encoded
    max_image_pixels: int  # decoded
    max_size: int  # longest side of a result, in pixels
    max_styles: int
    max_iterations: int  # of a job, over all scales
    max_queued: int
    max_detach_s: int  # longest `detach_grace`
    max_kept_s: int  # how long a job is kept after its end
    max_kept: int  # jobs that are kept after their end
    max_kept_bytes: int  # of the results of kept jobs, counted as 3 per pixel
    max_blocked_s: int  # how long a reader may keep an event waiting
    max_running: int  # jobs that run at the same time
    max_paused_s: int  # how long a job may be paused; then it continues
    max_checkpoint_bytes: int  # in either direction
    max_uploads_bytes: int  # of all uploaded images that are kept
    max_watchers: int  # of one job
    max_message_bytes: int  # of a message from a client; larger images and checkpoints are uploaded
    max_receiving_bytes: int  # of all messages and uploads that are arriving or not handled yet
    max_sending_bytes: int  # of all frames, checkpoints and results on their way to clients
    max_decoded_bytes: int  # of the decoded images of all jobs that have not ended
    max_idle_s: int  # how long a client may take to send a message that the server waits for
    max_connections: int
    max_calls: int  # at the same time
    max_calls_per_connection: int
    max_parked_bytes: int  # of the states of all jobs that are paused or have left the device for others
    max_decoders: int  # large images that are decoded at the same time


@dataclass(frozen=True)
class CacheStats:
    """Counts of a cache since the server started, and its current size."""

    hits: int
    misses: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """The server at the time of the call. Its `repr` has what fits on a line."""

    version: str
    device: str
    precision: str
    backbone: str
    weights: str = field(repr=False)  # source, sha256 and attribution
    layers: tuple[str, ...] = field(repr=False)  # in the order of the network
    limits: Limits = field(repr=False)
    presets: Mapping[str, Recipe] = field(repr=False)
    running_jobs: int
    queued_jobs: int
    paused_jobs: int
    style_cache: CacheStats = field(repr=False)  # Gram matrices of style images, on the device
    uploads: CacheStats = field(repr=False)  # images of `upload`; a hit is an image of a job that was found
    estimated_wait_s: float | None  # of a job sent now; None before the first measurement
    # The ops that run through torch's library instead of a kernel of the server, which is slower, and the reasons.
    library_ops: Mapping[str, str] = field(repr=False)
    self_test_s: float  # how long the self-test of the kernels took when the server started
