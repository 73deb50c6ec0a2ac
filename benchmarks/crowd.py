"""Equal jobs at the same time against one after another, through the server: the gain of sharing batches and slices.

    python -m benchmarks.crowd --sizes 64,128 --jobs 16 --json FILE

The cat in brushwork with the Oxford VGG-19 at one scale, on the CPU. `alone_s` is the time of all jobs if each is sent
after the result of the one before; `together_s` if all are sent at the same time. Each is the shortest of the
interleaved repeats, and `gain` is their ratio. `first_s` is the time of the first result of the jobs sent together, in
the fastest repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time

from benchmarks.jobs import CONTENT, STYLE
from benchmarks.measure import Row, machine, print_table, write_json
from gramophone_client import AsyncGramophoneClient
from gramophone_client.types.options import ImageInput


async def sizes_measured(
    address: str,
    sizes: list[int],
    jobs: int,
    iterations: int,
    repeats: int,
    photo: ImageInput = CONTENT,
    painting: ImageInput = STYLE,
) -> list[Row]:
    """A row for each size."""
    rows: list[Row] = []
    async with AsyncGramophoneClient(address) as client:
        await client.wait_until_ready(120)
        content, style = await client.upload(photo), await client.upload(painting)

        async def job(size: int) -> float:
            await client.stylize(content, style, size=size, iterations=iterations, smallest_size=0)
            return time.perf_counter()

        async def alone(size: int) -> float:
            start = time.perf_counter()
            return [await job(size) for _ in range(jobs)][-1] - start

        async def together(size: int) -> list[float]:
            start = time.perf_counter()
            return sorted(end - start for end in await asyncio.gather(*(job(size) for _ in range(jobs))))

        for size in sizes:
            await together(size)  # the server measures which batch widths pay
            each, all_of_them = [], []
            for i in range(repeats):
                print(f"{size} px, repeat {i + 1} of {repeats}", file=sys.stderr, flush=True)
                each.append(await alone(size))
                all_of_them.append(await together(size))
            ends = min(all_of_them, key=lambda ends: ends[-1])
            rows.append(
                {"size": size, "jobs": jobs, "iterations": iterations, "alone_s": min(each), "together_s": ends[-1],
                 "gain": min(each) / ends[-1], "first_s": ends[0]}
            )  # fmt: skip
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,128", help="longest sides in pixels, with commas")
    parser.add_argument("--jobs", type=int, default=16, help="at most as many as the server runs at the same time")
    parser.add_argument("--iterations", type=int, default=30, help="of each job")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    command = [sys.executable, "-m", "gramophone_server.main", "--port", "0", "--device", "cpu", "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            rows = asyncio.run(sizes_measured(address, sizes, arguments.jobs, arguments.iterations, arguments.repeats))
        finally:
            server.terminate()
            server.wait(60)
    print_table(f"{arguments.jobs} equal jobs through the server\n{machine()}", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
