"""Streams of clients that go on for ever, or that do not fit to what the server sends: uploads, commands, readers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_server.config import Limits
from tests.bad_input.inputs import RECIPE, job, make_checkpoint
from tests.bad_input.target import Case, Target, one, path_of
from tests.support.monitoring import RuleViolation
from tests.support.raw_http2 import Answer, RawConnection, RawStream, StreamOver, connect, prefixed

MIB = 2**20
ENDLESS_S = 4.0  # how long a client goes on that never ends by itself
SLOWLY = ("SLOW_SENDER", "SERVER_BUSY", "INVALID_REQUEST")
UPLOADERS = 100  # connections
COMMANDS = 3000
CHANGES, CHANGES_S = 50_000, 30.0
CONTROL, UPLOAD = path_of("StylizeInteractive"), path_of("UploadImage")


def cases(limits: Limits) -> Iterator[Case]:
    """Uploads, commands and readers."""
    yield from _upload_cases(limits)
    yield from _command_cases()
    yield from _reader_cases(limits)


# Uploads --------------------------------------------------------------------------------------------------------------


def piece(chunk: bytes) -> bytes:
    return prefixed(pb.UploadImageRequest(chunk=chunk).SerializeToString())


def _upload_cases(limits: Limits) -> Iterator[Case]:
    header = b"GRAMCKP\x01"
    whole: Mapping[str, Iterable[bytes]] = {
        "without a piece": (),
        "of empty pieces": [piece(b"")] * 3000,
        "of one empty piece": [piece(b"")],
        "of a piece above a MiB": [piece(bytes(MIB + 1))],
        "of one byte more than allowed": [
            *[piece(bytes(MIB))] * (limits.max_image_bytes // MIB),
            piece(b"x"),
        ],
        "of a checkpoint's header": [piece(header)],
        "of a checkpoint with an endless header": [piece(header + b"\xff\xff\xff\x7f"), *[piece(b"[" * MIB)] * 8],
        "of a checkpoint of zeros": [piece(header), *[piece(bytes(MIB))] * 16],
        "of a checkpoint's beginning": [piece(make_checkpoint(light=False)[:200])],
        "of a checkpoint and more": [piece(make_checkpoint(light=True)), *[piece(b"x" * MIB)] * 4],
        "of pieces of one byte": [piece(b"x")] * 20_000,
    }
    for what, pieces in whole.items():

        async def play(target: Target, pieces: Iterable[bytes] = pieces) -> None:
            async with target.connection() as raw:
                await target.call(raw, UPLOAD, pieces, within_s=20)

        yield Case("upload", what, play, 30, max_rise=3 * limits.max_image_bytes + 32 * MIB)
    for what, (chunk, pause_s) in {
        "empty pieces without end": (b"", 0.0),
        "bytes without end": (b"x", 0.0),
        "MiB without end": (bytes(MIB), 0.0),
        "a byte now and then without end": (b"x", 0.1),
    }.items():
        yield _endless_upload_case(what, chunk, pause_s)
    yield _paused_uploads_case(limits)


def _endless_upload_case(what: str, chunk: bytes, pause_s: float) -> Case:
    async def play(target: Target) -> None:
        loop = asyncio.get_running_loop()
        async with target.connection() as raw:
            stream, end = raw.open_stream(UPLOAD), loop.time() + ENDLESS_S
            many = piece(chunk) * (1 if pause_s or chunk[1:] else 100)
            with contextlib.suppress(StreamOver, TimeoutError):  # TimeoutError: the server gives no window back
                while loop.time() < end:
                    await stream.send(many, patience_s=ENDLESS_S)
                    await asyncio.sleep(pause_s)
            if stream.is_over:
                target.check(await stream.answer(within_s=5))
            stream.cancel()

    return Case("upload", what, play, max_rise=64 * MIB)


async def _upload_once(target: Target, raw: RawConnection) -> Answer:
    return await target.call(raw, UPLOAD, [piece(job().content.data)], allowed=("OK", "SERVER_BUSY"))


def _paused_uploads_case(limits: Limits) -> Case:
    """Many clients each send nearly a whole image and pause. All of them are ended, and an honest upload goes through
    in the meantime."""
    pieces = (limits.max_image_bytes - 1) // MIB
    within_s = limits.max_idle_s + 30

    async def play(target: Target) -> None:
        async def pause(raw: RawConnection) -> None:
            stream = raw.open_stream(UPLOAD)
            with contextlib.suppress(StreamOver, TimeoutError):
                for _ in range(pieces):
                    await stream.send(piece(bytes(MIB)), patience_s=within_s)
            target.check(await stream.answer(within_s), SLOWLY)

        every = await asyncio.gather(*(connect(target.address) for _ in range(UPLOADERS)))
        try:
            async with asyncio.TaskGroup() as group:
                for raw in every:
                    group.create_task(pause(raw))
                await asyncio.sleep(1)
                async with asyncio.timeout(within_s), target.connection() as raw:
                    while (answer := await _upload_once(target, raw)).code != "OK":
                        await asyncio.sleep(answer.retry_after_s or 1.0)  # as a client does
        finally:
            for raw in every:
                raw.abort()

    rise = limits.max_receiving_bytes + UPLOADERS * MIB // 4 + 32 * MIB
    return Case("upload", f"{UPLOADERS} that pause", play, 2 * within_s, rise)


# Commands -------------------------------------------------------------------------------------------------------------


def start(*, size: int = 32, iterations: int = 400, **fields: Any) -> bytes:
    spec = job(recipe=overrides_to_message({**RECIPE, "size": size, "iterations": iterations}), **fields)
    return _message(start=pb.StartCommand(spec=spec))


def _message(**fields: Any) -> bytes:
    return prefixed(pb.StylizeInteractiveRequest(**fields).SerializeToString())


def _command_cases() -> Iterator[Case]:
    layers = pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1", weight=1.0)] * 1000)
    commands = {
        "pause and resume": [{"pause": {}}, {"resume": {}}],
        "updates": [{"update": {"beta": 2.0}}],
        "updates of many layers": [{"update": {"style_layers": layers}}],
        "invalid updates": [{"update": {"alpha": -1.0}}],
        "frames": [{"frame": {}}],
        "checkpoints": [{"checkpoint": {}}],
        "light checkpoints": [{"checkpoint": {"light": True}}],
        "acks of the future": [{"ack": {"sequence": 2**64 - 1}}],
        "acks of the past": [{"ack": {"sequence": 1}}],
        "starts": [{"start": {"spec": job(seed=1)}}],
        "attaches": [{"attach": {"job_id": "x"}}],
        "nothing": [{}],
        "finishes": [{"finish": {}}],
    }
    for what, kinds in commands.items():
        encoded = [_message(command_id=7, **fields) for fields in kinds]
        for reads in (True, False):
            yield _commands_case(f"{what}, {'read' if reads else 'not read'}", encoded, reads=reads)


def _commands_case(what: str, encoded: list[bytes], *, reads: bool) -> Case:
    """Thousands of commands to a paused job, from a client that reads the answers, or none."""

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            stream = raw.open_stream(CONTROL, hold=not reads)
            await stream.send(start(frames=pb.FrameOptions(max_in_flight=1)) + _message(command_id=1, pause={}))
            # A client that does not read is not read from either, or is ended. Either is right.
            resume = _message(command_id=2, resume={})
            with contextlib.suppress(StreamOver, TimeoutError):
                for command in itertools.chain(itertools.islice(itertools.cycle(encoded), COMMANDS), [resume]):
                    await stream.send(command, patience_s=3)
                await stream.send(b"", end=True, patience_s=3)
            if not reads:
                await asyncio.sleep(1)
                stream.cancel()
                return
            target.check(await stream.answer(within_s=20))

    return Case("commands", what, play, 30, max_rise=96 * MIB)


# Readers --------------------------------------------------------------------------------------------------------------


def _reader_cases(limits: Limits) -> Iterator[Case]:
    yield _changes_case(limits)
    for count, frames in ((1, True), (15, True), (15, False)):
        yield _dripping_readers_case(count, limits, frames=frames)


def _changes_case(limits: Limits) -> Case:
    """A controller changes a paused job without end, and none of its watchers reads. Changes replace each other."""
    layers = pb.LayerWeights(layers=[pb.LayerWeight(layer=f"relu{number}_1", weight=1.5) for number in range(1, 6)])
    watchers = limits.max_watchers - 1

    async def play(target: Target) -> None:
        async with target.connection() as raw, target.connection(window=0) as slow:
            controller = raw.open_stream(CONTROL)
            await controller.send(start(iterations=limits.max_iterations) + _message(command_id=1, pause={}))
            await controller.wait_for_data(60, within_s=10)
            accepted = pb.StylizeInteractiveResponse.FromString(controller.messages()[0]).event.accepted
            watch = prefixed(pb.WatchJobRequest(job_id=accepted.job_id).SerializeToString())
            for _ in range(watchers):
                await slow.open_stream(path_of("WatchJob"), hold=True).send(watch, end=True)
            end = asyncio.get_running_loop().time() + CHANGES_S
            for number in range(CHANGES):
                if asyncio.get_running_loop().time() > end:  # an iteration of this server takes long
                    break
                update = pb.UpdateCommand(beta=1.0 + number % 7, style_layers=layers)
                with contextlib.suppress(TimeoutError):
                    await controller.send(_message(command_id=number, update=update), patience_s=CHANGES_S)
            controller.cancel()

    return Case("readers", f"{CHANGES} changes of a paused job, which nobody reads", play, 60, max_rise=0)


def _dripping_readers_case(count: int, limits: Limits, *, frames: bool) -> Case:
    """Readers of a job that give back a few bytes of their window at a time. The job's end is not delayed."""
    options = pb.FrameOptions(format=pb.IMAGE_FORMAT_PNG) if frames else None
    watchers = min(count, limits.max_watchers - 1)

    async def drip(stream: RawStream) -> None:
        while not stream.is_over:
            stream.release(100)
            await asyncio.sleep(0.2)

    async def play(target: Target) -> None:
        spec = job(recipe=overrides_to_message({**RECIPE, "size": 128, "iterations": 400}), frames=options)
        request = pb.StylizeStreamRequest(spec=spec)
        async with target.connection() as raw, target.connection(window=1000) as slow:
            stream = raw.open_stream(path_of("StylizeStream"))
            await stream.send(*one(request.SerializeToString()), end=True)
            await stream.wait_for_data(60, within_s=10)
            job_id = pb.StylizeStreamResponse.FromString(stream.messages()[0]).event.accepted.job_id
            watch = pb.WatchJobRequest(job_id=job_id, frames=options).SerializeToString()
            readers = [slow.open_stream(path_of("WatchJob"), hold=True) for _ in range(watchers)]
            for reader in readers:
                await reader.send(prefixed(watch), end=True)
            drips = [asyncio.create_task(drip(reader)) for reader in readers]
            try:
                answer = target.check(await stream.answer(within_s=20), ("OK",))
            finally:
                for each in drips:
                    each.cancel()
            if not pb.StylizeStreamResponse.FromString(answer.messages[-1]).event.HasField("result"):
                raise RuleViolation("a job beside dripping readers has no result")

    what = f"{watchers} that drip {'frames' if frames else 'events'}"
    return Case("readers", what, play, 30, max_rise=limits.max_sending_bytes + 64 * MIB)
