"""One iteration in the GPU check: our engine against the textbook loop, cuDNN's search, and torch.compile."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping

import torch

from benchmarks.gpu.network import flops, pictures
from benchmarks.gpu.section import Section
from benchmarks.iteration import TORCHS_OWN, jobs, textbook, textbook_loss, textbook_step
from benchmarks.measure import Switches
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg

__all__ = ["compiled", "iteration", "searching", "sizes"]

FIRST, LAST = torch.contiguous_format, torch.channels_last
SEARCHING = Switches(benchmark=True, conv_tf32=True, matmul_tf32=False)  # the best that a few lines can do
Steps = dict[str, tuple[Callable[[], object], int]]  # by name: a call, and the number of iterations in it
Variant = tuple[str, bool, Optimiser, bool]  # mode, whether captured as graphs, optimiser, whether cuDNN searches
Engines = dict[tuple[str, bool, bool], VggEngine]  # by mode, graphs and search

ADAM = Optimiser.ADAM
OURS: dict[str, Variant] = {"ours fp16": ("fp16", True, ADAM, False)}
LAUNCHED: dict[str, Variant] = {"ours fp16 launched": ("fp16", False, ADAM, False)}
OTHERS: dict[str, Variant] = {
    "ours bf16": ("bf16", True, ADAM, False),
    "ours fp16, L-BFGS": ("fp16", True, Optimiser.LBFGS, False),
    "ours tf32": ("tf32", True, ADAM, False),
    "ours fp32": ("fp32", True, ADAM, False),
}
SEARCHED: dict[str, Variant] = {"ours fp16, cuDNN searching": ("fp16", True, ADAM, True)}


def iteration(section: Section) -> None:
    """Times iterations of our engine and of the textbook loop at 512 and 1024 px, in every mode."""
    first = [(512, 1, OURS | LAUNCHED), (1024, 1, OURS | LAUNCHED), (512, 1, OTHERS)]
    _measure(section, [*first, *section.few([(1024, 1, OTHERS)], 0)])


def sizes(section: Section) -> None:
    """Times iterations of other sizes, and of several pictures at once."""
    batches = [(256, 16), (512, 4), (256, 4), (512, 16), (1024, 4)]
    alone = [(256, 1, OURS | LAUNCHED), (2048, 1, OURS)]
    _measure(section, [*alone, *((size, batch, OURS) for size, batch in section.few(batches))])


def searching(section: Section) -> None:
    """Times iterations for which cuDNN searches for its fastest kernels, which the engine does not let it do."""
    _measure(section, [(size, 1, OURS | SEARCHED) for size in section.few([512, 1024, 256])])


def _measure(section: Section, cases: Iterable[tuple[int, int, Mapping[str, Variant]]]) -> None:
    """Times each case: the side of its pictures, how many they are, and our variants."""
    vgg = section.network()
    engines: Engines = {}
    for size, batch, variants in cases:
        what = f"{size} px x {batch}, {', '.join(variants)}"
        section.attempt(what, functools.partial(_iteration, section, vgg, engines, size, batch, variants), 6)
        _write_forms(section, engines)


def _write_forms(section: Section, engines: Engines) -> None:
    """Which kernel the engines chose for each convolution, and its time."""
    for (mode, graphs, search), engine in engines.items():
        if graphs and engine.features.autotuner.milliseconds:
            forms = {
                str(key): {kernel: ms if math.isfinite(ms) else None for kernel, ms in times.items()}
                for key, times in engine.features.autotuner.milliseconds.items()
            }
            section.fact(f"forms, {mode}{', searching' * search}", forms)


def _iteration(
    section: Section, vgg: Vgg, engines: Engines, size: int, batch: int, variants: Mapping[str, Variant]
) -> None:
    side, count = section.px(size), section.pictures(batch)
    content, style = pictures(side, count, section.device)
    with TORCHS_OWN:
        plain = textbook_step(textbook_loss(vgg, content, style, torch.float32, FIRST), content)
        expected = float(plain())
    steps: Steps = {"eager fp32": (TORCHS_OWN.around(plain), 1)}
    # bfloat16 alone: in float16 the textbook's Gram matrices overflow with the real weights, and the search for a type
    # takes seconds.
    if not any(searches for _, _, _, searches in variants.values()):  # those are compared with our own engine
        with SEARCHING:  # from the first call on, because cuDNN keeps its first plan for a shape
            loss = textbook_loss(vgg, content, style, torch.bfloat16, LAST)
        steps["eager bf16 channels_last"] = SEARCHING.around(textbook_step(loss, content)), 1
    runs: list[BatchRun] = []
    many = 2 if section.dry else 50 if size * size * batch <= 512 * 512 else 10

    def prepare(name: str, variant: Variant) -> None:
        mode, graphs, optimiser, search = variant if not section.dry else ("fp32", False, variant[2], False)
        # cuDNN keeps its plans by shape, type and the switch for tf32, which changes nothing in 16 bits. With the
        # switch on, the search does not find the plans that were made without a search.
        tf32 = mode == "tf32"
        switches = Switches(benchmark=search, conv_tf32=tf32 or search, matmul_tf32=tf32, deterministic=True)
        recipe = Recipe(size=side, smallest_size=0, iterations=100_000, optimiser=optimiser)
        with switches:
            key = mode, graphs, search
            if key not in engines:
                engines[key] = VggEngine(vgg, content.device, MODES[mode], graphs=graphs)
            run = engines[key].run_batch(jobs(content, style, recipe))
            runs.append(run)
            _require_same_objective(run, expected, mode)
        # So many iterations that the one readback of the losses hardly counts.
        steps[name] = switches.around(functools.partial(run.advance, many)), many

    try:
        for name, variant in variants.items():
            section.attempt(f"{name}, {size} px x {batch}: starts", functools.partial(prepare, name, variant), 4)
        _report(section, steps, size, batch)
    finally:
        for run in runs:
            run.close()
        for engine in engines.values():
            engine.graph_runners.clear()


def _require_same_objective(run: BatchRun, expected: float, mode: str) -> None:
    """Raises `RuntimeError` unless the first loss is that of the textbook loop, so that both loops do the same work."""
    first = sum(report.losses.total for report in run.advance(1))
    error = abs(first / expected - 1)
    if not error < (3e-2 if mode == "bf16" else 1e-2):
        raise RuntimeError(f"its first loss {first:.5g} is {error:.1e} from the textbook's {expected:.5g}; not timed")


def _report(section: Section, steps: Steps, size: int, batch: int) -> None:
    """Times the steps and writes a row for each. ``size`` and ``batch`` are those of the real run."""
    times = section.timed({name: call for name, (call, _) in steps.items()}, repeats=5, least_ms=30)
    times = {name: ms / steps[name][1] for name, ms in times.items()}
    sixteen = min((ms for name, ms in times.items() if name.startswith("eager") and "fp32" not in name), default=None)
    for name, ms in times.items():
        section.row(
            name=name,
            size=size,
            batch=batch,
            ms=ms,
            ms_per_job=ms / batch,
            ratio_vs_eager=ms / times["eager fp32"],
            ratio_vs_eager16=ms / sixteen if sixteen else None,
            ratio_vs_floor=section.ratio_vs_floor(ms, flops(size, batch)),
        )


def compiled(section: Section) -> None:
    """Times torch.compile of the 16-bit textbook loop, whose compilation takes long."""
    # In the section's folder, because the home folder may not be writable.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(section.folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(section.folder / "triton"))
    vgg = section.network()
    for size, mode in section.few([(512, "default"), (1024, "default"), (512, "reduce-overhead")]):
        call = functools.partial(_compiled, section, vgg, size, mode)
        section.attempt(f"torch.compile, {mode}, {size} px", call, 12)


def _compiled(section: Section, vgg: Vgg, size: int, mode: str) -> None:
    content, style = pictures(section.px(size), 1, section.device)
    with SEARCHING:
        loss = textbook_loss(vgg, content, style, torch.bfloat16, LAST)
    # A dry run does not wait for a compiler.
    fast = torch.compile(loss, backend="eager") if section.dry else torch.compile(loss, mode=mode)
    steps: Steps = {
        "eager fp32": (textbook(vgg, content, style, torch.float32, FIRST), 1),
        "eager bf16 channels_last": (SEARCHING.around(textbook_step(loss, content)), 1),
        f"torch.compile bf16, {mode}": (SEARCHING.around(textbook_step(fast, content)), 1),
    }
    _report(section, steps, size, 1)
