"""Paints one photo in several styles at the same time, with asyncio.

    python examples/python/async.py photo.jpg monet.jpg klee.jpg -o out

The photo is sent once; each job names it by its digest. Ctrl-C stops all jobs. Needs a server (`make serve`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from gramophone_client import AsyncGramophoneClient, GramophoneError, Progress, Result, UploadedImage


async def paint(client: AsyncGramophoneClient, photo: UploadedImage, painting: Path, out: Path, size: int) -> None:
    """Paints the photo in one style. Leaving the stream early, by an error or Ctrl-C, stops the job."""
    async with client.stream(photo, painting, size=size, frames=None) as updates:
        async for update in updates:
            match update:
                case Progress() if update.iteration % 10 == 0:
                    print(f"{painting.name}: iteration {update.iteration} of {update.iterations}")
                case Result():
                    await asyncio.to_thread(update.save, out)
                    print(f"{painting.name}: {out}")
                case _:
                    pass


async def paint_all(server: str, photo: Path, paintings: list[Path], folder: Path, size: int) -> None:
    """Paints all styles at once; the server shares its device between them."""
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncGramophoneClient(server) as client:
        uploaded = await client.upload(photo)
        async with asyncio.TaskGroup() as jobs:
            for painting in paintings:
                out = folder / f"{photo.stem}-{painting.stem}.png"
                jobs.create_task(paint(client, uploaded, painting, out, size))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Paint a photo in several styles at the same time.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("paintings", type=Path, nargs="+", metavar="painting")
    parser.add_argument("-o", "--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--size", type=int, default=512, help="longest side in pixels (default: 512)")
    parser.add_argument("--server", default="127.0.0.1:50051", help="(default: 127.0.0.1:50051)")
    args = parser.parse_args()
    errors: tuple[BaseException, ...] = ()
    try:
        asyncio.run(paint_all(args.server, args.photo, args.paintings, args.out, args.size))
    except* (GramophoneError, OSError) as failed:
        errors = failed.exceptions
    if errors:
        sys.exit("\n".join(f"async.py: {error}" for error in errors))


if __name__ == "__main__":
    main()
