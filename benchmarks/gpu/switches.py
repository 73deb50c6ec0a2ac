"""The switches of `network.tuning` in the GPU check: each against the defaults, and how wide a batch should be.

Every switch is measured in turns with the defaults, those with the largest predicted effect, gain or loss, first: an
effect below the noise cannot be confirmed, and a wrong prediction of a large one matters. Before that its pictures are
compared with those of the defaults: a switch that does the same arithmetic must paint the same bits, any other must
have the same first loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import lessons
from benchmarks.gpu.network import smooth
from benchmarks.gpu.predictions import ALONE, FRAME_EVERY, SWITCHES, WIDTHS, Case, Switch, frame_ratio, largest_effect
from benchmarks.gpu.section import Section
from benchmarks.iteration import jobs
from gramophone.recipe import Optimiser, Recipe
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import choose_precision
from gramophone_server.network.tuning import MEASURED, Tuning
from gramophone_server.network.vgg import Vgg

__all__ = ["switches"]

ITERATIONS = 100_000  # more than a measurement makes
COMPARED = 31  # iterations of the pictures that are compared: graphs of 20, 10 and 1
SAME_LOSS = 0.01  # relative


class Bench:
    """Engines with different switches, and jobs for them."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.device = torch.device(section.device)
        self.vgg: Vgg = section.network()
        self.precision = choose_precision("auto", self.device)
        self.default = VggEngine(self.vgg, self.device, self.precision)
        self._faults: list[tuple[str, str]] | None = None

    def faults(self) -> list[tuple[str, str]]:
        """The forms of convolutions that are not right for some layer, and why, as the autotuner finds them."""
        if self._faults is None:
            found = self.engine(Tuning(forward=MEASURED)).features.autotuner.faults
            self._faults = [
                (form, f"{fault}, in {key}") for key, faults in found.items() for form, fault in faults.items()
            ]
        return self._faults

    def engine(self, tuning: Tuning) -> VggEngine:
        """An engine with these switches. What both it and the default measured is the default's, so that two
        measurements of the same kernels make no difference."""
        engine = VggEngine(self.vgg, self.device, self.precision, tuning=tuning, kernels=self.default.kernels)
        engine.features.autotuner.milliseconds |= self.default.features.autotuner.milliseconds
        return engine

    def run(self, engine: VggEngine, case: Case) -> BatchRun:
        """A run of one scale, with a slot for each job."""
        size, batch = case
        side = self.section.px(size)
        content, style = (self.picture(side, seed, batch) for seed in (1, 2))
        recipe = Recipe(size=side, smallest_size=0, iterations=ITERATIONS, optimiser=Optimiser.ADAM)
        return engine.run_batch(jobs(content, style, recipe))

    def picture(self, side: int, seed: int, batch: int) -> Tensor:
        return ((smooth(side, seed, batch) * 255).round() / 255).to(self.device)

    def at_once(self, case: Case) -> int:
        """Iterations of a call that is timed, so many that its one readback hardly counts."""
        size, batch = case
        return 2 if self.section.device == "cpu" else 60 if size * size * batch <= 512 * 512 else 20


def switches(section: Section) -> None:
    """Times every switch against the defaults, and batches against single jobs."""
    bench = Bench(section)
    for switch in sorted(SWITCHES, key=largest_effect, reverse=True):
        if switch.needs_cudnn and bench.default.features.kernel != "cudnn":
            section.left_out(switch.name, "it needs a GPU: this network's convolutions are not cuDNN's")
            continue
        section.attempt(switch.name, functools.partial(_switch, bench, switch), 4)
        section.fact("lessons", lessons.table(section.so_far).strip())
    section.attempt("frames", lambda: _frames(bench), 3)
    section.attempt("batch widths", lambda: _widths(bench), 8)  # last: no default follows from them
    section.fact("lessons", lessons.table(section.so_far).strip())
    bench.default.graph_runners.clear()


def _switch(bench: Bench, switch: Switch) -> None:
    engine = bench.engine(switch.tuning)
    fault = _fault(bench, engine, switch)
    for case in switch.cases:
        # A fault is a result, not a failure: the time says whether it is worth removing.
        call = functools.partial(_case, bench, engine, switch, case, fault)
        bench.section.attempt(f"{switch.name}, {case[0]} px, batch {case[1]}", call, 1.5)
    engine.graph_runners.clear()


def _fault(bench: Bench, engine: VggEngine, switch: Switch) -> str:
    """Why the switch must not become the default, "" if it may. Raises `RuntimeError` if it computes something else."""
    case = ALONE[0]
    runs = [bench.run(chosen, case) for chosen in (bench.default, engine, engine)]
    more = COMPARED if bench.section.device == "cuda" else 2
    losses = [[run.advance(iterations)[0].losses.total for iterations in (1, more)] for run in runs]
    pictures = [run.picture(0) for run in runs]
    for run in runs:
        run.close()
    expected, got, again = losses
    if not abs(got[0] / expected[0] - 1) < SAME_LOSS:
        raise RuntimeError(f"{switch.name}: its first loss {got[0]:.5g} is not the defaults' {expected[0]:.5g}")
    if switch.same_bits and (got != expected or not torch.equal(pictures[1], pictures[0])):
        raise RuntimeError(f"{switch.name}: its pictures are not those of the defaults, although its arithmetic is")
    if got != again or not torch.equal(pictures[1], pictures[2]):
        return "two runs differ"
    forms = (switch.tuning.forward, switch.tuning.backward)
    return next((f"`{form}` {fault}" for form, fault in bench.faults() if form in forms), "")


def _case(bench: Bench, engine: VggEngine, switch: Switch, case: Case, fault: str) -> None:
    size, batch = case
    many = bench.at_once(case)
    runs = {"default": bench.run(bench.default, case), "switch": bench.run(engine, case)}
    calls: Mapping[str, Callable[[], object]] = {
        name: functools.partial(_with_frames if switch.frames else _without, run, many) for name, run in runs.items()
    }
    times = bench.section.timed(calls, repeats=5, least_ms=30)
    for run in runs.values():
        run.close()
    bench.section.row(
        name=switch.name,
        size=size,
        batch=batch,
        ms=times["switch"] / many,
        default_ms=times["default"] / many,
        ratio=times["switch"] / times["default"],
        predicted=switch.predicted(case),
        fault=fault,
    )


def _without(run: BatchRun, iterations: int) -> None:
    run.advance(iterations)


def _with_frames(run: BatchRun, iterations: int) -> None:
    wait: Callable[[], Tensor] | None = None
    for _ in range(0, iterations, FRAME_EVERY):
        run.advance(min(FRAME_EVERY, iterations))
        wait = run.snapshot(0)
    assert wait is not None
    wait()


def _frames(bench: Bench) -> None:
    """The cost of a frame after every ten iterations. Both sides read the losses back as often."""
    for size, _ in ALONE:
        many = bench.at_once((size, 1))
        runs = [bench.run(bench.default, (size, 1)) for _ in range(2)]

        def without(run: BatchRun = runs[0], many: int = many) -> None:
            for _ in range(0, many, FRAME_EVERY):
                run.advance(min(FRAME_EVERY, many))

        calls: dict[str, Callable[[], object]] = {
            "without": without,
            "frames": functools.partial(_with_frames, runs[1], many),
        }
        times = bench.section.timed(calls, least_ms=30)
        for run in runs:
            run.close()
        ratio, ms = times["frames"] / times["without"], times["frames"] / many
        bench.section.row(name="frames", size=size, batch=1, ms=ms, ratio=ratio, predicted=frame_ratio(size))


def _widths(bench: Bench) -> None:
    """The time of a job's iteration by the width of its batch."""
    for size, predicted in WIDTHS.items():
        runs = {width: bench.run(bench.default, (size, width)) for width in (1, *predicted)}
        many = bench.at_once((size, 16))
        calls: dict[str, Callable[[], object]] = {
            str(width): functools.partial(run.advance, many) for width, run in runs.items()
        }
        times = bench.section.timed(calls, least_ms=30)
        for run in runs.values():
            run.close()
        bench.default.graph_runners.clear()
        alone = times["1"] / many
        for width, ratio in predicted.items():
            ms = times[str(width)] / many
            row: dict[str, Any] = {"ms": ms, "ms_per_job": ms / width, "ratio": ms / width / alone, "predicted": ratio}
            bench.section.row(name="batch width", size=size, batch=width, **row)
