"""The events of a job for one of its watchers, as messages. Each picture is encoded once for all watchers that want it
so, and each checkpoint is written once."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.message import Message

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.domain.events import Accepted, Answer, Event, Finished, Frame, Picture, Saved
from gramophone_server.domain.picture_size import fit, most_encoded_bytes
from gramophone_server.images import codec
from gramophone_server.images.codec import Encoding, Format
from gramophone_server.jobs.job import Job
from gramophone_server.jobs.mailbox import Mailbox
from gramophone_server.rpc.byte_budget import ByteBudget, Share
from gramophone_server.rpc.encoders import Encoders, Shared
from gramophone_server.rpc.outgoing import Outgoing, nested
from gramophone_server.rpc.responses import (
    accepted_message,
    frame_encoding,
    image_message,
    result_message,
    result_metadata,
    small_event,
)

__all__ = ["SMALL_BYTES", "JobEventStream"]

# Messages of at most this size need no share of `max_sending_bytes`. A call sends one message at a time.
SMALL_BYTES = 64 * 1024
# What is measured for pictures of noise, the slowest kind; of each pixel before it is reduced, and of each byte of a
# checkpoint.
ENCODING_S_PER_PIXEL = {Format.PNG: 110e-9, Format.WEBP: 120e-9, Format.JPEG: 10e-9}
REDUCING_S_PER_PIXEL = 5e-9
WRITING_S_PER_BYTE = 1e-9
LOSSLESS = Encoding(Format.PNG, 100)

Levels: TypeAlias = Sequence[tuple[Message, int]]  # see `outgoing.nested`


class JobEventStream:
    """The events of a job as messages for one of its watchers.

    ``sending`` counts the bytes of large messages, here for ``connection``. ``frames`` are the options of the
    watcher's frames. ``attached``: the watcher's request found an existing job. ``weights`` names the weights of the
    network. ``on_result`` is told what it takes to write a result: its format, pixels, seconds of a thread.
    """

    def __init__(
        self,
        job: Job,
        mailbox: Mailbox,
        encoders: Encoders,
        sending: ByteBudget,
        *,
        connection: str = "",
        frames: pb.FrameOptions | None = None,
        attached: bool = False,
        weights: str = "",
        on_result: Callable[[str, int, float], None] = lambda *_: None,
    ) -> None:
        self.job = job
        self.mailbox = mailbox
        self._encoders = encoders
        self._sending, self._connection = sending, connection
        self._frames = frame_encoding(frames or pb.FrameOptions())
        self._attached = attached
        self._weights = weights
        self._on_result = on_result
        self._reserved: Share | None = None  # for the next event if it is large, from `outgoing` to the next `outgoing`

    async def responses(self) -> AsyncIterator[Outgoing]:
        """Yields all events, for a watcher that sends no commands. Raises the error that the job ended with."""
        while (item := await self.read()) is not None:
            number, event = item
            assert not isinstance(event, Answer), "only a controller gets answers"
            response = self.outgoing(number, event)
            del item, event  # which would keep the picture or the state during the wait for its bytes
            if (message := await response) is not None:
                yield message

    async def final_response(self) -> Outgoing:
        """The response of `Stylize`, at the end of the job. Raises the error that the job ended with."""
        response = pb.StylizeResponse()
        message = None
        while (item := await self.read()) is not None:
            number, event = item
            if isinstance(event, Accepted):
                response.accepted.CopyFrom(accepted_message(event, self.job, attached=self._attached))
            elif isinstance(event, Finished):
                large = self._result(number, event)
                large.own = functools.partial(_unary_levels, response, event)
                message = await self._written(large)
        assert message is not None, "a job that ends without an error has a result"
        return message

    async def read(self) -> tuple[int, Event | Answer] | None:
        """The next (number, event); None after the last one. Raises the error that the job ended with."""
        item = self.mailbox.read_nowait()
        if item is None or not isinstance(item[1], Frame | Saved):
            # Its bytes would be kept while a slow reader takes a small message, and for ever if it leaves then.
            self._give_back_reserved()
        return item if item is not None else await self.mailbox.read()

    async def outgoing(self, number: int, event: Event, *, requested: bool = False) -> Outgoing | None:
        """The message of an event that was read. ``requested``: by a command, so a frame is lossless.

        Waits until the bytes of a large message are free. Meanwhile a frame or checkpoint that was not requested is in
        the mailbox again, where a newer one replaces it, and nothing is returned: read again.
        """
        match event:
            case Frame():
                large = self._frame(number, event, LOSSLESS if requested else self._frames)
            case Saved():
                large = self._checkpoint(number, event)
            case Finished():
                return await self._written(self._result(number, event))
            case _:
                response = pb.WatchJobResponse()
                response.event.sequence = number
                small_event(response.event, event, self.job, attached=self._attached)
                return Outgoing(response.SerializeToString())
        if requested:
            return await self._written(large)
        if (message := await self._try_write(large)) is None:
            self.mailbox.put_back(number, event)
            needed = large.needed_first(self._sending.max_bytes)
            del event, large
            self._reserved = await self._sending.take(needed, self._connection)
        return message

    async def _written(self, large: _Large) -> Outgoing:
        """The message, as soon as its bytes are free."""
        while (message := await self._try_write(large)) is None:
            needed = large.needed_first(self._sending.max_bytes)
            self._reserved = await self._sending.take(needed, self._connection, is_urgent=large.is_result)
        return message

    async def _try_write(self, large: _Large) -> Outgoing | None:
        """The message, when it is written. None if there are not enough bytes for it now."""
        needed, is_first = large.needed(self._sending.max_bytes)
        share, self._reserved = self._reserved, None
        if share is not None and share.bytes < needed:
            share.give_back()
            share = None
        if share is None and needed:
            share = self._sending.try_take(needed, self._connection)
            if share is None:
                return None
        holds = contextlib.ExitStack()
        try:
            work: Shared[_Written] = holds.enter_context(
                self._encoders.sharing(
                    large.users,
                    large.key,
                    large.make,
                    self._connection,
                    seconds=large.seconds,
                    is_result=large.is_result,
                )
            )
            shared_part = None
            if is_first and share is not None:
                shared_part = share.split(share.bytes // (1 + large.copies))
                work.holds.callback(shared_part.give_back)
            written = await work.result()
            large.on_written(written)
            size = len(written.data)
            if shared_part is not None:
                shared_part.shrink_to(size)
            if share is None and size > SMALL_BYTES:
                share = self._sending.try_take(min(size * large.copies, self._sending.max_bytes), self._connection)
                if share is None:
                    holds.close()
                    return None
            if share is not None:
                share.shrink_to(size * large.copies)
            data = written.data
            if large.own is not None:
                data = b"".join(nested(large.own(), memoryview(data)[written.body_at :]))
            return Outgoing(data, dropped=large.dropped, share=share, holds=holds)
        except BaseException:
            holds.close()
            if share is not None:
                share.give_back()
            raise

    def _give_back_reserved(self) -> None:
        if self._reserved is not None:
            self._reserved.give_back()
            self._reserved = None

    # Large messages ---------------------------------------------------------------------------------------------------

    def _frame(self, number: int, event: Frame, wanted: Encoding) -> _Large:
        picture = event.picture
        encoding = _as_needed(wanted, picture)

        def levels(dropped: int) -> Levels:
            frame = pb.Frame(iteration=event.iteration, dropped=dropped)
            return [*_event_levels(number, "frame"), (frame, pb.Frame.IMAGE_FIELD_NUMBER)]

        return _Large(
            picture.encodings,
            encoding,
            _image_writer(lambda: levels(0), picture, encoding),
            _most_bytes(picture, encoding),
            _encoding_s(picture, encoding),
            own=(lambda: levels(event.dropped)) if event.dropped else None,
            dropped=event.dropped,
        )

    def _checkpoint(self, number: int, event: Saved) -> _Large:
        state = event.state

        def make() -> _Written:
            checkpoint = pb.Checkpoint(iteration=event.iteration, light=state.light)
            levels = [*_event_levels(number, "checkpoint"), (checkpoint, pb.Checkpoint.DATA_FIELD_NUMBER)]
            return _Written(b"".join(nested(levels, state.write())), 0)

        return _Large(state.written, None, make, state.most_bytes, state.most_bytes * WRITING_S_PER_BYTE)

    def _result(self, number: int, event: Finished) -> _Large:
        summary, picture = self.job.summary, event.picture
        assert summary is not None, "a job is admitted before it has events"
        encoding = _as_needed(self.job.encoding, picture)
        metadata = result_metadata(summary, event.iterations, self._weights)

        def levels() -> Levels:
            return [*_event_levels(number, "result"), (result_message(event), pb.Result.IMAGE_FIELD_NUMBER)]

        def release_pixels(written: _Written) -> None:
            if picture.wait is not None:
                self._on_result(encoding.format.name, summary.width * summary.height, written.seconds)
            picture.wait = None  # the result has one encoding for all watchers, which is kept

        return _Large(
            picture.encodings,
            encoding,
            _image_writer(levels, picture, encoding, metadata),
            _most_bytes(picture, encoding),
            _encoding_s(picture, encoding),
            is_result=True,
            on_written=release_pixels,
        )


class _Written(NamedTuple):
    """A serialised message with a picture or a checkpoint, as most calls send it."""

    data: bytes
    body_at: int  # where the innermost message starts, an `Image`
    seconds: float = 0.0  # that a thread took for a picture, without its wait for the thread, the device or a reader


@dataclass
class _Large:
    """A message with a picture or a checkpoint, which one call is about to send."""

    users: dict[Any, Any]  # the work that calls share, by `key`
    key: Hashable
    make: Callable[[], _Written]
    most_bytes: int  # of the message
    seconds: float  # that it takes to write it, about
    own: Callable[[], Levels] | None = None  # of the message of this call, if it is not the shared one
    dropped: int | None = None
    is_result: bool = False
    on_written: Callable[[_Written], None] = lambda _: None

    @property
    def copies(self) -> int:
        """Copies for this call alone: gRPC's, and the message if it is not the shared one."""
        return 1 if self.own is None else 2

    def needed(self, max_bytes: int) -> tuple[int, bool]:
        """The bytes to take before it is written or joined, 0 for a small message and for one that others are still
        writing; and whether this call is the first one, which writes it."""
        work: Shared[_Written] | None = self.users.get(self.key)
        if work is None:
            return self.needed_first(max_bytes), True
        size = len(work.outcome.result().data) if work.succeeded else 0
        return (min(size * self.copies, max_bytes) if size > SMALL_BYTES else 0), False

    def needed_first(self, max_bytes: int) -> int:
        """The bytes for the first call: also for the shared message, and before that for the picture or the state."""
        return min(self.most_bytes * (1 + self.copies), max_bytes) if self.most_bytes > SMALL_BYTES else 0


def _event_levels(number: int, kind: str) -> Levels:
    """The outer levels of all responses with an event of this kind: all of them have the event in the same field."""
    return [
        (pb.WatchJobResponse(), pb.WatchJobResponse.EVENT_FIELD_NUMBER),
        (pb.JobEvent(sequence=number), pb.JobEvent.DESCRIPTOR.fields_by_name[kind].number),
    ]


def _unary_levels(response: pb.StylizeResponse, event: Finished) -> Levels:
    """The outer levels of the response of `Stylize`."""
    return [
        (response, pb.StylizeResponse.RESULT_FIELD_NUMBER),
        (result_message(event), pb.Result.IMAGE_FIELD_NUMBER),
    ]


def _as_needed(wanted: Encoding, picture: Picture) -> Encoding:
    """The same encoding without options that change nothing, so that equal pictures are encoded once."""
    is_reduced = 0 < wanted.max_side < max(picture.width, picture.height)
    return Encoding(
        wanted.format, 0 if wanted.format is Format.PNG else wanted.quality, wanted.max_side if is_reduced else 0
    )


def _encoded_size(picture: Picture, encoding: Encoding) -> tuple[int, int]:
    width, height = picture.width, picture.height
    return fit(width, height, encoding.max_side) if encoding.max_side else (width, height)


def _most_bytes(picture: Picture, encoding: Encoding) -> int:
    return most_encoded_bytes(*_encoded_size(picture, encoding))


def _encoding_s(picture: Picture, encoding: Encoding) -> float:
    width, height = _encoded_size(picture, encoding)
    reducing_s = REDUCING_S_PER_PIXEL * picture.width * picture.height if encoding.max_side else 0.0
    return reducing_s + ENCODING_S_PER_PIXEL[encoding.format] * width * height


def _image_writer(
    levels: Callable[[], Levels], picture: Picture, encoding: Encoding, metadata: str | None = None
) -> Callable[[], _Written]:
    """A function that writes a message with the picture as its innermost level. It blocks, for a thread."""

    def make() -> _Written:
        wait = picture.wait
        assert wait is not None, "the pixels are released when the only encoding is kept"
        pixels = wait()
        started_at = time.monotonic()
        encoded = codec.encode(pixels, *encoding, metadata)
        outer = levels()
        parts = nested([*outer, (image_message(encoded), pb.Image.DATA_FIELD_NUMBER)], encoded.data)
        data, body_at = b"".join(parts), sum(map(len, parts[: len(outer)]))
        return _Written(data, body_at, time.monotonic() - started_at)

    return make
