"""The contact sheet: every preset on every pair of example pictures, to see the effect of a changed default.

    python examples/gallery.py                       # or `make gallery`; writes examples/gallery.jpg
    python examples/gallery.py --size 256 --output /tmp/sheet.png --beta 1 --beta 5

Runs the engine in this process. Each preset is a row, each pair of photo and painting a column. With --beta, each row
is the preset `fast` with one of the strengths.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from gramophone.recipe import PRESETS, Recipe, preset
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine

EXAMPLES = Path(__file__).parent
PAIRS = [("cat", "brushwork"), ("coffee", "stained_glass"), ("cat", "woodcut")]
GAP, CAPTION = 8, 18  # pixels


def read(path: Path) -> Tensor:
    """uint8 [3, height, width], RGB."""
    image = Image.open(path).convert("RGB")
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def paint(engine: VggEngine, recipe: Recipe, photo: str, style: str, progress: Progress, title: str) -> Image.Image:
    """One picture of the sheet."""
    job = StyleJob(
        recipe=recipe,
        content=read(EXAMPLES / "photos" / f"{photo}.jpg"),
        styles=(read(EXAMPLES / "styles" / f"{style}.jpg"),),
        style_weights=(1.0,),
        start=None,
        seed=1,
    )
    run = engine.run_batch([job])
    total = sum(scale.width * scale.height * scale.iterations for scale in job.scales)
    bar = progress.add_task(title, total=total)
    while not run.finished:
        (report,) = run.advance()
        progress.update(bar, completed=total - report.pixel_iterations_left)
    picture = run.picture(0)
    return Image.frombytes("RGB", (picture.shape[1], picture.shape[0]), bytes(picture.flatten().tolist()))


def main() -> None:
    """Paints and writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="longest side of each picture in pixels")
    parser.add_argument(
        "--beta", type=float, action="append", help="strength of the preset fast; may be given several times"
    )
    parser.add_argument("--output", type=Path, default=EXAMPLES / "gallery.jpg")
    arguments = parser.parse_args()

    size = arguments.size
    if arguments.beta:
        rows = {f"fast, beta {beta:g}": preset("fast", size=size, beta=beta) for beta in arguments.beta}
    else:
        rows = {name: preset(name, size=size) for name in PRESETS}
    engine = VggEngine.load(device="auto", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    engine.warm_up()
    sheet = Image.new("RGB", (len(PAIRS) * (size + GAP) + GAP, len(rows) * (size + CAPTION + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    lowest = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        top = GAP
        for name, recipe in rows.items():
            tallest = 0
            for column, (photo, style) in enumerate(PAIRS):
                started = time.perf_counter()
                picture = paint(engine, recipe, photo, style, progress, f"{name}: {photo}, {style}")
                left = GAP + column * (size + GAP)
                sheet.paste(picture, (left, top + CAPTION))
                seconds = time.perf_counter() - started
                draw.text((left, top), f"{name}: {photo} + {style}, {seconds:.0f} s", fill="black", font_size=13)
                tallest = max(tallest, picture.height)
            top += tallest + CAPTION + GAP
            lowest = top
    sheet.crop((0, 0, sheet.width, lowest)).save(arguments.output, quality=90)
    print(arguments.output)


if __name__ == "__main__":
    main()
