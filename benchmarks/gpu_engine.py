"""The engine in the GPU check: iterations against the textbook loop, whole jobs, memory, and a profile of the
kernels."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.iteration import TORCHS_OWN, jobs, textbook, textbook_loss, textbook_step
from benchmarks.measure import Switches, interleaved
from benchmarks.network import flops, network, smooth
from benchmarks.section import Section
from gramophone.recipe import Optimiser, Recipe, preset
from gramophone_server.config import Settings
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.engine import VggEngine
from gramophone_server.images.codec import Format, decode, encode
from gramophone_server.network.precision import MODES, choose_precision
from gramophone_server.network.vgg import Vgg

__all__ = ["compiled", "iteration", "job", "memory", "profile"]

EXAMPLES = Path(__file__).parent.parent / "examples"
FIRST, LAST = torch.contiguous_format, torch.channels_last
SEARCHING = Switches(benchmark=True, conv_tf32=True, matmul_tf32=False)  # the best that a few lines can do
Steps = dict[str, tuple[Callable[[], object], int]]  # by name: a call, and the number of iterations in it

# Side in pixels and batch; first those with a goal.
SIZES = ((512, 1), (1024, 1), (256, 1), (2048, 1), (256, 16), (512, 4), (256, 4), (512, 16), (1024, 4))


def _pictures(side: int, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Content and style, float32 [batch, 3, side, side] in [0, 1], in steps of 1/255."""
    content, style = (((smooth(side, seed, batch) * 255).round() / 255).to(device) for seed in (1, 2))
    return content, style


# One iteration --------------------------------------------------------------------------------------------------------


def iteration(section: Section) -> None:
    """Times iterations of our engine and of the textbook loop, in every mode."""
    vgg, _ = network()
    engines: dict[tuple[str, bool, bool], VggEngine] = {}  # by mode, graphs and search
    for size, batch in SIZES:
        side = section.px(size)
        call = functools.partial(_iteration, section, vgg, engines, size, side, batch)
        section.attempt(f"{side} px, batch {batch}", call, 6)
    for (mode, graphs, search), engine in engines.items():
        if graphs and engine.features.autotuner.milliseconds:
            forms = {
                str(key): {kernel: ms if math.isfinite(ms) else None for kernel, ms in times.items()}
                for key, times in engine.features.autotuner.milliseconds.items()
            }
            section.fact(f"forms, {mode}{', searching' * search}", forms)


def _iteration(
    section: Section, vgg: Vgg, engines: dict[tuple[str, bool, bool], VggEngine], size: int, side: int, batch: int
) -> None:
    content, style = _pictures(side, batch, section.device)
    with TORCHS_OWN:
        plain = textbook_step(textbook_loss(vgg, content, style, torch.float32, FIRST), content)
        expected = float(plain())
    steps: Steps = {"eager fp32": (TORCHS_OWN.around(plain), 1)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with SEARCHING:  # from the first call on, because cuDNN keeps its first plan for a shape
            loss = textbook_loss(vgg, content, style, dtype, LAST)
        half = SEARCHING.around(textbook_step(loss, content))
        values = [half() for _ in range(3)]
        if all(isinstance(value, Tensor) and bool(value.isfinite()) for value in values):
            steps[f"eager {name} channels_last"] = half, 1
        else:
            section.left_out(f"eager {name} at {side} px, batch {batch}", "its loss is not finite")
    runs: list[BatchRun] = []
    many = _at_once(section, side, batch)

    def prepare(name: str, mode: str, graphs: bool, optimiser: Optimiser, search: bool) -> None:
        # cuDNN keeps its plans by shape, type and the switch for tf32, which changes nothing in 16 bits. With the
        # switch on, the search does not find the plans that were made without a search.
        tf32 = mode == "tf32"
        switches = Switches(benchmark=search, conv_tf32=tf32 or search, matmul_tf32=tf32)
        recipe = Recipe(size=side, smallest_size=0, iterations=100_000, optimiser=optimiser)
        with switches:
            key = mode, graphs, search
            if key not in engines:
                engines[key] = VggEngine(vgg, content.device, MODES[mode], graphs=graphs and section.device == "cuda")
            run = engines[key].run_batch(jobs(content, style, recipe))
            runs.append(run)
            _require_same_objective(run, expected, mode)
        steps[name] = switches.around(functools.partial(run.advance, many)), many

    for name, variant in _variants(section.device, size, batch).items():
        section.attempt(f"{name}, {side} px, batch {batch}", functools.partial(prepare, name, *variant), 8)
    _report(section, steps, side, batch)
    for run in runs:
        run.close()
    for engine in engines.values():
        engine.graph_runners.clear()


def _variants(device: str, size: int, batch: int) -> Mapping[str, tuple[str, bool, Optimiser, bool]]:
    """Our variants by name: mode, whether iterations are captured as graphs, optimiser, and whether cuDNN searches for
    its fastest kernels, which the engine does not let it do. Variants that show nothing new at other sizes are measured
    at one."""
    adam = Optimiser.ADAM
    if device == "cpu":
        return {
            "ours fp32 launched": ("fp32", False, adam, False),
            "ours fp32, L-BFGS": ("fp32", False, Optimiser.LBFGS, False),
        }
    variants = {"ours fp16": ("fp16", True, adam, False)}
    if batch == 1:
        variants |= {
            "ours fp16 launched": ("fp16", False, adam, False),
            "ours bf16": ("bf16", True, adam, False),
            "ours fp16, cuDNN searching": ("fp16", True, adam, True),
        }
    if batch == 1 and size == 512:
        variants |= {
            "ours fp16, L-BFGS": ("fp16", True, Optimiser.LBFGS, False),
            "ours tf32": ("tf32", True, adam, False),
            "ours fp32": ("fp32", True, adam, False),
        }
    return variants


def _at_once(section: Section, side: int, batch: int) -> int:
    """Iterations per call of `advance`; so many that the one readback of the losses hardly counts."""
    if section.device == "cpu":
        return 2
    return 50 if side * side * batch <= 512 * 512 else 10


def _require_same_objective(run: BatchRun, expected: float, mode: str) -> None:
    """Raises `RuntimeError` unless the first loss is that of the textbook loop, so that both loops do the same work."""
    first = sum(report.losses.total for report in run.advance(1))
    error = abs(first / expected - 1)
    if not error < (3e-2 if mode == "bf16" else 1e-2):
        raise RuntimeError(f"its first loss {first:.5g} is {error:.1e} from the textbook's {expected:.5g}; not timed")


def _report(section: Section, steps: Steps, side: int, batch: int) -> None:
    times = section.timed({name: call for name, (call, _) in steps.items()}, repeats=5, least_ms=30)
    times = {name: ms / steps[name][1] for name, ms in times.items()}
    sixteen = min(ms for name, ms in times.items() if name.startswith("eager") and name != "eager fp32")
    for name, ms in times.items():
        section.row(
            name=name,
            size=side,
            batch=batch,
            ms=ms,
            ms_per_job=ms / batch,
            ratio_vs_eager=ms / times["eager fp32"],
            ratio_vs_eager16=ms / sixteen,
            ratio_vs_floor=section.ratio_vs_floor(ms, flops(side, batch)),
        )


def compiled(section: Section) -> None:
    """Times torch.compile of the 16-bit textbook loop, whose compilation takes long."""
    vgg, _ = network()
    for size, mode in ((512, "default"), (1024, "default"), (512, "reduce-overhead")):
        side = section.px(size)
        call = functools.partial(_compiled, section, vgg, side, mode)
        section.attempt(f"torch.compile, {mode}, {side} px", call, 20)


def _compiled(section: Section, vgg: Vgg, side: int, mode: str) -> None:
    content, style = _pictures(side, 1, section.device)
    with SEARCHING:
        loss = textbook_loss(vgg, content, style, torch.bfloat16, LAST)
    # A dry run does not wait for a compiler.
    fast = torch.compile(loss, mode=mode) if section.device == "cuda" else torch.compile(loss, backend="eager")
    steps: Steps = {
        "eager fp32": (textbook(vgg, content, style, torch.float32, FIRST), 1),
        "eager bf16 channels_last": (SEARCHING.around(textbook_step(loss, content)), 1),
        f"torch.compile bf16, {mode}": (SEARCHING.around(textbook_step(fast, content)), 1),
    }
    _report(section, steps, side, 1)


# A whole job ----------------------------------------------------------------------------------------------------------

FRAMES_PER_S = 10.0
QUALITY = 85
CHUNK = 10  # iterations between two checks of the clock


def job(section: Section) -> None:
    """Times the preset `fast` at 512 px with its frames, and 16 jobs as one batch against one after another."""
    vgg, _ = network()
    engine = _engine(vgg, section.device)
    side = section.px(512)
    recipe = preset("fast", size=side, smallest_size=section.px(128))
    content, style = (
        decode((EXAMPLES / name).read_bytes(), name, Settings(), side)
        for name in ("photos/cat.jpg", "styles/brushwork.jpg")
    )
    square = min(content.shape[1:])  # square, as the pictures of the other rows
    content = content[:, :square, :square].contiguous()
    one = StyleJob(recipe=recipe, content=content, styles=(style,), style_weights=(1.0,), start=None, seed=0)
    for turn in ("cold", "second", "warm"):
        section.attempt(f"{turn} job at {side} px", functools.partial(_job, section, engine, one, turn), 3)
    small = section.px(256)
    smaller = replace(one, recipe=preset("fast", size=small, smallest_size=section.px(128)))
    section.attempt(f"16 jobs at {small} px", functools.partial(_sixteen, section, engine, smaller), 5)


def _engine(vgg: Vgg, device: str, graphs: bool = True) -> VggEngine:
    where = torch.device(device)
    return VggEngine(vgg, where, choose_precision("auto", where), graphs=graphs and device == "cuda")


def _job(section: Section, engine: VggEngine, one: StyleJob, turn: str) -> None:
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
        size=max(one.result_size),
        batch=1,
        iterations=sum(n for _, _, n in one.scales),
        frames=len(frames),
        ms=(ended[-1] - start) * 1e3,
        first_frame_ms=(ended[0] - start) * 1e3,
    )


def _sixteen(section: Section, engine: VggEngine, one: StyleJob) -> None:
    def finish(batch: list[StyleJob]) -> None:
        run = engine.run_batch(batch)
        while not run.finished:
            run.advance(CHUNK)
        for index in range(len(batch)):
            run.picture(index)
        run.close()

    def in_turn() -> None:
        for _ in range(16):
            finish([one])

    repeats = 3 if section.device == "cuda" else 1
    times = interleaved({"together": lambda: finish([one] * 16), "in turn": in_turn}, repeats)
    for name, ms in times.items():
        section.row(
            name=f"16 jobs {name}",
            size=max(one.result_size),
            batch=16 if name == "together" else 1,
            ms=ms,
            ms_per_job=ms / 16,
            throughput_vs_in_turn=times["in turn"] / ms,
        )


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(section: Section) -> None:
    """Compares the memory estimate of a batch with the peak of the allocator."""
    vgg, _ = network()
    engine = _engine(vgg, section.device)
    for size, batch in ((512, 1), (1024, 1), (2048, 1), (512, 4), (1024, 4), (2048, 4)):
        side = section.px(size)
        call = functools.partial(_memory, section, engine, side, batch)
        section.attempt(f"memory at {side} px, batch {batch}", call, 4)


def _memory(section: Section, engine: VggEngine, side: int, batch: int) -> None:
    content, style = _pictures(side, batch, section.device)
    all_jobs = jobs(content, style, Recipe(size=side, smallest_size=0, iterations=100))
    del content, style
    needed = engine.batch_bytes(engine.admit(all_jobs[0]).shape, batch)
    row = {"name": "memory", "size": side, "batch": batch, "needed_mb": needed / 1e6}
    if section.device == "cuda":
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
    vgg, _ = network()
    for size in (512, 1024):
        side = section.px(size)
        section.attempt(f"profile at {side} px", functools.partial(_profile, section, vgg, side), 5)


def _profile(section: Section, vgg: Vgg, side: int) -> None:
    from torch.profiler import ProfilerActivity

    on_gpu = section.device == "cuda"
    content, style = _pictures(side, 1, section.device)
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
            name=key[:120], size=side, batch=1, share=us / total, us=us / iterations, calls=round(count / iterations, 2)
        )
        lines.append(f"{us / iterations:9.1f} us  {us / total:6.1%}  {count / iterations:6.1f} x  {key[:70]}")
    text = "\n".join(lines)
    print(text)
    section.fact(f"profile {side} px", text)
