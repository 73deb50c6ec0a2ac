"""The objective that recipes reach: the objective of `fast` at their final pictures, by number of gradient evaluations.

    python -m benchmarks.recipe --size 256 --json FILE
    python -m benchmarks.recipe --pair photo.jpg painting.jpg

An evaluation counts by its pixels, in units of the final size, so the number of evaluations is the cost of a recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.measure import Row, machine, print_table, write_json
from gramophone.recipe import Optimiser, Recipe, RecipeOverrides, Start, preset
from gramophone_server.config import Settings
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.images.codec import decode

EXAMPLES = Path(__file__).parent.parent / "examples"
PAIRS = [("photos/cat.jpg", "styles/brushwork.jpg"), ("photos/coffee.jpg", "styles/woodcut.jpg")]
ADAM = Optimiser.ADAM
VARIANTS: Mapping[str, RecipeOverrides] = {
    "adam 60 + 60s, average 0.97": {"optimiser": ADAM, "iterations": 60, "coarse_iterations": 60, "average": 0.97},
    "adam 20 + 40s, average 0.9": {"optimiser": ADAM, "iterations": 20, "coarse_iterations": 40, "average": 0.9},
    "lbfgs 20 + 40s": {"iterations": 20, "coarse_iterations": 40},
    "lbfgs 30 + 20s (fast)": {"iterations": 30, "coarse_iterations": 20},
    "lbfgs 40 + 20s": {"iterations": 40, "coarse_iterations": 20},
    "lbfgs 60 + 60s": {"iterations": 60, "coarse_iterations": 60},
}


def paint(engine: VggEngine, job: StyleJob) -> torch.Tensor:
    """The finished picture, uint8 [3, height, width]."""
    run = engine.run_batch([job])
    while not run.finished:
        run.advance()
    return run.picture(0).permute(2, 0, 1).contiguous()


def objective(engine: VggEngine, job: StyleJob, picture: torch.Tensor, size: int) -> float:
    """J of the preset `fast` at ``picture``: the first loss of a job that starts from it at the final size."""
    recipe = Recipe(size=size, start=Start.IMAGE, smallest_size=0, iterations=1)
    judge = StyleJob(recipe=recipe, content=job.content, styles=job.styles, style_weights=(1.0,), start=picture, seed=0)
    return engine.run_batch([judge]).advance()[0].losses.total


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="longest side in pixels")
    parser.add_argument("--pair", nargs=2, action="append", metavar=("PHOTO", "PAINTING"), help="can be repeated")
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    size: int = arguments.size
    pairs = arguments.pair or [(EXAMPLES / photo, EXAMPLES / painting) for photo, painting in PAIRS]

    engine = VggEngine.load(device="cpu", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    rows: list[Row] = []
    for name, overrides in VARIANTS.items():
        row: Row = {"name": name, "size": size}
        for photo, painting in pairs:
            content, style = (decode(Path(p).read_bytes(), Settings(), size) for p in (photo, painting))
            recipe = preset("fast", **{"size": size, "smallest_size": 90, **overrides})
            job = StyleJob(recipe=recipe, content=content, styles=(style,), style_weights=(1.0,), start=None, seed=0)
            pixels = [scale.width * scale.height * scale.iterations for scale in job.scales]
            row["evaluations"] = sum(pixels) / (pixels[-1] / recipe.iterations)
            row[f"J {Path(photo).stem} + {Path(painting).stem}"] = objective(engine, job, paint(engine, job), size)
        rows.append(row)
    print_table(f"objective at the end of a recipe, engine in {engine.precision}\n{machine()}", rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
