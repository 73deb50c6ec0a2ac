"""The bound of the server's resident memory, computed from its settings. Standard library only.

Each part says which settings it follows from. What is measured, and not a setting, is a constant here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gramophone_server.config import (
    DECODER_BYTES,
    DECODER_THREADS,
    DECODING_BYTES_PER_PIXEL,
    ENCODERS,
    MAX_REFLECTION_CALLS,
    METADATA_BYTES,
    PROBE_READS,
    QUICK_ENCODERS,
    SMALL_DECODING_BYTES,
    SMALL_READS,
    STREAM_WINDOW_BYTES,
    UNREAD_CHECKPOINTS,
    UNREAD_FRAMES,
    Limits,
    Settings,
)

__all__ = ["MemoryTerm", "comments", "decoding_bytes", "memory_bytes", "memory_terms", "request_memory_bytes"]

PROCESS_BYTES = {"vgg": 1200 * 2**20, "fake": 620 * 2**20}  # by engine; 894 and 530 MiB measured before the first call
CONNECTION_BYTES = 2**16  # 16 KiB measured, and what the system has delivered and gRPC has not yet read
# Of a call whose message nobody has asked for: its window, its headers, and objects of 24 KiB.
CALL_BYTES = STREAM_WINDOW_BYTES + 2 * METADATA_BYTES + 24 * 2**10
EVENT_LOG_BYTES = 320 * 2**10  # of a job: 256 events of 1.2 KB
WATCHER_BYTES = 64 * 2**10  # of one that reads, at most 20 unread events and its objects
DECODED_BYTES_PER_PIXEL = 3  # of an image that waits for its job
ENCODING_COPIES = 4  # of a picture, or of a checkpoint, while it is encoded or written, beside `max_sending_bytes`


class MemoryTerm(NamedTuple):
    """A part of the server's memory: its largest size, and why that is the largest."""

    name: str
    bytes: int
    reason: str


def memory_terms(settings: Settings) -> list[MemoryTerm]:
    """What the resident memory of the server consists of at most, whatever clients send. Without the memory of the
    device, which the engine limits, and which is the same memory if the device is the CPU."""
    places, message = settings.max_controllers, settings.max_message_bytes
    # Open calls, and those that have arrived and wait for a handler in three queues, two of them of health checks. The
    # first call of a connection has a place in any case: of the service, health checks and reflection.
    calls = settings.max_calls + 3 * settings.max_connections + settings.max_probe_calls + MAX_REFLECTION_CALLS
    calls += 3 * settings.max_arrived_calls
    watchers = min(settings.max_calls + settings.max_connections, (places + settings.max_kept) * settings.max_watchers)
    copies = ENCODERS * ENCODING_COPIES
    quick_copies = QUICK_ENCODERS * ENCODING_COPIES
    pictures = DECODED_BYTES_PER_PIXEL * settings.max_size**2 * (places * (1 + UNREAD_FRAMES) + copies + quick_copies)
    checkpoints = settings.max_checkpoint_bytes * (UNREAD_CHECKPOINTS * settings.max_running + places + copies)
    term = MemoryTerm
    return [
        term("process", PROCESS_BYTES[settings.engine], f"Python, libraries and the {settings.engine} engine"),
        term("connections", settings.max_connections * CONNECTION_BYTES, "max_connections, 64 KiB each"),
        term(
            "calls",
            calls * CALL_BYTES,
            "7 max_calls, open ones and those that have arrived, and health checks: 104 KiB each, window and headers",
        ),
        term(
            "receiving",
            2 * settings.max_receiving_bytes + 3 * message,
            "2 max_receiving_bytes: as bytes and as a message; 3 max_message_bytes: copies of one",
        ),
        term(
            "small messages",
            (SMALL_READS + PROBE_READS) * message,
            f"{SMALL_READS + PROBE_READS} max_message_bytes: {PROBE_READS} for health checks",
        ),
        term("commands", places * message, "max_message_bytes for each of max_running + max_queued controllers"),
        term("uploads", settings.max_uploads_bytes, "max_uploads_bytes, kept"),
        term(
            "decoding",
            decoding_bytes(settings),
            "max_decoders processes: 0.5 GiB, 2 max_image_bytes, 24 bytes for each of max_image_pixels; "
            f"{DECODER_THREADS} threads: 64 MiB",
        ),
        term("decoded", settings.max_decoded_bytes, "max_decoded_bytes"),
        term("kept jobs", settings.max_kept_bytes, "max_kept_bytes"),
        term("event logs", (places + settings.max_kept) * EVENT_LOG_BYTES, "320 KiB for each job, also max_kept ones"),
        term("watchers", watchers * WATCHER_BYTES, "64 KiB for each call that watches a job"),
        term("pictures", pictures, "3 bytes per pixel of max_size: the newest and 2 unread ones of each job, copies"),
        term("checkpoints", checkpoints, "max_checkpoint_bytes: 2 of each running job, 1 of each controller, copies"),
        term("sending", settings.max_sending_bytes, "max_sending_bytes"),
        term("parked jobs", settings.max_parked_bytes, "max_parked_bytes"),
    ]


def memory_bytes(settings: Settings) -> int:
    """The bound: the sum of `memory_terms`."""
    return sum(term.bytes for term in memory_terms(settings))


def decoding_bytes(limits: Limits) -> int:
    """Upper bound of the memory, in bytes, of all processes and threads that decode."""
    image_bytes = DECODER_BYTES + DECODING_BYTES_PER_PIXEL * limits.max_image_pixels + 2 * limits.max_image_bytes
    return limits.max_decoders * image_bytes + DECODER_THREADS * SMALL_DECODING_BYTES


def request_memory_bytes(limits: Limits) -> int:
    """Upper bound of the memory, in bytes, that one request alone takes until its job starts: five times the largest
    message (bytes, copies while they are read, the message), `decoding_bytes`, and the decoded images."""
    decoded = (2 + limits.max_styles) * DECODED_BYTES_PER_PIXEL * limits.max_image_pixels
    return 5 * limits.max_message_bytes + decoding_bytes(limits) + decoded


def comments(settings: Settings) -> Iterator[str]:
    """The bound and its terms, as comments of a file of environment variables."""
    mib = 2**20
    total = memory_bytes(settings) / mib
    yield f"# Resident memory without that of the device: at most {total:.0f} MiB, the sum of"
    for term in memory_terms(settings):
        yield f"# {term.bytes / mib:7.0f} MiB {term.name}: {term.reason}"
