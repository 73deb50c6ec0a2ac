"""A batch at one scale, in fixed buffers: what an iteration reads and changes, and on a GPU the graph that replays it.

Nothing of an iteration is decided by the host: weights, step sizes, counts and who has diverged are tensors. So an
iteration can be captured once as a CUDA graph and replayed for every job of the same shape; a job only fills the buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramophone.recipe import Recipe
from gramophone_server import ops
from gramophone_server.chain import Chain
from gramophone_server.objective import Objective
from gramophone_server.optimisers import Canvas, make_stepper

__all__ = ["Stage", "Stages"]

# Launching a graph costs the host 5 to 10 us (kernels.md's figure, to be measured): a twentieth of an iteration at 256 px,
# nothing at 1024 px. Several iterations per graph make it small; more would only make the graph longer to build.
ITERATIONS_PER_GRAPH = 10
MOST_PIXELS_OF_SEVERAL = 512 * 512  # of the whole batch; above this a graph has one iteration

WARM_UPS = 2  # iterations before a capture: cuDNN builds its plans, libraries take their workspaces


class Stage:
    """One batch at one scale."""

    def __init__(self, chain: Chain, recipe: Recipe, jobs: int, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.objective = Objective(chain, recipe, jobs, height, width)
        device = chain.device
        image = torch.zeros(jobs, 3, height, width, device=device)
        self.canvas = Canvas(
            image=image,
            last_good=torch.zeros_like(image),
            mean=torch.zeros_like(image) if recipe.average else None,
            average=recipe.average,
            step=torch.zeros(jobs, device=device),
            count=torch.zeros(jobs, dtype=torch.int64, device=device),
            alive=torch.ones(jobs, dtype=torch.bool, device=device),
            diverged_at=torch.zeros(jobs, dtype=torch.int64, device=device),
        )
        self.stepper = make_stepper(recipe.optimiser, self.canvas)
        objective = self.objective
        # The terms of the last evaluation, in the order of `Evaluation.terms`.
        self.terms = torch.zeros(len(objective.content_layers) + len(objective.style_layers) + 1, jobs, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by iterations

    @torch.inference_mode()
    def begin(self, image: Tensor, step: Sequence[float], coarser: Stage | None) -> None:
        """Starts at ``image`` [B, 3, H, W], as new or where the scale before, ``coarser``, has got to."""
        canvas = self.canvas
        canvas.image.copy_(image)
        canvas.last_good.copy_(image)
        if canvas.mean is not None:
            canvas.mean.zero_()
        canvas.step.copy_(torch.tensor(step))
        if coarser is None:
            canvas.alive.fill_(True)
            canvas.count.zero_()
            canvas.diverged_at.zero_()
            self.stepper.reset()
        else:
            for name in ("alive", "count", "diverged_at"):
                getattr(canvas, name).copy_(getattr(coarser.canvas, name))
            self.stepper.carry(coarser.stepper)

    @property
    def bytes(self) -> int:
        """Of the buffers; what an iteration takes besides is in the pool that all stages share."""
        canvas, objective = self.canvas, self.objective
        mean = [] if canvas.mean is None else [canvas.mean]
        buffers = [canvas.image, canvas.last_good, *mean, *self.stepper.buffers]
        return sum(b.nbytes for b in (*buffers, *objective.content_targets, *objective.style_targets))

    def iterate(self, iterations: int) -> None:
        """So many iterations of every job; waits for nothing."""
        left = iterations
        for size, graph in self._graphs.items():  # the largest first
            while left >= size:
                graph.replay()
                left -= size
        for _ in range(left):
            self._iterate()

    @torch.inference_mode()
    def _iterate(self) -> None:
        canvas = self.canvas
        evaluation = self.objective.evaluate(canvas.image)
        self.terms.copy_(evaluation.terms)
        ops.judge_(evaluation.terms, evaluation.grad, canvas.alive, canvas.diverged_at, canvas.count)
        self.stepper.step_(evaluation.grad)

    def capture(self, pool: Any) -> None:
        """Captures the iteration. What is in the buffers is lost; `begin` and `Objective.aim` fill them anew.

        Another thread may use the GPU meanwhile (thread_local mode; the default would break the capture).
        """
        with torch.inference_mode():
            self.canvas.image.uniform_()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._iterate()
        torch.cuda.current_stream().wait_stream(stream)
        several = self.canvas.image[:, 0].numel() <= MOST_PIXELS_OF_SEVERAL
        for size in (ITERATIONS_PER_GRAPH, 1) if several else (1,):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                for _ in range(size):
                    self._iterate()
            self._graphs[size] = graph


class Stages:
    """Stages by shape. Where iterations are captured, those that are done with are kept for the next job of the shape.

    All graphs share one memory pool, since they run one at a time and leave nothing in it between two replays. Of what is
    kept, the least recently used goes first.
    """

    MOST = 64  # a job of the default recipe has five scales, and pictures come in a handful of proportions
    MOST_OF_MEMORY = 0.1  # of the device's, in buffers: 80 MB of a stage at 512 px, 320 MB at 1024 px with L-BFGS

    def __init__(self, chain: Chain, *, graphs: bool) -> None:
        self._chain = chain
        self._pool: Any = None  # torch's handle of a memory pool, where iterations are captured
        self._most_bytes = 0
        if graphs:
            self._pool = torch.cuda.graph_pool_handle()
            total = torch.cuda.get_device_properties(chain.device).total_memory
            self._most_bytes = int(total * self.MOST_OF_MEMORY)
        self._idle: OrderedDict[int, tuple[Hashable, Stage]] = OrderedDict()  # by id, oldest first

    def take(self, recipe: Recipe, jobs: int, height: int, width: int) -> Stage:
        """A stage whose buffers the caller fills, and gives back when it is done."""
        key = _key(recipe, jobs, height, width)
        for id_, (other, stage) in reversed(self._idle.items()):
            if other == key:
                del self._idle[id_]
                return stage
        try:
            return self._new(recipe, jobs, height, width)
        except torch.OutOfMemoryError:
            if not self._idle:
                raise
        self.clear()  # memory kept for jobs that may come goes to the one that is there
        return self._new(recipe, jobs, height, width)

    def give_back(self, stage: Stage, recipe: Recipe) -> None:
        """Keeps a stage for the next job of its shape, if there is anything to gain from it."""
        if self._pool is None:
            return
        key = _key(recipe, stage.canvas.image.shape[0], stage.height, stage.width)
        self._idle[id(stage)] = key, stage
        while len(self._idle) > self.MOST or sum(s.bytes for _, s in self._idle.values()) > self._most_bytes:
            self._idle.popitem(last=False)

    def clear(self) -> None:
        """Drops what is kept."""
        self._idle.clear()
        if self._chain.device.type == "cuda":
            torch.cuda.empty_cache()

    def _new(self, recipe: Recipe, jobs: int, height: int, width: int) -> Stage:
        stage = Stage(self._chain, recipe, jobs, height, width)
        if self._pool is not None:
            stage.capture(self._pool)
        return stage


def _key(recipe: Recipe, jobs: int, height: int, width: int) -> Hashable:
    """What a captured iteration depends on."""
    layers = tuple(tuple(layer for layer, _ in named) for named in (recipe.content_layers, recipe.style_layers))
    return jobs, height, width, layers, recipe.pooling, recipe.optimiser, recipe.average
