"""Paints a photo, shows how far it is, and keeps the newest picture on disk while it forms. Without asyncio.

    python examples/python/sync.py photo.jpg painting.jpg -o out.png

Needs a server (`make serve`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gramophone_client import Accepted, Frame, FrameOptions, GramophoneClient, GramophoneError, Progress, Result


def paint(client: GramophoneClient, photo: Path, painting: Path, out: Path, size: int) -> None:
    """Writes the result to `out`, and until then the newest frame to a file beside it."""
    preview = out.with_name(f"{out.stem}-preview.jpg")
    frames = FrameOptions(min_interval_s=0.5, max_side=360)
    with client.stream(photo, painting, size=size, frames=frames) as updates:
        for update in updates:
            match update:
                case Accepted():
                    print(f"job {update.job_id}: {update.width}x{update.height}, {update.iterations} iterations")
                case Progress():
                    print(f"iteration {update.iteration} of {update.iterations}, loss {update.losses.total:.4g}")
                case Frame():
                    update.save(preview)
                case Result():
                    update.save(out)
                    print(f"{out}: {update.iterations} iterations in {update.elapsed_s:.1f} s")
                case _:
                    pass  # Waiting, Checkpoint and others


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Paint a photo in the style of a painting.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("painting", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"), help="(default: out.png)")
    parser.add_argument("--size", type=int, default=512, help="longest side in pixels (default: 512)")
    parser.add_argument("--server", default="127.0.0.1:50051", help="(default: 127.0.0.1:50051)")
    args = parser.parse_args()
    try:
        with GramophoneClient(args.server) as client:
            client.wait_until_ready(timeout=30)
            paint(client, args.photo, args.painting, args.out, args.size)
    except (GramophoneError, OSError) as error:
        sys.exit(f"sync.py: {error}")


if __name__ == "__main__":
    main()
