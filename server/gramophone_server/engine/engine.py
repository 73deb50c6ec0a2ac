"""The engine: a network on a device, which makes batches of jobs of one shape.

    engine = VggEngine.load(device="auto", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    run = engine.run_batch([job])
    while not run.finished:
        (report,) = run.advance()
    picture = run.picture(0)

The scheduler, whose jobs join and leave, opens batches itself: see `domain.job_state`. One thread owns an engine and
everything that the engine creates. Nothing here depends on requests, queues or the wire.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gramophone.recipe import Recipe, Violation
from gramophone_server import ops
from gramophone_server.domain.engine_api import CacheCounts, KernelReport
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState, Shape
from gramophone_server.engine.batch import EngineBatch
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.checkpoint_format import CheckpointFormat
from gramophone_server.engine.device_copy import DeviceToHostCopier
from gramophone_server.engine.graph_runner import GraphRunnerPool
from gramophone_server.engine.memory_estimate import bytes_free, bytes_needed
from gramophone_server.engine.optimisers import slot_layout
from gramophone_server.engine.scales import current_picture
from gramophone_server.engine.style_targets import STYLE_CACHE_BYTES, StyleBeginning, StyleTargets
from gramophone_server.errors import InvalidRequest, StartupError
from gramophone_server.network.features import VggFeatures
from gramophone_server.network.precision import Precision, choose_precision
from gramophone_server.network.tuning import DEFAULT_TUNING, Tuning
from gramophone_server.network.vgg import Vgg, load_vgg
from gramophone_server.ops.self_test import choose_kernels

__all__ = ["VggEngine", "cpu_name"]

log = logging.getLogger(__name__)

# Parts of cuDNN and torch count the elements of a tensor in 32 bits. The largest activations have 64 per pixel.
MAX_CUDA_ELEMENTS = 2**31 - 1
MAX_SLOTS = 256  # of a batch of the smallest pictures; far narrower batches already gain nothing by growing

# Share of the device memory that is free once the network is loaded, for batches. The rest is for the error of the
# estimates, which are some percent off, and for images that are being decoded.
MEMORY_SHARE = 0.8


class VggEngine:
    """A network on a device in one precision; implements `engine_api.Engine`."""

    checkpoints = CheckpointFormat(slot_layout)

    def __init__(
        self,
        vgg: Vgg,
        device: torch.device,
        precision: Precision,
        *,
        graphs: bool | None = None,
        note: str = "",
        style_cache_bytes: int = STYLE_CACHE_BYTES,
        tuning: Tuning = DEFAULT_TUNING,
        library_ops: str = "",
        kernels: KernelReport | None = None,
    ) -> None:
        """``graphs``: replay captured iterations; None: on a GPU, and only there.

        ``note``: text after the device's name, such as why the device is not a GPU. ``style_cache_bytes``: device
        memory for Gram matrices of style images; 0 keeps none. ``tuning``: how each part of an iteration is computed.
        ``library_ops``: ops that run through torch's library instead of their kernels, as in `choose_kernels`.
        ``kernels``: the report of an earlier engine of this process, device and precision, whose self-test is not
        repeated.
        """
        ops.require_kernels(device.type)
        self.kernels = kernels or choose_kernels(device, precision.forward, precision.backward, requested=library_ops)
        self.device = device
        self.precision = precision.name
        self.backbone = vgg.backbone
        self.weights_source = vgg.source
        self.layers = vgg.layers
        self.features = VggFeatures(vgg, device, precision, tuning=tuning)
        self.graph_runners = GraphRunnerPool(self.features, graphs=device.type == "cuda" if graphs is None else graphs)
        self.style_targets = StyleTargets(self.features, style_cache_bytes)
        self.copier = DeviceToHostCopier(device, own_stream=tuning.copy_stream)
        self.memory_bytes = int(bytes_free(device) * MEMORY_SHARE)
        self._widest = vgg.convolutions[0].weight.shape[0]  # activations per pixel; every pooling quarters the pixels
        self._vgg = vgg
        self._note = note

    @classmethod
    def load(
        cls,
        *,
        device: str,
        precision: str,
        weights: str,
        backbone: str,
        threads: int,
        graphs: bool = True,
        library_ops: str = "",
    ) -> VggEngine:
        """Reads the weights, tests the kernels and prepares the network.

        ``device``: "auto", "cpu" or "cuda". ``precision``: "auto", "fp32", "bf16", "tf32" or "fp16". ``weights`` and
        ``backbone``: see `load_vgg`. ``threads`` of the CPU's kernels, 0 for all cores. ``graphs``: on a GPU, replay
        captured iterations instead of launching every kernel. ``library_ops``: as in `VggEngine`. Raises
        `StartupError`.
        """
        if threads:
            torch.set_num_threads(threads)
        chosen, note = _device(device)
        mode = choose_precision(precision, chosen)
        return cls(
            load_vgg(weights, backbone),
            chosen,
            mode,
            graphs=graphs and chosen.type == "cuda",
            note=note,
            library_ops=library_ops,
        )

    @property
    def device_name(self) -> str:
        """A description for people, such as "cpu (AMD EPYC, 2 threads)"."""
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            about = f"{torch.cuda.get_device_name(self.device)}, compute capability {major}.{minor}"
        else:
            about = f"{cpu_name()}, {torch.get_num_threads()} threads"
        return f"{self.device.type} ({about}{'; ' if self._note else ''}{self._note})"

    @property
    def style_cache(self) -> CacheCounts:
        """Counts of the cache of style targets; thread-safe."""
        return self.style_targets.counts

    def require_device(self) -> None:
        """See `engine_api.BatchEngine.require_device`."""
        torch.ones(1, device=self.device).add_(1).item()

    def admit(self, job: StyleJob) -> JobState:
        """See `engine_api.BatchEngine.admit`."""
        state = JobState(job)
        width, height = job.result_size
        if not self.max_slots(Shape.of(job.recipe, height, width)):
            description = (
                f"makes a {width}x{height} picture, of which the GPU's libraries take at most {self._max_pixels} "
                "pixels; give a smaller one"
            )
            raise InvalidRequest([Violation("spec.recipe.size", description)])
        return state

    def picture(self, state: JobState) -> Callable[[], Tensor]:
        """See `engine_api.BatchEngine.picture`."""
        if state.tensors is None:
            raise ValueError("only a job that has started and is in no batch has a picture of its own")
        with torch.inference_mode():
            picture = current_picture(state.tensors, state.recipe.average, state.averaged, not state.diverged_at)
            return self.copier.take(picture)

    @property
    def shares_host_memory(self) -> bool:
        """See `engine_api.BatchEngine.shares_host_memory`."""
        return self.device.type == "cpu"

    def begin(self, state: JobState) -> StyleBeginning:
        """See `engine_api.BatchEngine.begin`."""
        return self.style_targets.beginning(state, on_memory_out=self.graph_runners.clear)

    def state_bytes(self, state: JobState) -> int:
        """See `engine_api.BatchEngine.state_bytes`."""
        return self.checkpoints.tensor_bytes(state)

    def batch(self, shape: Shape, slots: int) -> EngineBatch:
        """See `engine_api.BatchEngine.batch`."""
        if not 0 < slots <= self.max_slots(shape):
            raise ValueError(f"a batch of this shape has 1 to {self.max_slots(shape)} slots, got {slots}")
        return EngineBatch(self.graph_runners, self.style_targets, self.copier, shape, slots)

    def max_slots(self, shape: Shape) -> int:
        """See `engine_api.BatchEngine.max_slots`."""
        if self.device.type != "cuda":
            return MAX_SLOTS
        return min(MAX_SLOTS, self._max_pixels // (shape.width * shape.height))

    def batch_bytes(self, shape: Shape, slots: int) -> int:
        """See `engine_api.BatchEngine.batch_bytes`."""
        kernel = "cudnn" if self.features.kernel == "cudnn" else "library"
        return bytes_needed(self._vgg, shape, slots, self.features.precision, kernel)

    def run_batch(self, jobs: Sequence[StyleJob]) -> BatchRun:
        """Starts a run of ``jobs`` as one batch, without a scheduler.

        Raises `ValueError` if the jobs do not have the same result size, scales and structure of recipe, or are too
        many, and `InvalidRequest` if the GPU's libraries could not count the activations of one.
        """
        return BatchRun(self.batch, [self.admit(job) for job in jobs])

    @property
    def _max_pixels(self) -> int:
        return MAX_CUDA_ELEMENTS // self._widest

    def warm_up(self) -> None:
        """Runs two iterations of a small job, so that the first request does not wait for kernels and memory."""
        noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        recipe = Recipe(size=64, smallest_size=0, iterations=2)
        run = self.run_batch(
            [StyleJob(recipe=recipe, content=noise, styles=(noise,), style_weights=(1.0,), start=None, seed=0)]
        )
        while not run.finished:
            run.advance()
        run.picture(0)
        run.close()
        # Where ops run through torch's library, the first estimate imports parts of torch, which takes a second.
        self.batch_bytes(Shape.of(recipe, 64, 64), 1)


def _device(name: str) -> tuple[torch.device, str]:
    """The device ``name``, and for "auto" the reason if it is not a GPU, else "". Raises `StartupError`."""
    if name not in ("auto", "cpu", "cuda"):
        raise StartupError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cpu":
        return torch.device("cpu"), ""
    missing = _missing_for_cuda()
    if missing is None:
        # The first visible GPU; the operator chooses another one with CUDA_VISIBLE_DEVICES.
        return torch.device("cuda", torch.cuda.current_device()), ""
    what, remedy = missing
    if name == "cuda":
        raise StartupError(f"device cuda is not possible: {what}; {remedy}, or run the server with --device cpu")
    log.info("on the CPU, because %s; for a GPU, %s", what, remedy)
    return torch.device("cpu"), f"not on a GPU: {what}"


def _missing_for_cuda() -> tuple[str, str] | None:
    """Why this process cannot use a GPU, and the remedy; None if it can."""
    info = ops.build_info()
    if info["cuda"] is None:
        return "this build has no CUDA kernels", "build it where nvcc is, with GRAMOPHONE_CUDA=1"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU with a working driver is visible", "check with nvidia-smi and CUDA_VISIBLE_DEVICES"
    major, minor = torch.cuda.get_device_capability()
    if not any(_runs_on(built, major, minor) for built in info["cuda_architectures"]):
        built_for = ", ".join(info["cuda_architectures"])
        return (
            f"the GPU has compute capability {major}.{minor} and this build has kernels for {built_for}",
            f"build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}",
        )
    return None


def _runs_on(built: str, major: int, minor: int) -> bool:
    """Whether kernels ``built`` for an architecture such as "8.0" or "9.0+PTX" run on a GPU of capability major.minor.

    Machine code runs on later GPUs of its major version, PTX on all later GPUs.
    """
    version, _, ptx = built.partition("+")
    built_major, built_minor = (int(n) for n in version.rstrip("af").split("."))
    if ptx:
        return (built_major, built_minor) <= (major, minor)
    return built_major == major and built_minor <= minor


def cpu_name() -> str:
    """The model of the CPU as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
