"""A batch at one scale in fixed buffers, its iteration, and on a GPU the graphs that replay it.

The host decides nothing within an iteration: weights, step sizes, counts and which jobs have diverged are tensors. So
an iteration can be captured once as a CUDA graph and replayed for all jobs of the same shape; a job only fills its slot
of the buffers. An empty slot is computed like any other: a black picture with weights of 0 that is not alive.
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

WARM_UPS = 2  # iterations before a capture, in which cuDNN builds its plans and libraries allocate their workspaces


class GraphRunner:
    """The buffers and the iteration of a batch at one scale: ``slots`` jobs of one shape."""

    def __init__(self, features: VggFeatures, shape: Shape, slots: int) -> None:
        self.shape, self.slots, self.tuning = shape, slots, features.tuning
        self.objective = Objective(features, shape, slots)
        self.canvas = Canvas.empty(slots, shape.height, shape.width, shape.average, features.device)
        self.stepper = make_stepper(shape.optimiser, self.canvas)
        # The terms of the last evaluation, as in `Evaluation.terms`.
        terms = len(shape.content_layers) + len(shape.style_layers) + 1
        self.terms = torch.zeros(terms, slots, device=features.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by their number of iterations, largest first

    def slot(self, slot: int) -> SlotTensors:
        """All tensors of one job, as views of the buffers."""
        return self.canvas.slot(slot) | self.stepper.slot(slot)

    @torch.inference_mode()
    def put(self, slot: int, tensors: SlotTensors, step: float, gradients: int, diverged_at: int) -> None:
        """Fills a slot with a job; no other slot changes.

        ``tensors``: by the names of `slot`; missing ones are zero. ``gradients``: how many the job's optimiser has
        seen. ``diverged_at``: which of the gradients was not finite, 0 for none.
        """
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
        """Empties a slot."""
        for view in self.canvas.slot(slot).values():
            view.zero_()
        self.canvas.alive[slot] = False
        self.objective.clear(slot)

    @property
    def bytes(self) -> int:
        """Size of the buffers. Everything else that an iteration allocates is in the memory pool of all runners."""
        targets = (*self.objective.content_targets, *self.objective.style_targets)
        return self.slots * sum(view.nbytes for view in self.slot(0).values()) + sum(t.nbytes for t in targets)

    @torch.inference_mode()
    def iterate(self, iterations: int) -> None:
        """Launches iterations of all slots, without waiting for the device."""
        left = iterations
        for size, graph in self.graphs.items():  # the largest first
            while left >= size:
                graph.replay()
                left -= size
        for _ in range(left):
            self._iterate()

    @torch.inference_mode()
    def _iterate(self) -> None:
        canvas, weights = self.canvas, self.objective.tv_weights
        verdicts = canvas.alive, canvas.diverged_at, canvas.count
        rows, grad = self.objective.network_terms(canvas.image)
        if self.tuning.fused_check:
            torch.cat(rows, out=self.terms[:-1])
            ops.tv_check_finite_(grad, canvas.image, weights, self.terms, *verdicts)
        else:
            tv = ops.tv_(grad, canvas.image, weights)
            torch.cat([*rows, tv[None]], out=self.terms)
            ops.check_finite_(self.terms, grad, *verdicts)
        self.stepper.step_(grad)

    @torch.inference_mode()
    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Captures the iteration as graphs. The buffers are overwritten: all slots are empty afterwards.

        ``stream`` must be the same for all runners, because the memory of ``pool`` is shared within one stream only.
        Another thread may use the GPU during the capture (mode thread_local; by default that would invalidate the
        capture).
        """
        self.canvas.image.uniform_()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._iterate()
        finally:  # after running out of memory the buffers are freed while the stream may still use them
            torch.cuda.current_stream().wait_stream(stream)
        has_long_graph = self.canvas.image[:, 0].numel() <= self.tuning.max_long_graph_pixels
        sizes = sorted({self.tuning.iterations_per_graph if has_long_graph else 1, 1}, reverse=True)
        gc_was_enabled = gc.isenabled()
        # An old graph that is collected here would invalidate the capture, and with torch 2.11 all later ones.
        gc.disable()
        try:
            with torch.cuda.stream(stream):  # torch leaves the stream current if a capture cannot be ended
                for size in sizes:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        for _ in range(size):
                            self._iterate()
                    self.graphs[size] = graph
        finally:
            if gc_was_enabled:
                gc.enable()
        for slot in range(self.slots):
            self.clear(slot)


class GraphRunnerPool:
    """Graph runners by shape. With captured iterations, idle runners are kept for the next batch of the shape.

    All graphs share one memory pool, because they run one at a time and leave nothing in it between two replays. The
    least recently used idle runner is dropped first.
    """

    # Idle runners. A job of the default recipe has five scales, and pictures have a handful of proportions.
    MAX_IDLE = 64
    # Of the device's memory, for the buffers of idle runners: one has 80 MB at 512 px, 320 MB at 1024 px with L-BFGS.
    IDLE_MEMORY_SHARE = 0.1

    def __init__(self, features: VggFeatures, *, graphs: bool) -> None:
        self._features = features
        self._pool: Any = None  # torch's handle of the memory pool of all graphs; None: iterations are not captured
        self._stream: Any = None  # for captures
        self._max_bytes = 0
        if graphs:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(features.device)  # type: ignore[no-untyped-call]
            total = torch.cuda.get_device_properties(features.device).total_memory
            self._max_bytes = int(total * self.IDLE_MEMORY_SHARE)
        self.idle: OrderedDict[int, GraphRunner] = OrderedDict()  # by id, oldest first

    def take(self, shape: Shape, slots: int) -> GraphRunner:
        """A runner whose slots are all empty. The caller must `give_back` it."""
        for id_, runner in reversed(self.idle.items()):
            if (runner.shape, runner.slots) == (shape, slots):
                del self.idle[id_]
                return runner
        try:
            return self._new(shape, slots)
        except Exception as error:
            if not ran_out_of_memory(error) or not self.idle:
                raise
        self.clear()  # the memory of idle runners goes to this one
        return self._new(shape, slots)

    def give_back(self, runner: GraphRunner) -> None:
        """Keeps a runner for the next batch of its shape, if iterations are captured."""
        if self._pool is None:
            return
        for slot in range(runner.slots):
            runner.clear(slot)
        self.idle[id(runner)] = runner
        while len(self.idle) > self.MAX_IDLE or sum(idle.bytes for idle in self.idle.values()) > self._max_bytes:
            self.idle.popitem(last=False)

    def clear(self) -> None:
        """Drops the idle runners."""
        self.idle.clear()
        if self._features.device.type == "cuda":
            torch.cuda.empty_cache()

    def _new(self, shape: Shape, slots: int) -> GraphRunner:
        runner = GraphRunner(self._features, shape, slots)
        if self._pool is not None:
            runner.capture(self._pool, self._stream)
        return runner
