"""Jobs that cost a server much for a small request: pictures that decode large, encodings, dear beginnings, memory."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from functools import cache
from statistics import median
from typing import Any

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_client import AsyncGramophoneClient
from gramophone_server.config import Limits
from gramophone_server.memory_bound import request_memory_bytes
from tests.bad_input.inputs import RECIPE, in_jpeg, in_png, job
from tests.bad_input.streams import start
from tests.bad_input.target import Case, Target, one, path_of
from tests.support.bad_pictures import BOMBS, chunk
from tests.support.monitoring import RuleViolation
from tests.support.raw_http2 import RawStream, StreamOver, prefixed

MIB = 2**20
AT_ONCE = 8  # jobs
CANCELLED = 40  # calls
WATCHERS = 40
ENCODED_S = 2.0  # within which a frame arrives
BESIDE = 5.0  # times longer than alone may a small job take beside dear beginnings
CLIENTS, DEAR_JOBS = 4, 3
STREAM = path_of("StylizeStream")


@cache
def solid(width: int, height: int, colour: int) -> bytes:
    """A PNG of one colour: few bytes for any size, and other bytes for each colour."""
    row = b"\0" + colour.to_bytes(3) * width
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND")


def numbered(png: bytes, number: int) -> bytes:
    """The same picture in other bytes, for each number."""
    end = chunk(b"IEND")
    return png.removesuffix(end) + chunk(b"tEXt", b"number\0%d" % number) + end


def cases(limits: Limits) -> Iterator[Case]:
    """Pictures, decoders, encodings, memory, and beginnings."""
    yield from _picture_cases(limits)
    yield _cancelled_case()
    for format in ("JPEG", "PNG", "WEBP"):
        yield _encodings_case(format)
    yield _memory_case(limits)
    yield _beginnings_case()


# Decoded pictures -----------------------------------------------------------------------------------------------------


def _picture_cases(limits: Limits) -> Iterator[Case]:
    """Pictures of the most pixels that are allowed, in every shape, in every place of a job, eight jobs at once."""
    pixels = limits.max_image_pixels
    side = int(pixels**0.5)
    shapes = {"square": (side, side), "wide": (pixels // 16, 16), "tall": (16, pixels // 16), "a line": (pixels, 1)}
    for shape, (width, height) in shapes.items():
        for place in ("content", "styles", "start_image"):
            yield _pictures_case(shape, place, width, height, limits)


def _pictures_case(shape: str, place: str, width: int, height: int, limits: Limits) -> Case:
    """What long jobs hold of their pictures, when all are decoded, is inside of the budget."""
    allowed = limits.max_decoded_bytes + 64 * MIB

    def request(number: int) -> bytes:
        data = numbered(solid(width, height, 0), number)
        recipe = overrides_to_message({**RECIPE, "iterations": limits.max_iterations})
        if place == "content":
            spec = job(content=data, recipe=recipe)
        elif place == "styles":
            spec = job(styles=[data] * limits.max_styles, recipe=recipe)
        else:
            recipe.start = pb.START_IMAGE
            spec = job(start_image=pb.ImageSource(data=data), recipe=recipe)
        return pb.StylizeStreamRequest(spec=spec).SerializeToString()

    async def play(target: Target) -> None:
        before = target.memory()
        async with target.connection() as raw:
            streams = [raw.open_stream(STREAM) for _ in range(AT_ONCE)]
            for number, stream in enumerate(streams):
                with contextlib.suppress(StreamOver):
                    await stream.send(*one(request(number)), end=True)
            for stream in streams:
                await stream.wait_for_data(60, within_s=60)
                if stream.is_over:
                    target.check(await stream.answer(1))
            held = target.memory() - before
            for stream in streams:
                stream.cancel()
        if held > allowed and not target.is_shared:
            message = f"{AT_ONCE} jobs hold {held / MIB:.0f} MiB of pictures, at most {allowed / MIB:.0f} are allowed"
            raise RuleViolation(message)

    # The decoders' own memory comes and goes.
    return Case("pictures", f"{AT_ONCE} jobs with {shape} {place} pictures", play, 90, request_memory_bytes(limits))


@cache
def _slow_picture() -> bytes:
    return BOMBS["webp-lossy-of-32-megapixels"]()


def _cancelled_case() -> Case:
    """Calls with pictures that take long to decode, which are all cancelled. Others have their turn meanwhile, and the
    decoders are free soon afterwards."""

    async def play(target: Target) -> None:
        data = _slow_picture()
        request = pb.StylizeStreamRequest(spec=job(content=data, styles=[data] * 4)).SerializeToString()
        async with target.connection() as raw:
            streams = [raw.open_stream(STREAM) for _ in range(CANCELLED)]
            for stream in streams:
                await stream.send(*one(request), end=True)
            await asyncio.sleep(2)
            for stream in streams:
                stream.cancel()
            await asyncio.sleep(2)
            cpu_s = target.cpu_s()
            await asyncio.sleep(2)
            if (used_s := target.cpu_s() - cpu_s) > 1.5 and not target.is_shared:
                raise RuleViolation(f"decoding goes on for calls that were cancelled: {used_s:.1f} s of CPU in 2 s")

    return Case("decoding", f"{CANCELLED} calls are cancelled", play, 30, max_rise=2**31)


# Encodings ------------------------------------------------------------------------------------------------------------


def _encodings_case(format: str) -> Case:
    """A paused job's frame in many qualities and sizes. One encoding is kept only while somebody waits for it."""

    async def play(target: Target) -> None:
        async with target.connection() as raw:
            controller = raw.open_stream(path_of("StylizeInteractive"))
            pause = prefixed(pb.StylizeInteractiveRequest(command_id=1, pause={}).SerializeToString())
            size = min(1024, target.limits.max_size)
            first = start(frames=pb.FrameOptions(max_side=64), content=solid(size, size, 1), size=size)
            await controller.send(first)
            job_id = await _job_id(controller)
            await controller.wait_for_data(len(controller.data) + 500, within_s=10)  # a frame
            await controller.send(pause)
            for number in range(WATCHERS):
                options = pb.FrameOptions(
                    format=f"IMAGE_FORMAT_{format}", quality=1 + 2 * number, max_side=size - number
                )
                watch = pb.WatchJobRequest(job_id=job_id, frames=options).SerializeToString()
                watcher = raw.open_stream(path_of("WatchJob"))
                await watcher.send(prefixed(watch), end=True)
                with contextlib.suppress(TimeoutError):
                    await watcher.wait_for_data(10_000, within_s=ENCODED_S)
                watcher.cancel()
            controller.cancel()

    return Case("encodings", f"a paused frame as {format} of {WATCHERS} qualities", play, 90, max_rise=24 * MIB)


async def _job_id(controller: RawStream) -> str:
    await controller.wait_for_data(60, within_s=10)
    return pb.StylizeInteractiveResponse.FromString(controller.messages()[0]).event.accepted.job_id


# The device -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _streams_of(target: Target, requests: list[bytes]) -> AsyncIterator[list[RawStream]]:
    """Jobs that run while the block lasts."""
    async with target.connection() as raw:
        streams = [raw.open_stream(STREAM) for _ in requests]
        for stream, request in zip(streams, requests, strict=True):
            await stream.send(*one(request), end=True)
        try:
            yield streams
        finally:
            for stream in streams:
                stream.cancel()


def _memory_case(limits: Limits) -> Case:
    """Long jobs that do not fit beside each other into the memory of the device. Small ones find a place."""

    async def play(target: Target) -> None:
        recipe = overrides_to_message({**RECIPE, "size": limits.max_size, "iterations": limits.max_iterations})
        spec = job(content=solid(limits.max_size, limits.max_size, 1), recipe=recipe)
        async with _streams_of(target, [pb.StylizeStreamRequest(spec=spec).SerializeToString()] * 12):
            await asyncio.sleep(8)

    return Case("memory", "12 jobs of the largest size", play, 30, max_rise=2**30)


def _beginnings_case() -> Case:
    """Four clients, each with one job after another whose styles are new, solid and large; one small job beside them.

    With the real engine, because a pattern has no beginning.
    """
    small: dict[str, Any] = {"size": 64, "smallest_size": 0, "iterations": 60}

    async def play(target: Target) -> None:
        async def dear_jobs(attacker: int) -> None:
            async with target.connection() as raw:
                for number in range(DEAR_JOBS):
                    colours = [attacker << 16 | number << 8 | style for style in range(4)]
                    styles = [solid(1024, 1024, colour) for colour in colours]
                    recipe = overrides_to_message({**RECIPE, "size": 256, "iterations": 1, "style_scale": 4.0})
                    request = pb.StylizeRequest(spec=job(styles=styles, recipe=recipe)).SerializeToString()
                    await target.call(raw, path_of("Stylize"), one(request), within_s=200)

        async with AsyncGramophoneClient(target.address, timeout=300) as client:

            async def seconds() -> float:
                begin = time.monotonic()
                await client.stylize(in_png(), in_jpeg(), **small)
                return time.monotonic() - begin

            alone_s = median([await seconds() for _ in range(3)])
            async with asyncio.TaskGroup() as group:
                attackers = [group.create_task(dear_jobs(number)) for number in range(CLIENTS)]
                await asyncio.sleep(2)
                beside_s = [await seconds() for _ in range(3)]
                for attacker in attackers:
                    attacker.cancel()
        if median(beside_s) > BESIDE * alone_s:
            times = ", ".join(f"{each:.1f}" for each in beside_s)
            raise RuleViolation(f"small jobs take {alone_s:.1f} s alone and {times} s beside dear beginnings")

    return Case("beginnings", f"{CLIENTS} clients with dear styles", play, 300, max_rise=2**31, engine="vgg")
