"""Settings of the server, and the fixed numbers that its rooms agree on.

Names, units, defaults, ranges and help texts of the settings are defined only here. `command_line` reads them, and
`memory_bound` computes what they allow. Standard library only.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gramophone.options import MESSAGE_BYTES
from gramophone.recipe import Range

__all__ = [
    "DECODER_BYTES",
    "DECODER_THREADS",
    "DECODING_BYTES_PER_PIXEL",
    "ENCODERS",
    "MAX_REFLECTION_CALLS",
    "METADATA_BYTES",
    "PROBE_READS",
    "QUICK_ENCODERS",
    "SMALL_DECODING_BYTES",
    "SMALL_READS",
    "STREAM_WINDOW_BYTES",
    "UNREAD_CHECKPOINTS",
    "UNREAD_FRAMES",
    "Limits",
    "Settings",
    "env_variable",
    "version",
]

# Threads of each kind that decode small images, and read headers and digests. More do not help while the compute thread
# uses the cores.
DECODER_THREADS = 2
# While an image is decoded: 21 measured with a transparent WebP or PNG that EXIF rotates and nothing reduces.
DECODING_BYTES_PER_PIXEL = 24
# Bytes of a process that decodes, besides those: libwebp builds 350 MiB of tables from 295 KB with every code.
DECODER_BYTES = 2**29
SMALL_DECODING_BYTES = 2**26  # while an image is decoded on a thread; what takes more is decoded in a process
ENCODERS = 2  # threads that encode pictures and write checkpoints; the compute thread uses the cores
QUICK_ENCODERS = 1  # further ones, for what takes up to 50 ms
STREAM_WINDOW_BYTES = 65_535  # of a call whose message nobody has asked for: what HTTP/2 starts with
METADATA_BYTES = 8192  # of one call; gRPC's own default. It refuses some calls above this, and all above twice this.
# Messages that arrive at the same time, of all methods without images. Honest ones come with their call, so a crowd of
# calls without messages passes through these as fast as gRPC delivers it, 1000 a second.
SMALL_READS = 32
PROBE_READS = 16  # the same of health checks
MAX_REFLECTION_CALLS = 64
UNREAD_FRAMES = UNREAD_CHECKPOINTS = 2  # different ones of a job that may wait for its watchers
MESSAGE_SLACK = 2**20  # bytes, for everything in a message but images and checkpoints


def env_variable(name: str) -> str:
    """The environment variable of a setting: "max_size" -> "GRAMOPHONE_MAX_SIZE"."""
    return f"GRAMOPHONE_{name.upper()}"


def _setting(default: Any, help_text: str, *, allowed: Range | None = None, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": help_text, "range": allowed, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one server. `Limits(max_size=1024)` has smaller results and the defaults of all other limits."""

    max_image_bytes: int = _setting(10 * 2**20, "largest encoded image in bytes", allowed=Range(1024, 256 * 2**20))
    max_image_pixels: int = _setting(32_000_000, "largest decoded image in pixels", allowed=Range(256, 2**28))
    max_size: int = _setting(2048, "largest longer side of a result in pixels", allowed=Range(16, 16383))
    max_styles: int = _setting(4, "most style images of a job", allowed=Range(1, 16))
    max_iterations: int = _setting(5000, "most iterations of a job, over all its scales", allowed=Range(1, 1_000_000))
    max_running: int = _setting(16, "jobs that run at the same time", allowed=Range(1, 256))
    max_queued: int = _setting(16, "jobs that may wait for others to end", allowed=Range(0, 1024))
    max_detach_s: int = _setting(600, "longest detach_grace of a job in seconds", allowed=Range(0, 86_400))
    max_kept_s: int = _setting(600, "seconds that a job is kept after its end", allowed=Range(0, 86_400))
    max_kept: int = _setting(64, "jobs that are kept after their end", allowed=Range(0, 10_000))
    max_kept_bytes: int = _setting(
        256 * 2**20, "bytes of the results of kept jobs, 3.3 per pixel, and of their events", allowed=Range(0, 2**36)
    )
    max_blocked_s: int = _setting(
        30, "seconds that a client may keep an event of a stream waiting", allowed=Range(1, 3600)
    )
    max_paused_s: int = _setting(600, "seconds that a job may be paused before it resumes", allowed=Range(1, 86_400))
    max_watchers: int = _setting(16, "watchers of one job", allowed=Range(1, 1024))
    max_checkpoint_bytes: int = _setting(64 * 2**20, "largest checkpoint in bytes", allowed=Range(65536, 2**30))
    max_uploads_bytes: int = _setting(
        128 * 2**20,
        "bytes of uploaded images and checkpoints that are kept; 0: none",
        allowed=Range(0, 2**36),
    )
    max_message_bytes: int = _setting(
        8 * 2**20, "largest message from a client in bytes; larger images are uploaded", allowed=MESSAGE_BYTES
    )
    max_receiving_bytes: int = _setting(
        256 * 2**20, "bytes of messages and uploads that are arriving or not handled yet", allowed=Range(2**24, 2**36)
    )
    max_sending_bytes: int = _setting(
        256 * 2**20, "bytes of frames, checkpoints and results on their way to clients", allowed=Range(2**24, 2**36)
    )
    max_decoded_bytes: int = _setting(
        2**30, "bytes of the decoded images of jobs that have not ended", allowed=Range(2**20, 2**40)
    )
    max_parked_bytes: int = _setting(
        4 * 2**30,
        "bytes of the states of jobs that are paused or have left the device for others",
        allowed=Range(0, 2**40),
    )
    max_decoders: int = _setting(
        2, "large images that are decoded at the same time, each in a process of its own", allowed=Range(1, 64)
    )
    max_idle_s: int = _setting(
        20, "seconds that a client may take to send a message that the server waits for", allowed=Range(1, 3600)
    )
    max_connections: int = _setting(512, "connections at the same time", allowed=Range(1, 65_536))
    max_calls: int = _setting(2048, "calls at the same time", allowed=Range(1, 65_536))
    max_calls_per_connection: int = _setting(256, "calls of one connection at the same time", allowed=Range(1, 65_536))

    @property
    def max_controllers(self) -> int:
        """Clients that control a job at the same time: one for each job that waits or runs."""
        return self.max_running + self.max_queued

    @property
    def max_arrived_calls(self) -> int:
        """Calls of one kind that have arrived and that no handler has seen: of the service, or one of two kinds of
        health checks. gRPC itself ends further ones, without a reason; it was seen to do so from half of this on."""
        return 2 * self.max_calls

    @property
    def max_probe_calls(self) -> int:
        """Health checks at the same time: each connection may have one that watches, and 256 may ask."""
        return self.max_connections + 256

    @property
    def response_bytes(self) -> int:
        """Largest response: a checkpoint, or a square result whose PNG is not smaller than its pixels."""
        return max(3 * self.max_size**2, self.max_checkpoint_bytes) + MESSAGE_SLACK


@dataclass(frozen=True, kw_only=True)
class Settings(Limits):
    """All settings of a server. `command_line.load` checks them."""

    host: str = _setting("127.0.0.1", "address to listen on, in plaintext")
    port: int = _setting(50051, "port to listen on, 0 for any free one", allowed=Range(0, 65535))
    engine: str = _setting(
        "vgg", "engine that makes the pictures; fake: patterns, to measure everything else", choices=("vgg", "fake")
    )
    iter_ms: float = _setting(
        5.0, "duration of an iteration of --engine fake in milliseconds", allowed=Range(0, 10_000)
    )
    device: str = _setting("auto", "device that makes the pictures", choices=("auto", "cpu", "cuda"))
    precision: str = _setting("auto", "precision of the network", choices=("auto", "fp32", "tf32", "bf16", "fp16"))
    weights: str = _setting("embedded", "embedded, imagenet, or the path of a .pth or .safetensors file")
    backbone: str = _setting("vgg19", "the network", choices=("vgg19", "vgg16"))
    launch_each: bool = _setting(False, "on a GPU, launch every kernel of an iteration instead of replaying a graph")
    library_ops: str = _setting("", "ops to run through torch's library, not by kernels: names with commas, or all")
    threads: int = _setting(0, "compute threads, 0 for one per core", allowed=Range(0, 1024))
    list_jobs: bool = _setting(False, "let clients list all jobs, and so watch and cancel them by their ids")
    reflection: bool = _setting(False, "let clients query the description of the service")
    metrics_port: int = _setting(
        -1,
        "port for /metrics, /healthz and /livez, in plain HTTP; 0 for any free one, -1 for none",
        allowed=Range(-1, 65535),
    )
    access_log: str = _setting("", "file for one line of JSON per call; - for standard error")
    drain_s: float = _setting(30.0, "seconds that jobs may continue after SIGTERM or SIGINT", allowed=Range(0, 3600))
    log_level: str = _setting("info", "lowest level that is logged", choices=("debug", "info", "warning", "error"))
    # For programs that start a server for themselves: it stops even if they are killed.
    stop_at_eof: bool = _setting(False, "stop at the end of standard input, as after SIGTERM")


@functools.cache  # a look-up takes 0.5 ms, and every result contains it
def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"
