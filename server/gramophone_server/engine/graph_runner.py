"""A batch at one scale, in fixed buffers: what an iteration reads and changes, and on a GPU the graph that replays it.

Nothing of an iteration is decided by the host: weights, step sizes, counts and who has diverged are tensors. So an
iteration can be captured once as a CUDA graph and replayed for every job of the same shape; a job only fills its slot of
the buffers. An empty slot is computed like any other: a black picture with weights of 0 that is not alive.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from typing import Any

import torch

from gramophone_server import ops
from gramophone_server.domain.job import ran_out_of_memory
from gramophone_server.domain.job_state import Shape, SlotTensors
from gramophone_server.engine.objective import Objective
from gramophone_server.engine.optimisers import Canvas, make_stepper
from gramophone_server.network.features import VggFeatures

__all__ = ["GraphRunner", "GraphRunnerPool"]

# Launching a graph costs the host 5 to 10 us (kernels.md's figure, to be measured): a twentieth of an iteration at 256 px,
# nothing at 1024 px. Several iterations per graph make it small; more would only make the graph longer to build.
ITERATIONS_PER_GRAPH = 10
MOST_PIXELS_OF_SEVERAL = 512 * 512  # of the whole batch; above this a graph has one iteration

WARM_UPS = 2  # iterations before a capture: cuDNN builds its plans, libraries take their workspaces


class GraphRunner:
    """A batch at one scale: ``slots`` jobs of one shape."""

    def __init__(self, chain: VggFeatures, shape: Shape, slots: int) -> None:
        self.shape, self.slots = shape, slots
        self.objective = Objective(chain, shape, slots)
        self.canvas = Canvas.empty(slots, shape.height, shape.width, shape.average, chain.device)
        self.stepper = make_stepper(shape.optimiser, self.canvas)
        # The terms of the last evaluation, in the order of `Evaluation.terms`.
        terms = len(shape.content_layers) + len(shape.style_layers) + 1
        self.terms = torch.zeros(terms, slots, device=chain.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by iterations

    def slot(self, slot: int) -> SlotTensors:
        """All tensors of one job, as views of the buffers."""
        return self.canvas.slot(slot) | self.stepper.slot(slot)

    @torch.inference_mode()
    def put(self, slot: int, tensors: SlotTensors, step: float, gradients: int, diverged_at: int) -> None:
        """Fills a slot with a job of which so many gradients were seen; no other slot changes. What ``tensors`` does not
        have is zero. ``diverged_at``: which of the gradients was not finite, 0 for none."""
        for name, view in self.slot(slot).items():
            if name in tensors:
                view.copy_(tensors[name])
            else:
                view.zero_()
        canvas = self.canvas
        canvas.step[slot] = step
        canvas.count[slot] = gradients
        canvas.diverged_at[slot] = diverged_at
        canvas.alive[slot] = not diverged_at

    @torch.inference_mode()
    def take(self, slot: int, *, to_cpu: bool = False) -> SlotTensors:
        """A copy of all tensors of a slot, on the device or on the CPU."""
        device = "cpu" if to_cpu else self.canvas.image.device
        return {
            name: view.to(device, copy=True, memory_format=torch.contiguous_format)
            for name, view in self.slot(slot).items()
        }

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Makes the slot an empty one."""
        for view in self.canvas.slot(slot).values():
            view.zero_()
        self.canvas.alive[slot] = False
        self.objective.clear(slot)

    @property
    def bytes(self) -> int:
        """Of the buffers; what an iteration takes besides is in the pool that all stages share."""
        targets = (*self.objective.content_targets, *self.objective.style_targets)
        return self.slots * sum(view.nbytes for view in self.slot(0).values()) + sum(t.nbytes for t in targets)

    @torch.inference_mode()
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
        ops.check_finite_(evaluation.terms, evaluation.grad, canvas.alive, canvas.diverged_at, canvas.count)
        self.stepper.step_(evaluation.grad)

    @torch.inference_mode()
    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Captures the iteration on ``stream``: the same for all stages, because memory of a pool is shared within one
        stream only. What is in the buffers is lost: all slots are empty afterwards.

        Another thread may use the GPU meanwhile (thread_local mode; the default would break the capture).
        """
        self.canvas.image.uniform_()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._iterate()
        finally:  # out of memory: the buffers go back while the stream may still be at work on them
            torch.cuda.current_stream().wait_stream(stream)
        several = self.canvas.image[:, 0].numel() <= MOST_PIXELS_OF_SEVERAL
        collecting = gc.isenabled()
        gc.disable()  # an old graph that is collected here would break the capture, and with torch 2.11 every later one
        try:
            with torch.cuda.stream(stream):  # torch leaves it current where a capture cannot be ended
                for size in (ITERATIONS_PER_GRAPH, 1) if several else (1,):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        for _ in range(size):
                            self._iterate()
                    self._graphs[size] = graph
        finally:
            if collecting:
                gc.enable()
        for slot in range(self.slots):
            self.clear(slot)


class GraphRunnerPool:
    """Stages by shape. Where iterations are captured, those that are done with are kept for the next job of the shape.

    All graphs share one memory pool, since they run one at a time and leave nothing in it between two replays. Of what is
    kept, the least recently used goes first.
    """

    MOST = 64  # a job of the default recipe has five scales, and pictures come in a handful of proportions
    MOST_OF_MEMORY = 0.1  # of the device's, in buffers: 80 MB of a stage at 512 px, 320 MB at 1024 px with L-BFGS

    def __init__(self, chain: VggFeatures, *, graphs: bool) -> None:
        self._chain = chain
        self._pool: Any = None  # torch's handle of a memory pool, where iterations are captured
        self._stream: Any = None  # on which they are captured
        self._most_bytes = 0
        if graphs:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(chain.device)  # type: ignore[no-untyped-call]
            total = torch.cuda.get_device_properties(chain.device).total_memory
            self._most_bytes = int(total * self.MOST_OF_MEMORY)
        self._idle: OrderedDict[int, GraphRunner] = OrderedDict()  # by id, oldest first

    def take(self, shape: Shape, slots: int) -> GraphRunner:
        """A stage with nothing but empty slots; the caller gives it back when it is done."""
        for id_, stage in reversed(self._idle.items()):
            if (stage.shape, stage.slots) == (shape, slots):
                del self._idle[id_]
                return stage
        try:
            return self._new(shape, slots)
        except Exception as error:
            if not ran_out_of_memory(error) or not self._idle:
                raise
        self.clear()  # memory kept for jobs that may come goes to the one that is there
        return self._new(shape, slots)

    def give_back(self, stage: GraphRunner) -> None:
        """Keeps a stage for the next job of its shape, if there is anything to gain from it."""
        if self._pool is None:
            return
        for slot in range(stage.slots):
            stage.clear(slot)
        self._idle[id(stage)] = stage
        while len(self._idle) > self.MOST or sum(s.bytes for s in self._idle.values()) > self._most_bytes:
            self._idle.popitem(last=False)

    def clear(self) -> None:
        """Drops what is kept."""
        self._idle.clear()
        if self._chain.device.type == "cuda":
            torch.cuda.empty_cache()

    def _new(self, shape: Shape, slots: int) -> GraphRunner:
        stage = GraphRunner(self._chain, shape, slots)
        if self._pool is not None:
            stage.capture(self._pool, self._stream)
        return stage
