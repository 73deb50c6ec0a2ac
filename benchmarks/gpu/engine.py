"""The engine in the GPU check: whole jobs, memory, and a profile of the kernels."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.network import pictures
from benchmarks.gpu.section import Section
from benchmarks.iteration import jobs
from benchmarks.measure import interleaved
from gramophone.recipe import Recipe, preset
from gramophone_server.config import Settings
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.images.codec import Format, decode, encode
from gramophone_server.network.precision import choose_precision
from gramophone_server.network.vgg import Vgg

__all__ = ["job", "memory", "profile"]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


# A whole job ----------------------------------------------------------------------------------------------------------

FRAMES_PER_S = 10.0
QUALITY = 85
CHUNK = 10  # iterations between two checks of the clock


def job(section: Section) -> None:
    """Times the preset `fast` at 512 px with its frames, and 16 jobs as one batch against one after another: the engine
    without the server."""
    vgg = section.network()
    engine = _engine(vgg, section.device)
    for turn in ("cold", "second", "warm"):
        section.attempt(f"{turn} job at 512 px", functools.partial(_job, section, engine, 512, turn), 3)
    section.attempt("16 jobs at 256 px", functools.partial(_sixteen, section, engine, 256), 5)


def _example(section: Section, size: int) -> StyleJob:
    """The cat in brushwork with the preset `fast`: square, as the pictures of the other rows."""
    side = section.px(size)
    shorter = {"iterations": 4, "coarse_iterations": 2} if section.dry else {}
    recipe = preset("fast", size=side, smallest_size=section.px(128), **shorter)
    content, style = (
        decode((EXAMPLES / name).read_bytes(), Settings(), side) for name in ("photos/cat.jpg", "styles/brushwork.jpg")
    )
    square = min(content.shape[1:])
    content = content[:, :square, :square].contiguous()
    return StyleJob(recipe=recipe, content=content, styles=(style,), style_weights=(1.0,), start=None, seed=0)


def _engine(vgg: Vgg, device: str, graphs: bool = True) -> VggEngine:
    where = torch.device(device)
    return VggEngine(vgg, where, choose_precision("auto", where), graphs=graphs and device == "cuda")


def _job(section: Section, engine: VggEngine, size: int, turn: str) -> None:
    one = _example(section, size)
    start = time.perf_counter()

    def frame(picture: Callable[[], Tensor]) -> float:
        """Encodes the picture, and returns the time when it was ready."""
        encode(picture(), Format.JPEG, QUALITY)
        return time.perf_counter()

    with ThreadPoolExecutor(1) as encoder:
        run = engine.run_batch([one])
        frames: list[Future[float]] = []
        due = start
        while not run.finished:
            run.advance(CHUNK)
            if time.perf_counter() >= due:
                due = time.perf_counter() + 1 / FRAMES_PER_S
                frames.append(encoder.submit(frame, run.snapshot(0)))
        frames.append(encoder.submit(frame, run.snapshot(0)))
        ended = [future.result() for future in frames]
    run.close()
    section.row(
        name=turn,
        size=size,
        batch=1,
        iterations=sum(n for _, _, n in one.scales),
        frames=len(frames),
        ms=(ended[-1] - start) * 1e3,
        first_frame_ms=(ended[0] - start) * 1e3,
    )


def _sixteen(section: Section, engine: VggEngine, size: int) -> None:
    one, count = _example(section, size), section.pictures(16)

    def finish(batch: list[StyleJob]) -> None:
        run = engine.run_batch(batch)
        while not run.finished:
            run.advance(CHUNK)
        for index in range(len(batch)):
            run.picture(index)
        run.close()

    def in_turn() -> None:
        for _ in range(count):
            finish([one])

    times = interleaved({"together": lambda: finish([one] * count), "in turn": in_turn}, 1 if section.dry else 3)
    for name, ms in times.items():
        section.row(
            name=f"16 jobs {name}",
            size=size,
            batch=16 if name == "together" else 1,
            ms=ms,
            ms_per_job=ms / 16,
            throughput_vs_in_turn=times["in turn"] / ms,
        )


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(section: Section) -> None:
    """Compares the memory estimate of a batch with the peak of the allocator."""
    vgg = section.network()
    engine = _engine(vgg, section.device)
    for size, batch in section.few([(512, 1), (1024, 1), (2048, 1), (512, 4), (1024, 4), (2048, 4)], 4):
        call = functools.partial(_memory, section, engine, size, batch)
        section.attempt(f"memory at {size} px x {batch}", call, 4)


def _memory(section: Section, engine: VggEngine, size: int, batch: int) -> None:
    side, count = section.px(size), section.pictures(batch)
    content, style = pictures(side, count, section.device)
    all_jobs = jobs(content, style, Recipe(size=side, smallest_size=0, iterations=100))
    del content, style
    needed = engine.batch_bytes(engine.admit(all_jobs[0]).shape, count)
    row = {"name": "memory", "size": size, "batch": batch, "needed_mb": needed / 1e6}
    if not section.dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        run = engine.run_batch(all_jobs)
        run.advance(1)
        starting = torch.cuda.max_memory_allocated() - before  # including the capture
        torch.cuda.reset_peak_memory_stats()
        run.advance(20)
        iterating = torch.cuda.max_memory_allocated() - before
        row |= {
            "starting_mb": starting / 1e6,
            "iterating_mb": iterating / 1e6,
            "reserved_mb": (torch.cuda.memory_reserved() - reserved) / 1e6,
            "ratio": starting / needed,  # above 1: more than estimated
        }
        run.close()
        engine.graph_runners.clear()
    section.row(**row)


# A profile --------------------------------------------------------------------------------------------------

PROFILED = 20  # iterations
KERNELS = 20  # kernels in the list


def profile(section: Section) -> None:
    """The kernels of an iteration, each launched by itself, with their times."""
    vgg = section.network()
    for size in (512, 1024):
        section.attempt(f"profile at {size} px", functools.partial(_profile, section, vgg, size), 5)


def _profile(section: Section, vgg: Vgg, size: int) -> None:
    from torch.profiler import ProfilerActivity

    on_gpu = not section.dry
    side = section.px(size)
    content, style = pictures(side, 1, section.device)
    recipe = Recipe(size=side, smallest_size=0, iterations=1000)
    run = _engine(vgg, section.device, graphs=False).run_batch(jobs(content, style, recipe))
    iterations = PROFILED if on_gpu else 2
    run.advance(5)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as seen:
        run.advance(iterations)
    events = seen.key_averages()
    if on_gpu:
        kernels = [(e.key, e.self_device_time_total, e.count) for e in events if e.device_type.name == "CUDA"]
    else:
        kernels = [(e.key, e.self_cpu_time_total, e.count) for e in events]
    total = sum(us for _, us, _ in kernels)
    if not total:
        raise RuntimeError("the profiler recorded no kernel (CUPTI may not be permitted on this machine)")
    kernels.sort(key=lambda kernel: -kernel[1])
    lines = [f"{total / iterations:9.1f} us per iteration in {len(kernels)} kernels"]
    for key, us, count in kernels[:KERNELS]:
        section.row(
            name=key[:120], size=size, batch=1, share=us / total, us=us / iterations, calls=round(count / iterations, 2)
        )
        lines.append(f"{us / iterations:9.1f} us  {us / total:6.1%}  {count / iterations:6.1f} x  {key[:70]}")
    text = "\n".join(lines)
    section.fact(f"profile {size} px", text)
