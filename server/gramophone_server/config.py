"""Settings of the server: each one is a flag of `gramophone-server` and an environment variable.

`--max-size 1024` is the same as `GRAMOPHONE_MAX_SIZE=1024`; the flag takes precedence. Names, units, defaults, ranges
and help texts are defined only here. Standard library only.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from gramophone.options import MESSAGE_BYTES
from gramophone.recipe import Range
from gramophone.values import did_you_mean
from gramophone_server.errors import StartupError

__all__ = [
    "DECODERS",
    "DECODER_BYTES",
    "DECODING_BYTES_PER_PIXEL",
    "ENCODERS",
    "MAX_REFLECTION_CALLS",
    "METADATA_BYTES",
    "PARKED_BYTES",
    "PROBE_READS",
    "SMALL_DECODING_BYTES",
    "SMALL_READS",
    "STREAM_WINDOW_BYTES",
    "UNREAD_CHECKPOINTS",
    "UNREAD_FRAMES",
    "Limits",
    "MemoryTerm",
    "Settings",
    "env_variable",
    "from_command_line",
    "load",
    "version",
]

MAX_MESSAGE_BYTES = 2**31 - 1  # gRPC keeps the limit in a C int
# Processes for large images, and threads for small ones. More do not help while the compute thread uses the cores.
DECODERS = 2
# While an image is decoded: 21 measured with a transparent WebP or PNG that EXIF rotates and nothing reduces.
DECODING_BYTES_PER_PIXEL = 24
# Bytes of a process that decodes, besides those: libwebp builds 350 MiB of tables from 295 KB with every code.
DECODER_BYTES = 2**29
SMALL_DECODING_BYTES = 2**26  # while an image is decoded on a thread; what takes more is decoded in a process
STREAM_WINDOW_BYTES = 65_535  # of a call whose message nobody has asked for: what HTTP/2 starts with
METADATA_BYTES = 8192  # of one call; gRPC's own default
DECODED_BYTES_PER_PIXEL = 3  # of an image that waits for its job
# States of jobs that are paused, or have left the device for others, in the host's memory: a job of 2048 px with L-BFGS
# has 1.1 GiB. At most half of the engine's memory if that is less.
PARKED_BYTES = 4 * 2**30
PROCESS_BYTES = {"vgg": 1200 * 2**20, "fake": 620 * 2**20}  # by engine; 894 and 530 MiB measured before the first call
CONNECTION_BYTES = 2**16  # 16 KiB measured, and what the system has delivered and gRPC has not yet read
# Of a call whose message nobody has asked for: its window, its headers, and objects of 24 KiB.
CALL_BYTES = STREAM_WINDOW_BYTES + 2 * METADATA_BYTES + 24 * 2**10
# Messages that arrive at the same time, of all methods without images; honest ones come with their call.
SMALL_READS = 8
PROBE_READS = 4  # the same of health checks
MAX_REFLECTION_CALLS = 64
EVENT_LOG_BYTES = 320 * 2**10  # of a job: 256 events of 1.2 KB
WATCHER_BYTES = 64 * 2**10  # of one that reads, at most 20 unread events and its objects
ENCODERS = 2  # threads that encode pictures and write checkpoints; the compute thread uses the cores
ENCODING_COPIES = 4  # of a picture, or of a checkpoint, while it is encoded or written, beside `max_sending_bytes`
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
    max_idle_s: int = _setting(
        20, "seconds that a client may take to send a message that the server waits for", allowed=Range(1, 3600)
    )
    max_connections: int = _setting(512, "connections at the same time", allowed=Range(1, 65_536))
    max_calls: int = _setting(2048, "calls at the same time", allowed=Range(1, 65_536))
    max_calls_per_connection: int = _setting(1024, "calls of one connection at the same time", allowed=Range(1, 65_536))

    @property
    def max_controllers(self) -> int:
        """Clients that control a job at the same time: one for each job that waits or runs."""
        return self.max_running + self.max_queued

    @property
    def max_probe_calls(self) -> int:
        """Health checks at the same time: each connection may have one that watches, and 256 may ask."""
        return self.max_connections + 256

    @property
    def request_memory_bytes(self) -> int:
        """Upper bound of the memory, in bytes, that one request alone takes until its job starts: five times the
        largest message (bytes, copies while they are read, the message), `decoding_bytes`, and the decoded images."""
        decoded = (2 + self.max_styles) * DECODED_BYTES_PER_PIXEL * self.max_image_pixels
        return 5 * self.max_message_bytes + self.decoding_bytes + decoded

    @property
    def decoding_bytes(self) -> int:
        """Upper bound of the memory, in bytes, of all processes and threads that decode."""
        image_bytes = DECODER_BYTES + DECODING_BYTES_PER_PIXEL * self.max_image_pixels + 2 * self.max_image_bytes
        return DECODERS * (image_bytes + SMALL_DECODING_BYTES)

    @property
    def response_bytes(self) -> int:
        """Largest response: a checkpoint, or a square result whose PNG is not smaller than its pixels."""
        return max(3 * self.max_size**2, self.max_checkpoint_bytes) + MESSAGE_SLACK


@dataclass(frozen=True, kw_only=True)
class Settings(Limits):
    """All settings of a server. `load` checks them."""

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

    def memory_terms(self) -> list[MemoryTerm]:
        """What the resident memory of the server consists of at most, whatever clients send. Without the memory of the
        device, which the engine limits, and which is the same memory if the device is the CPU."""
        places, message = self.max_controllers, self.max_message_bytes
        # Open calls, and those that have arrived and wait for a handler in three queues, two of them of health checks.
        # The first call of a connection has a place in any case: of the service, health checks and reflection.
        calls = 4 * self.max_calls + 3 * self.max_connections + self.max_probe_calls + MAX_REFLECTION_CALLS
        watchers = min(self.max_calls + self.max_connections, (places + self.max_kept) * self.max_watchers)
        copies = ENCODERS * ENCODING_COPIES
        pictures = DECODED_BYTES_PER_PIXEL * self.max_size**2 * (places * (1 + UNREAD_FRAMES) + copies)
        checkpoints = self.max_checkpoint_bytes * (UNREAD_CHECKPOINTS * self.max_running + places + copies)
        term = MemoryTerm
        return [
            term("process", PROCESS_BYTES[self.engine], f"Python, libraries and the {self.engine} engine"),
            term("connections", self.max_connections * CONNECTION_BYTES, "max_connections, 64 KiB each"),
            term("calls", calls * CALL_BYTES, "max_calls and health checks, 104 KiB each: window and headers"),
            term(
                "receiving",
                2 * self.max_receiving_bytes + 3 * message,
                "2 max_receiving_bytes: as bytes and as a message; 3 max_message_bytes: copies of one",
            ),
            term("small messages", (SMALL_READS + PROBE_READS) * message, "12 max_message_bytes: 4 for health checks"),
            term("commands", places * message, "max_message_bytes for each of max_running + max_queued controllers"),
            term("uploads", self.max_uploads_bytes, "max_uploads_bytes, kept"),
            term("decoding", self.decoding_bytes, f"{DECODERS} processes: 0.5 GiB, 2 files, 24 bytes per pixel"),
            term("decoded", self.max_decoded_bytes, "max_decoded_bytes"),
            term("kept jobs", self.max_kept_bytes, "max_kept_bytes"),
            term("event logs", (places + self.max_kept) * EVENT_LOG_BYTES, "320 KiB for each job, also kept ones"),
            term("watchers", watchers * WATCHER_BYTES, "64 KiB for each call that watches a job"),
            term("pictures", pictures, "3 bytes per pixel: the newest and 2 unread ones of each job, copies"),
            term(
                "checkpoints", checkpoints, "max_checkpoint_bytes: 2 of each running job, 1 of each controller, copies"
            ),
            term("sending", self.max_sending_bytes, "max_sending_bytes"),
            term("parked jobs", PARKED_BYTES, "states of jobs that are paused or have left the device for others"),
        ]

    @property
    def memory_bytes(self) -> int:
        """The sum of `memory_terms`."""
        return sum(term.bytes for term in self.memory_terms())


class MemoryTerm(NamedTuple):
    """A part of the server's memory: its largest size, and why that is the largest."""

    name: str
    bytes: int
    reason: str


@functools.cache  # a look-up takes 0.5 ms, and every result contains it
def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("gramophone")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def from_command_line() -> Settings:
    """The settings of this process. Ends it for `--help`, `--version` and `--print-config`, and with exit code 2 and a
    sentence on standard error for an invalid setting."""
    try:
        settings, print_only = load(sys.argv[1:], os.environ)
    except StartupError as error:
        print(f"gramophone-server: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if print_only:
        for f in fields(settings):
            print(f"{env_variable(f.name)}={getattr(settings, f.name)}")
        for line in _memory_lines(settings):
            print(line)
        raise SystemExit(0)
    return settings


def _memory_lines(settings: Settings) -> Iterator[str]:
    """The bound of the memory, as comments of a file of environment variables."""
    mib = 2**20
    yield f"# Resident memory without that of the device: at most {settings.memory_bytes / mib:.0f} MiB, the sum of"
    for term in settings.memory_terms():
        yield f"# {term.bytes / mib:7.0f} MiB {term.name}: {term.reason}"


def load(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Settings, bool]:
    """Reads the settings from flags, then environment, then defaults; and whether `--print-config` is among the flags.

    argparse ends the process for `--help`, `--version` and a flag without its value. Raises `StartupError` with a
    sentence for each unknown flag and each value that is not allowed.
    """
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        raise StartupError("; ".join(_unknown(word) for word in unknown))
    flags = vars(parsed)
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for f in fields(Settings):
        text = flags[f.name] if flags[f.name] is not None else environment.get(env_variable(f.name))
        if text is None or text == f.default == "":
            continue
        try:
            values[f.name] = _value(text, type(f.default), f.metadata["range"], f.metadata["choices"])
        except ValueError as error:
            source = _flag(f.name) if flags[f.name] is not None else env_variable(f.name)
            wrong.append(f"{source} must be {error}, got {text!r}")
    if wrong:
        raise StartupError("; ".join(wrong))
    settings = Settings(**values)
    if settings.iter_ms != Settings.iter_ms and settings.engine != "fake":
        raise StartupError("--iter-ms is only for --engine fake; a network runs at its own speed")
    for name, size, parts in (("a result", settings.response_bytes, ("max_size", "max_checkpoint_bytes")),):
        if size > MAX_MESSAGE_BYTES:
            raise StartupError(
                f"{name} could have {size} bytes, and a gRPC message has at most {MAX_MESSAGE_BYTES}; "
                f"lower {' or '.join(f'{_flag(part)} (now {getattr(settings, part)})' for part in parts)}"
            )
    _check_room_for_uploads(settings)
    _check_room_to_receive(settings)
    return settings, flags["print_config"]


def _check_room_to_receive(limits: Limits) -> None:
    """Raises `StartupError` if the largest upload could never arrive: its bytes are kept while the next ones arrive."""
    largest = min(max(limits.max_image_bytes, limits.max_checkpoint_bytes), limits.max_uploads_bytes)
    needed = largest + limits.max_message_bytes
    if needed > limits.max_receiving_bytes:
        raise StartupError(
            f"{_flag('max_receiving_bytes')} must be at least {needed}, for the largest upload and one message more, "
            f"got {limits.max_receiving_bytes}; raise it, or lower {_flag('max_image_bytes')}, "
            f"{_flag('max_checkpoint_bytes')} or {_flag('max_message_bytes')}"
        )


def _check_room_for_uploads(limits: Limits) -> None:
    """Raises `StartupError` if images and checkpoints are allowed that could not be uploaded."""
    for name in ("max_image_bytes", "max_checkpoint_bytes"):
        if 0 < limits.max_uploads_bytes < getattr(limits, name):
            raise StartupError(
                f"uploads could not hold what {_flag(name)} (now {getattr(limits, name)}) allows; raise "
                f"{_flag('max_uploads_bytes')} (now {limits.max_uploads_bytes}) to at least that, lower {_flag(name)}, "
                f"or set {_flag('max_uploads_bytes')} to 0, so that clients send only what fits in a message"
            )


def _value(text: str, kind: type, allowed: Range | None, choices: Sequence[str]) -> Any:
    """The value of a setting. Raises ValueError with what the text must be."""
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError("1 or 0")
    if choices and text not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    if kind is str:
        if not text:
            raise ValueError("a non-empty string")
        return text
    assert allowed is not None, "every number has a range"
    must = f"{'a whole number' if kind is int else 'a number'} from {allowed.low:.10g} to {allowed.high:.10g}"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(must) from None
    if not allowed.low <= value <= allowed.high:  # false for NaN too
        raise ValueError(must)
    return value


def _unknown(word: str) -> str:
    """A sentence about a word of the command line that is neither a flag nor the value of one."""
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"{word!r} does not belong to any flag; settings are given as --flag VALUE"
    flags = ["--help", "--version", "--print-config", *(_flag(f.name) for f in fields(Settings))]
    return f"there is no flag {flag}" + (did_you_mean(flag, flags, {}) or "; --help lists all flags")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gramophone-server",
        description="Neural style transfer over gRPC.",
        allow_abbrev=False,  # an abbreviation could change its meaning when a setting is added
        epilog="Every flag is also an environment variable, --max-size is GRAMOPHONE_MAX_SIZE. Flags take precedence.",
    )
    parser.add_argument("--version", action="version", version=f"gramophone-server {version()}")
    parser.add_argument("--print-config", action="store_true", help="print the values of all settings and exit")
    limits = parser.add_argument_group("limits")
    for f in fields(Settings):
        group = limits if f.name in Limits.__dataclass_fields__ else parser
        allowed, choices = f.metadata["range"], f.metadata["choices"]
        if isinstance(f.default, bool):
            group.add_argument(_flag(f.name), action="store_const", const="1", help=f.metadata["help"])
            continue
        default = f"{f.default:.10g}" if allowed else f.default
        between = f"{allowed.low:.10g} to {allowed.high:.10g}, " if allowed else ""
        group.add_argument(
            _flag(f.name),
            metavar="|".join(choices) or ("SECONDS" if f.name.endswith("_s") else "N" if allowed else "TEXT"),
            help=f"{f.metadata['help']} ({between}default {default})",
        )
    return parser
