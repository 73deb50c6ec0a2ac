"""Paints a folder of photos in one style.

    python examples/python/batch.py photos painting.jpg -o painted

At most `--parallel` jobs run at a time. A photo whose picture is there already is skipped, so a second run continues
where the first one stopped. A photo that fails is reported and does not end the others. Needs a server (`make serve`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from gramophone_client import (
    AsyncGramophoneClient,
    ConnectionFailedError,
    ExhaustedError,
    GramophoneError,
    UploadedImage,
)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


async def paint(client: AsyncGramophoneClient, photo: Path, style: UploadedImage, out: Path, size: int) -> None:
    """Paints one photo. While the server is full, waits for as long as it says."""
    while True:
        try:
            stylized = await client.stylize(photo, style, size=size)
            return await asyncio.to_thread(stylized.save, out)  # the file appears when it is complete
        except ExhaustedError as error:
            if error.retry_after_s is None:  # waiting does not help: it is too large for this server
                raise
            await asyncio.sleep(error.retry_after_s)


async def paint_folder(server: str, photos: Path, painting: Path, folder: Path, size: int, parallel: int) -> int:
    """Paints all photos that have no picture yet, and returns how many failed."""
    folder.mkdir(parents=True, exist_ok=True)
    every = sorted(path for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    waiting = [path for path in every if not (folder / path.name).exists()]
    print(f"{len(waiting)} of {len(every)} photos to paint")
    iterator, failed = iter(waiting), 0

    async def work(client: AsyncGramophoneClient, style: UploadedImage) -> None:
        nonlocal failed
        for photo in iterator:  # all workers take from the same one
            try:
                await paint(client, photo, style, folder / photo.name, size)
                print(f"{folder / photo.name}")
            except ConnectionFailedError:  # without a server the others would fail, too
                raise
            except (GramophoneError, OSError) as error:
                failed += 1
                print(f"{photo}: {error}", file=sys.stderr)

    async with AsyncGramophoneClient(server) as client:
        style = await client.upload(painting)
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(parallel, len(waiting))):
                workers.create_task(work(client, style))
    return failed


def main() -> None:
    """Reads the command line. The exit code is 0 if every photo has its picture."""
    parser = argparse.ArgumentParser(description="Paint a folder of photos in one style.")
    parser.add_argument("photos", type=Path, help="folder")
    parser.add_argument("painting", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--size", type=int, default=512, help="longest side in pixels (default: 512)")
    parser.add_argument("--parallel", type=int, default=4, help="jobs at a time (default: 4)")
    parser.add_argument("--server", default="127.0.0.1:50051", help="(default: 127.0.0.1:50051)")
    args = parser.parse_args()
    if not args.photos.is_dir():
        parser.error(f"{args.photos}: there is no such folder")
    if not args.painting.is_file():
        parser.error(f"{args.painting}: there is no such file")
    failed, ended_by = 0, ""
    try:
        failed = asyncio.run(paint_folder(args.server, args.photos, args.painting, args.out, args.size, args.parallel))
    except* (GramophoneError, OSError) as errors:
        ended_by = str(errors.exceptions[0])
    if failed or ended_by:
        sys.exit(f"batch.py: {ended_by or f'{failed} failed'}; run it again to continue")


if __name__ == "__main__":
    main()
