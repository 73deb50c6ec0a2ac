"""The GPU's launches in one iteration, by name: python -m benchmarks.gpu.launches

No GPU is needed: the iteration runs on the meta device, which computes only shapes, and the calls of ops are counted. A
convolution counts as one launch; cuDNN may add some of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.network import random_vgg
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.graph_runner import GraphRunner
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import MODES
from gramophone_server.network.tuning import DEFAULT_TUNING, Tuning

__all__ = ["launches"]

SIDE = 64  # of the pictures; the launches do not depend on it
# Ops that launch no kernel: they make tensors or views.
FREE = ("empty", "empty_like", "new_empty", "select", "slice", "unbind", "unsqueeze", "view", "alias")
# Kernels of an op that launches more than one (csrc/cuda).
KERNELS = {"style_fwd": 2, "content_": 2, "tv_": 2, "tv_check_finite_": 2, "lbfgs_": 3}


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels that the ops would launch on a GPU, by the op's name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func).split(".")[1]
        if name not in FREE:
            self.launches[name] += KERNELS.get(name, 1)
        return func(*args, **(kwargs or {}))


def launches(recipe: Recipe, tuning: Tuning = DEFAULT_TUNING) -> Counter[str]:
    """Kernels of one iteration on a GPU in float16, by the op that launches them."""
    features = VggFeatures(random_vgg(), torch.device("meta"), MODES["fp16"], kernel="cudnn", tuning=tuning)
    runner = GraphRunner(features, Shape.of(recipe, SIDE, SIDE), 1)
    counter = LaunchCounter()
    with counter:
        runner.iterate(1)
    return counter.launches


def main() -> None:
    """Prints the launches with Adam, with L-BFGS, and with the fused check."""
    ways = {
        "Adam": launches(Recipe(optimiser=Optimiser.ADAM)),
        "L-BFGS": launches(Recipe(optimiser=Optimiser.LBFGS)),
        "Adam, fused check": launches(Recipe(optimiser=Optimiser.ADAM), Tuning(fused_check=True)),
    }
    for name, counted in ways.items():
        print(f"{name}: {counted.total()} launches: {', '.join(f'{n} {op}' for op, n in counted.most_common())}")


if __name__ == "__main__":
    main()
