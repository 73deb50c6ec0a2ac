"""What a server is and takes: frozen values; `messages` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gramophone.recipe import Recipe

__all__ = ["CacheStats", "Limits", "ServerInfo"]


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    max_image_bytes: int  # encoded
    max_image_pixels: int  # decoded
    max_size: int  # longest side of a result, in pixels
    max_styles: int
    max_iterations: int  # of a job, over all scales
    max_queued: int
    max_detach_s: int  # longest `detach_grace`
    max_kept_s: int  # for which a job is kept after its end
    max_kept: int  # jobs that are kept after their end
    max_kept_bytes: int  # of their results, counted as 3 per pixel
    max_blocked_s: int  # for which a reader may leave a message untaken
    max_running: int  # jobs that are worked on side by side
    max_paused_s: int  # for which a job may stand paused; then it goes on
    max_checkpoint_bytes: int  # in either direction
    max_uploads_bytes: int  # of uploaded images that are kept
    max_watchers: int  # of one job


@dataclass(frozen=True)
class CacheStats:
    """What a cache has done since the server started, and what it holds."""

    hits: int
    misses: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True)
class ServerInfo:
    """The server as it was at the moment of the call."""

    version: str
    device: str
    precision: str
    backbone: str
    weights: str  # source, sha256 and attribution
    layers: tuple[str, ...]  # from the first to the deepest
    limits: Limits
    presets: Mapping[str, Recipe]
    running_jobs: int
    queued_jobs: int
    paused_jobs: int
    style_cache: CacheStats  # Gram matrices of style images, on the device
    uploads: CacheStats  # images of `upload`; a hit is a job's image that was found
    estimated_wait_s: float | None  # of a job sent now; None if nothing was measured yet
