"""Whether jobs gain by sharing a batch: time of an iteration per job, by size and number of slots.

    python -m benchmarks.batch --device cpu --sizes 64,128,256 --slots 1,2,4 --json FILE

Square pictures, the recipe `fast` at one scale, and the engine's own batches with all slots taken. `ratio` is the time
per job divided by that of one slot: a batch pays below 1, and gains nothing at 1. `leave`, `join` and `join_new_style`
are the costs of returning a job and of taking it in, in iterations of one slot; the last one with a style that is not
in the cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.iteration import jobs
from benchmarks.measure import Row, interleaved, machine, print_table, write_json
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine

ITERATIONS = 100_000  # more than a measurement makes


def noise(size: int, count: int) -> Tensor:
    """Smooth pictures [count, 3, size, size] in [0, 1]."""
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(size))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def rows_of(engine: VggEngine, size: int, optimiser: Optimiser, slots: list[int], repeats: int) -> list[Row]:
    """The rows of one size: all widths, interleaved."""
    recipe = Recipe(size=size, smallest_size=0, iterations=ITERATIONS, optimiser=optimiser)
    all_jobs = jobs(noise(size, max(slots)), noise(size, max(slots)).flip(0), recipe)
    batches = {width: filled(engine, all_jobs[:width]) for width in slots}
    variants: dict[str, Callable[[], object]] = {
        str(width): partial(batch.advance, 2) for width, batch in batches.items()
    }
    device = engine.device.type
    times = {int(name): ms / 2 for name, ms in interleaved(variants, repeats, device, 20.0).items()}
    alone = times[min(slots)] / min(slots)
    rows: list[Row] = [
        {"optimiser": optimiser, "size": size, "slots": width, "ms": ms, "ms_per_job": ms / width,
         "ratio": ms / width / alone}
        for width, ms in times.items()
    ]  # fmt: skip
    rows[-1] |= {name: ms / alone for name, ms in _leave_and_join_ms(engine, batches[max(slots)]).items()}
    for batch in batches.values():
        batch.close()
    return rows


def filled(engine: BatchEngine, all_jobs: list[StyleJob]) -> Batch:
    """A batch with a slot for each of the jobs."""
    states = [engine.admit(job) for job in all_jobs]
    batch = engine.batch(states[0].shape, len(states))
    for state in states:
        batch.join(state)
    return batch


def _leave_and_join_ms(engine: VggEngine, batch: Batch) -> dict[str, float]:
    """Milliseconds to leave a batch and to join it again, with the style in the cache and without."""

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    state = batch.states[0]
    times = {"leave": timed(partial(batch.leave, 0)), "join": timed(partial(batch.join, state))}
    batch.leave(0)
    engine.style_targets.clear()
    return times | {"join_new_style": timed(partial(batch.join, state))}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--sizes", default="64,128,256", help="sides in pixels, with commas")
    parser.add_argument(
        "--slots", default="1,2,4", help="numbers of slots, with commas; the ratio is against the least"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    engine = VggEngine.load(
        device=arguments.device, precision=arguments.precision, weights="embedded", backbone="vgg19", threads=0
    )
    slots = [int(width) for width in arguments.slots.split(",")]
    rows = [
        row
        for optimiser in (Optimiser.ADAM, Optimiser.LBFGS)
        for size in map(int, arguments.sizes.split(","))
        for row in rows_of(engine, size, optimiser, slots, arguments.repeats)
    ]
    print_table(f"an iteration per job, by slots, {engine.precision}\n{machine(arguments.device)}", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
