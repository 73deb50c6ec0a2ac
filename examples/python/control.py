"""Steers a job while it runs: strengthens the style halfway, keeps a picture, and stops when nothing changes any more.

    python examples/python/control.py photo.jpg painting.jpg -o out.png

Needs a server (`make serve`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gramophone_client import Changed, GramophoneClient, GramophoneError, JobEndedError, Progress

NO_BETTER_FOR = 20  # iterations
BETTER = 0.99  # times the best loss so far


def steer(client: GramophoneClient, photo: Path, painting: Path, out: Path, size: int, iterations: int) -> None:
    """Each command returns the iteration that it applies to. Commands also work while no update is read, and from other
    threads."""
    best, best_at, halfway = float("inf"), 0, False
    with client.control(photo, painting, frames=None, size=size, iterations=iterations, smallest_size=0) as job:
        try:
            for update in job:  # a busy reader misses some iterations, so nothing waits for exactly one
                match update:
                    case Progress() if update.iteration - best_at > NO_BETTER_FOR:
                        last = job.finish()
                        print(f"no better since iteration {best_at}: finished at {last}")
                        break
                    case Progress():
                        if update.losses.total < best * BETTER:
                            best, best_at = update.losses.total, update.iteration
                        if not halfway and update.iteration >= iterations // 2:
                            halfway = True
                            job.picture().save(out.with_name(f"{out.stem}-halfway.png"))
                            first = job.update(beta=6.0)
                            print(f"twice the style from iteration {first} on")
                    case Changed():
                        best, best_at = float("inf"), update.iteration  # the loss has other weights now
                    case _:
                        pass
        except JobEndedError:
            pass  # the job was done before the last command reached it
        result = job.result()
    result.save(out)
    print(f"{out}: {result.stop_reason} after {result.iterations} iterations")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Paint a photo, and steer the job while it runs.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("painting", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"), help="(default: out.png)")
    parser.add_argument("--size", type=int, default=512, help="longest side in pixels (default: 512)")
    parser.add_argument("--iterations", type=int, default=200, help="at most (default: 200)")
    parser.add_argument("--server", default="127.0.0.1:50051", help="(default: 127.0.0.1:50051)")
    args = parser.parse_args()
    try:
        with GramophoneClient(args.server) as client:
            steer(client, args.photo, args.painting, args.out, args.size, args.iterations)
    except (GramophoneError, OSError) as error:
        sys.exit(f"control.py: {error}")


if __name__ == "__main__":
    main()
