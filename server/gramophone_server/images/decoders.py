"""Who decodes what, and when: owners take turns, small images do not wait for large ones, and one that leaves
ends what runs for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

from torch import Tensor

from gramophone_server.config import DECODER_THREADS, SMALL_DECODING_BYTES, Limits
from gramophone_server.domain.job import digest
from gramophone_server.images import codec
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.decoder_client import DecoderProcess
from gramophone_server.images.decoding import Header
from gramophone_server.images.fair_queue import FairQueue
from gramophone_server.images.shortages import Shortage
from gramophone_server.images.threads import started_threads

__all__ = ["DecodedImage", "Decoders", "EncodedImage"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# Images within these limits and `SMALL_DECODING_BYTES` are decoded on threads of the server: at most 20 ms of work for
# ordinary files, of which copies hold the interpreter for 2 ms. A process would add a millisecond, and copies of the
# file and of the pixels.
SMALL_PIXELS = 2**20
SMALL_BYTES = 2**20  # of the file
# Three small images wait behind that of each thread, which so finds its next one without waiting for the event loop: 64
# clients of small jobs waited 308 ms for an image, and 18 ms with them.
SMALL_PLACES = QUICK_PLACES = 4 * DECODER_THREADS
PIECE_BYTES = 2**16  # that take as long as a piece of work without any bytes


class DecodedImage(NamedTuple):
    """A decoded image and its digest, which takes 2 ms for a megapixel."""

    picture: Tensor  # uint8 [3, height, width]
    digest: bytes  # see `domain.job.digest`
    seconds: float  # that it took to decode and to digest, without the wait for a turn


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image of a job: ``read`` returns its file, and is called on a thread. ``needed``: see `decoding.decode`."""

    read: Callable[[], bytes]
    header: Header
    needed: int


class Decoders:
    """Decodes images, in turns, on threads and in processes. Its methods belong to the event loop.

    Large images are decoded in `max_decoders` processes. If the caller of a method is cancelled, it leaves the queue,
    and a process that works for it is ended; another one is started for the next image. A thread cannot be ended, so
    what one has begun, a small image or a digest, goes on to its end.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._large, self._small = FairQueue(limits.max_decoders), FairQueue(SMALL_PLACES)
        self._quick, self._other = FairQueue(QUICK_PLACES), FairQueue(DECODER_THREADS)
        self._idle = [DecoderProcess(limits) for _ in range(limits.max_decoders)]
        self._busy: list[DecoderProcess] = []
        # Twice as many, because a thread may still wait for the end of a process when the next one is used.
        self._process_threads = started_threads(2 * limits.max_decoders, "decode-large")
        self._small_threads = started_threads(DECODER_THREADS, "decode")
        self._other_threads = started_threads(DECODER_THREADS, "read")
        self._quick_threads = started_threads(DECODER_THREADS, "header")

    @property
    def waiting(self) -> int:
        """The number of images that wait for a decoder."""
        return self._large.waiting + self._small.waiting

    @property
    def busy(self) -> int:
        """The number of processes that decode now."""
        return len(self._busy)

    def start(self) -> None:
        """Starts the processes, so that the first large images do not wait for them. Does not block."""
        for process in self._idle:
            self._process_threads.submit(_start, process)

    def close(self) -> None:
        """Ends the processes, and the threads after what they do now."""
        for threads in (self._small_threads, self._other_threads, self._quick_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        for process in (*self._busy, *self._idle):
            process.kill()
            self._process_threads.submit(process.close)
        self._process_threads.shutdown(wait=False)

    async def quickly(self, function: Callable[[], T], owner: str, size: int) -> T:
        """Runs a function that takes about a millisecond, on a thread, when it is the turn of ``owner``. It does not
        wait for anything slow. ``size``: the bytes that it may look at."""
        async with self._quick.place(owner, PIECE_BYTES + size):
            return await asyncio.get_running_loop().run_in_executor(self._quick_threads, function)

    async def run(self, function: Callable[[], T], owner: str, size: int) -> T:
        """Runs a function that reads or hashes ``size`` bytes for ``owner``, on a thread, when it is its turn."""
        async with self._other.place(owner, PIECE_BYTES + size):
            return await asyncio.get_running_loop().run_in_executor(self._other_threads, function)

    async def decode(self, images: Sequence[EncodedImage], owner: str) -> list[DecodedImage | UnusableImage]:
        """The pictures of a job, in the same order, or what is wrong with them; see `decoding.decode`.

        Each is read and decoded when it is the turn of ``owner``, small ones together, because to hand one over takes
        longer than to decode it. Raises `Shortage`, and `EngineFailed` if a decoder crashes.
        """
        small = [image for image in images if _is_small(image.header)]
        together = small if sum(image.header.pixels for image in small) <= SMALL_PIXELS else []
        try:
            async with asyncio.TaskGroup() as group:  # an error, or a cancellation, ends all of them
                tasks = [group.create_task(self._decode([image], owner)) for image in images if image not in together]
                if together:
                    tasks.append(group.create_task(self._decode(together, owner)))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        outcomes = dict(pair for task in tasks for pair in task.result())
        return [outcomes[image] for image in images]

    async def _decode(
        self, images: Sequence[EncodedImage], owner: str
    ) -> list[tuple[EncodedImage, DecodedImage | UnusableImage]]:
        """The pictures of some small images, or of a large one."""
        work = sum(image.header.work for image in images)
        if all(_is_small(image.header) for image in images):
            async with self._small.place(owner, work):
                decode = partial(self._decode_small, images)
                outcomes = await asyncio.get_running_loop().run_in_executor(self._small_threads, decode)
            return list(zip(images, outcomes, strict=True))
        [image] = images
        async with self._large.place(owner, work):
            return [(image, await self._decode_large(image))]

    def _decode_small(self, images: Sequence[EncodedImage]) -> list[DecodedImage | UnusableImage]:
        return [_outcome(partial(codec.decode, image.read(), self._limits, image.needed)) for image in images]

    async def _decode_large(self, image: EncodedImage) -> DecodedImage | UnusableImage:
        process = self._idle.pop()
        self._busy.append(process)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._process_threads, lambda: _outcome(lambda: process.decode(image.read(), image.needed))
            )
        except asyncio.CancelledError:
            process.kill()
            with contextlib.suppress(RuntimeError):  # the threads have been stopped, and have closed it
                self._process_threads.submit(process.close)
            raise
        finally:
            self._busy.remove(process)
            self._idle.append(DecoderProcess(self._limits) if process.killed else process)


def _is_small(header: Header) -> bool:
    is_small_file = header.pixels <= SMALL_PIXELS and header.file_bytes <= SMALL_BYTES
    return is_small_file and header.decoding_bytes <= SMALL_DECODING_BYTES


def _start(process: DecoderProcess) -> None:
    """Starts a process. Each image that needs one tries again, so a failure is only logged."""
    try:
        process.start()
    except Shortage as error:
        if not process.killed:
            log.error("large images cannot be decoded: %s", error)


def _outcome(decode: Callable[[], Tensor]) -> DecodedImage | UnusableImage:
    started_at = time.monotonic()
    try:
        picture = decode()
    except UnusableImage as error:
        return error
    return DecodedImage(picture, digest(picture), time.monotonic() - started_at)
