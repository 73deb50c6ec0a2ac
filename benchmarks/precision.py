"""The exactness of the precisions with the real network: gradients and finished pictures against fp32.

    python -m benchmarks.precision --size 192 --json FILE

Runs on the CPU and computes as a GPU would: operands and activations are rounded to the mode's types, sums are float32.
The gradient is compared at the photo, where the preset `fast` starts, and at the picture where it ends in fp32. The
picture is that of a whole `fast` job. `fp32 again` is the same job with other float32 kernels: how far two runs drift
apart only because of the order of sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, machine, print_table, write_json
from gramophone.recipe import Recipe, Start, preset
from gramophone_server.config import Settings
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.graph_runner import GraphRunnerPool
from gramophone_server.engine.style_targets import StyleTargets
from gramophone_server.images.codec import decode
from gramophone_server.network.convolutions import Kernel
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Convolution, Vgg, load_vgg

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parent.parent / "examples"
PAIRS = (("photos/cat.jpg", "styles/brushwork.jpg"), ("photos/coffee.jpg", "styles/woodcut.jpg"))


class Rounded:
    """A kernel that computes as the GPU's tensor cores do: rounded operands, float32 sums, a rounded result.

    The result of tf32 stays float32; its operands lose all but 10 bits of mantissa.
    """

    def __init__(self, kernel: Kernel, tf32: bool) -> None:
        self._weight, self._back, self._bias = (getattr(kernel, name).float() for name in ("weight", "back", "bias"))
        self._tf32 = tf32
        if tf32:
            self._weight, self._back = round_to_tf32(self._weight), round_to_tf32(self._back)

    def linear(self, x: Tensor) -> Tensor:
        return F.conv2d(self._operand(x), self._weight, self._bias, padding=1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu_()

    def backward(self, grad: Tensor) -> Tensor:
        return F.conv2d(self._operand(grad), self._back, None, padding=1).to(grad.dtype)

    def forward_pooled(self, x: Tensor) -> None:
        return None

    def _operand(self, x: Tensor) -> Tensor:
        return round_to_tf32(x) if self._tf32 else x.float()


def round_to_tf32(x: Tensor) -> Tensor:
    """Rounds to 10 bits of mantissa, ties to even, as the tensor cores do with float32."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class RoundedFeatures(VggFeatures):
    """A network on the CPU that computes as a GPU's tensor cores do in its precision."""

    def make_kernel(self, convolution: Convolution) -> Kernel:
        """torch's own convolution, with the mode's rounding around it."""
        kernel = super().make_kernel(convolution)
        return kernel if self.precision.name == "fp32" else Rounded(kernel, self.precision.name == "tf32")


def rounded(vgg: Vgg, mode: str) -> VggEngine:
    """An engine on the CPU that computes as a GPU does in a mode."""
    engine = VggEngine(vgg, CPU, MODES[mode])
    features = engine.features = RoundedFeatures(vgg, CPU, MODES[mode], kernel="library")
    engine.graph_runners, engine.style_targets = GraphRunnerPool(features, graphs=False), StyleTargets(features)
    return engine


def gradient(engine: VggEngine, job: StyleJob, picture: Tensor) -> Tensor:
    """The gradient of a job's objective at ``picture``, uint8 [height, width, 3], at one scale."""
    start = picture.permute(2, 0, 1).contiguous()
    one = Recipe(size=job.recipe.size, start=Start.IMAGE, smallest_size=0, iterations=1)
    run = engine.run_batch(
        [StyleJob(recipe=one, content=job.content, styles=job.styles, style_weights=(1.0,), start=start, seed=0)]
    )
    runner = run.batch.runner
    return runner.objective.evaluate(runner.canvas.image).grad


def painted(engine: VggEngine, job: StyleJob) -> tuple[Tensor, float]:
    """The finished picture and the last loss."""
    run = engine.run_batch([job])
    while not run.finished:
        (report,) = run.advance()
    return run.picture(0), report.losses.total


def compared(vgg: Vgg, job: StyleJob, modes: tuple[str, ...]) -> Mapping[str, Row]:
    """By mode, the relative errors of the gradient and of the last loss, and the difference of the picture."""
    exact = rounded(vgg, "fp32")
    start_picture = _photo(job)
    end_picture, loss = painted(exact, job)
    rows: dict[str, Row] = {}
    for name in modes:
        engine = VggEngine(vgg, CPU, MODES["fp32"]) if name == "fp32 again" else rounded(vgg, name)
        row: Row = {"name": name, "size": job.recipe.size}
        for when, compared_at in (("start", start_picture), ("end", end_picture)):
            expected, got = gradient(exact, job, compared_at), gradient(engine, job, compared_at)
            row[f"gradient error, {when}"] = float((got - expected).norm() / expected.norm())
        picture, last = painted(engine, job)
        row["last loss / fp32"] = last / loss
        row["picture rms of 255"] = float((picture.float() - end_picture.float()).square().mean().sqrt())
        rows[name] = row
    return rows


def _photo(job: StyleJob) -> Tensor:
    width, height = job.result_size
    x = F.interpolate(job.content[None].float(), (height, width), mode="bicubic", antialias=True)
    return x[0].clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)


def example_job(pair: tuple[str, str], size: int) -> StyleJob:
    """The preset `fast` on one of the example pairs."""
    content, style = (decode((EXAMPLES / path).read_bytes(), Settings(), size) for path in pair)
    recipe = preset("fast", size=size, smallest_size=min(128, size))
    return StyleJob(recipe=recipe, content=content, styles=(style,), style_weights=(1.0,), start=None, seed=0)


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=192, help="longest side in pixels")
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()

    vgg = load_vgg("embedded")
    rows: list[Row] = []
    for pair in PAIRS:
        found = compared(vgg, example_job(pair, arguments.size), ("fp32 again", "tf32", "fp16", "bf16"))
        print_table(f"{' + '.join(Path(p).stem for p in pair)}\n{machine()}", list(found.values()))
        rows += [{"pair": " + ".join(pair), **row} for row in found.values()]
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
