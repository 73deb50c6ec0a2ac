"""Jobs that cost a server much for a small request: pictures that decode large, encodings, dear beginnings."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_server.config import Limits
from tests.bad_input.inputs import RECIPE, job
from tests.bad_input.streams import start
from tests.bad_input.target import Case, Target, one, path_of
from tests.support.raw_http2 import RawStream, prefixed

MIB = 2**20
AT_ONCE = 8  # jobs


@cache
def solid(width: int, height: int, colour: int) -> bytes:
    """A PNG of one colour: few bytes for any size, and other bytes for each colour."""
    row = b"\0" + colour.to_bytes(3) * width
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def cases(limits: Limits) -> Iterator[Case]:
    """Pictures, encodings and beginnings."""
    yield from _picture_cases(limits)
    yield from _encoding_cases(limits)
    yield _beginnings_case(limits)


def _picture_cases(limits: Limits) -> Iterator[Case]:
    """Pictures of the most pixels that are allowed, in every shape, in every place of a job, eight jobs at once."""
    pixels = limits.max_image_pixels
    side = int(pixels**0.5)
    shapes = {"square": (side, side), "wide": (pixels // 16, 16), "tall": (16, pixels // 16), "a line": (pixels, 1)}
    for shape, (width, height) in shapes.items():
        for place in ("content", "styles", "start_image"):
            yield _pictures_case(shape, place, width, height, limits)


def _pictures_case(shape: str, place: str, width: int, height: int, limits: Limits) -> Case:
    async def play(target: Target) -> None:
        recipe = {**RECIPE, "iterations": limits.max_iterations}
        requests = []
        for number in range(AT_ONCE):
            data = solid(width, height, number)
            fields: dict[str, Any] = {
                "content": {"content": data},
                "styles": {"styles": [data] * limits.max_styles},
                "start_image": {"start_image": pb.ImageSource(data=data)},
            }[place]
            message = overrides_to_message(recipe)
            if place == "start_image":
                message.start = pb.START_IMAGE
            requests.append(pb.StylizeRequest(spec=job(recipe=message, **fields)).SerializeToString())
        async with target.connection() as raw, asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(target.call(raw, path_of("Stylize"), one(request), within_s=50))

    # Decoders first, then what the jobs keep.
    rise = limits.request_memory_bytes + limits.max_decoded_bytes
    return Case("pictures", f"{AT_ONCE} jobs with {shape} {place} pictures", play, 60, rise)


def _encoding_cases(limits: Limits) -> Iterator[Case]:
    """A paused job's frame in every quality, format and size. One encoding is kept only while somebody waits for it."""
    for format in ("JPEG", "PNG", "WEBP"):
        yield _encodings_case(format, limits)


def _encodings_case(format: str, limits: Limits) -> Case:
    async def play(target: Target) -> None:
        async with target.connection() as raw:
            controller = raw.open_stream(path_of("StylizeInteractive"))
            paused = prefixed(pb.StylizeInteractiveRequest(command_id=1, pause={}).SerializeToString())
            await controller.send(start(frames=pb.FrameOptions(), content=solid(2048, 2048, 1)) + paused)
            job_id = await _job_id(controller)
            for quality in range(1, 101):
                options = pb.FrameOptions(format=f"IMAGE_FORMAT_{format}", quality=quality, max_side=16 + quality)
                watch = pb.WatchJobRequest(job_id=job_id, frames=options).SerializeToString()
                watcher = raw.open_stream(path_of("WatchJob"))
                await watcher.send(prefixed(watch), end=True)
                with contextlib.suppress(TimeoutError):
                    await watcher.wait_for_data(600, within_s=0.2)
                watcher.cancel()
            controller.cancel()

    return Case("encodings", f"a paused frame as {format} of 100 qualities and sizes", play, 60, max_rise=128 * MIB)


async def _job_id(controller: RawStream) -> str:
    await controller.wait_for_data(60, within_s=10)
    return pb.StylizeInteractiveResponse.FromString(controller.messages()[0]).event.accepted.job_id


def _beginnings_case(limits: Limits) -> Case:
    """Four callers, each with one job after another whose styles are new, solid and as large as allowed."""
    side = min(2048, limits.max_size * 4)

    async def play(target: Target) -> None:
        async def call(caller: int) -> None:
            async with target.connection() as raw:
                for number in range(4):
                    colours = [caller << 16 | number << 8 | style for style in range(limits.max_styles)]
                    styles = [solid(side, side, colour) for colour in colours]
                    recipe = overrides_to_message(
                        {**RECIPE, "size": max(16, limits.max_size // 4), "iterations": 1, "style_scale": 4.0}
                    )
                    request = pb.StylizeRequest(spec=job(styles=styles, recipe=recipe)).SerializeToString()
                    await target.call(raw, path_of("Stylize"), one(request), within_s=100)

        async with asyncio.TaskGroup() as group:
            for caller in range(4):
                group.create_task(call(caller))

    return Case("beginnings", "4 callers with the dearest styles", play, 120, limits.request_memory_bytes)
