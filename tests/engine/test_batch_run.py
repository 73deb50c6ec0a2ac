"""Runs of the engine: their losses are pinned and repeatable, their memory bounded, their failures typed."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser, Start
from gramophone_server import ops
from gramophone_server.domain.job import Report, StyleJob
from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.optimisers import Canvas
from gramophone_server.errors import OutOfDeviceMemory
from gramophone_server.network.precision import MODES
from tests.support.networks import make_tiny_vgg
from tests.support.pictures import make_picture

MakeJob = Callable[..., StyleJob]

# Ten losses of a seeded job for each optimiser, written by `python tests/engine/make_expected.py`.
EXPECTED: dict[str, list[float]] = json.loads((Path(__file__).parent / "expected_losses.json").read_text())


def finish(run: BatchRun) -> list[Report]:
    reports = []
    while not run.finished:
        reports += run.advance()
    return reports


@pytest.mark.parametrize("optimiser", Optimiser)
def test_losses_equal_the_pinned_ones_and_a_second_run_is_bitwise_equal(
    tiny_engine: VggEngine, make_job: MakeJob, optimiser: Optimiser
) -> None:
    job = make_job(optimiser=optimiser)
    runs = [tiny_engine.run_batch([job]) for _ in range(2)]
    first, second = ([report.losses.total for report in finish(run)] for run in runs)
    assert first == pytest.approx(EXPECTED[optimiser], rel=1e-3)
    assert first == second
    assert torch.equal(runs[0].picture(0), runs[1].picture(0))


def test_a_run_goes_through_its_scales(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    job = make_job(size=48, smallest_size=24, iterations=3, coarse_iterations=2)
    assert list(job.scales) == [(24, 20, 2), (34, 28, 2), (48, 40, 3)]
    run = tiny_engine.run_batch([job])
    before = run.picture(0)
    reports = finish(run)
    assert [(r.iteration, r.iterations, r.width, r.height) for r in reports] == [
        (1, 7, 24, 20), (2, 7, 24, 20), (3, 7, 34, 28), (4, 7, 34, 28), (5, 7, 48, 40), (6, 7, 48, 40), (7, 7, 48, 40),
    ]  # fmt: skip
    assert [r.pixel_iterations_left for r in reports][-4:] == [3 * 48 * 40, 2 * 48 * 40, 48 * 40, 0]
    assert before.shape == (20, 24, 3) and before.dtype == torch.uint8
    assert run.picture(0).shape == (40, 48, 3)
    assert job.result_size == (48, 40)


@pytest.mark.parametrize("optimiser", Optimiser)
def test_every_optimiser_lowers_the_objective(tiny_engine: VggEngine, make_job: MakeJob, optimiser: Optimiser) -> None:
    reports = finish(tiny_engine.run_batch([make_job(optimiser=optimiser, step=0.01, iterations=40)]))
    assert reports[-1].losses.total < 0.8 * reports[0].losses.total


def test_losses_are_by_layer_and_their_sum_is_the_total(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    (report,) = tiny_engine.run_batch([make_job()]).advance()
    losses = report.losses
    assert list(losses.content) == ["relu4_2"]
    assert list(losses.style) == ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    assert losses.content["relu4_2"] == pytest.approx(0.0, abs=1e-9)  # the start is the content
    assert losses.total == pytest.approx(sum(losses.style.values()) + losses.tv)


def test_the_first_picture_is_the_content_the_start_image_or_seeded_noise(
    tiny_engine: VggEngine, make_job: MakeJob
) -> None:
    content = make_picture(1).permute(1, 2, 0)
    assert torch.equal(tiny_engine.run_batch([make_job()]).picture(0), content)
    given = make_picture(9)
    assert torch.equal(
        tiny_engine.run_batch([make_job(start=Start.IMAGE, start_image=given)]).picture(0), given.permute(1, 2, 0)
    )
    noise = [
        tiny_engine.run_batch([make_job(start=Start.NOISE, seed=seed)]).picture(0) for seed in (1, 1, 2, 2**64 - 1)
    ]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[1], noise[2]) and not torch.equal(noise[2], noise[3])


def test_jobs_of_a_batch_have_the_results_that_they_have_alone(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    jobs = [
        make_job(content=1, style=2, beta=1.0, smallest_size=34),
        make_job(content=3, style=4, beta=9.0, step=0.01, start=Start.NOISE, seed=5, smallest_size=34),
    ]
    together = tiny_engine.run_batch(jobs)
    both = [together.advance() for _ in range(14)]
    for i, job in enumerate(jobs):
        alone = tiny_engine.run_batch([job])
        for (mine,), batch in zip((alone.advance() for _ in range(14)), both, strict=True):
            assert batch[i].losses.total == pytest.approx(mine.losses.total, rel=1e-3)
        difference = together.picture(i).int() - alone.picture(0).int()
        assert difference.abs().max() <= 2  # of 255; Adam turns rounding of tiny gradients into steps


def test_jobs_with_different_optimisers_are_refused(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    with pytest.raises(ValueError, match="jobs of a run must have the same optimiser, got adam and lbfgs"):
        tiny_engine.run_batch([make_job(), make_job(optimiser=Optimiser.LBFGS)])


def test_the_picture_is_the_corrected_average_of_the_iterates(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    plain, averaged = (tiny_engine.run_batch([make_job(average=average, iterations=2)]) for average in (0.0, 0.5))
    images = []
    for _ in range(2):
        plain.advance()
        averaged.advance()
        images.append(plain.picture(0).float())
    expected = (0.25 * images[0] + 0.5 * images[1]) / 0.75
    assert (averaged.picture(0).float() - expected).abs().max() <= 1


class NanAfter:
    """A stepper that makes the first job's picture NaN after ``good`` steps."""

    def __init__(self, good: int, canvas: Canvas) -> None:
        self.left = good
        self.canvas = canvas

    def step_(self, grad: Tensor) -> None:
        self.left -= 1
        c = self.canvas
        ops.descent_(c.image, c.last_good, c.mean, c.image.clone(), torch.tensor([0.1, 0.1]), c.alive, c.average, False)
        if self.left < 0 and c.alive[0]:
            c.image[0] = float("nan")


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_job_whose_loss_is_not_finite_keeps_its_last_good_picture_and_disturbs_no_other_job(
    tiny_engine: VggEngine, make_job: MakeJob, average: float
) -> None:
    run = tiny_engine.run_batch([make_job(average=average), make_job(average=average, content=3)])
    starts = [run.picture(i).float() for i in range(2)]
    runner = run.batch.runner
    runner.stepper = NanAfter(2, runner.canvas)  # type: ignore[assignment]
    for _ in range(3):
        assert [report.diverged_at for report in run.advance()] == [None, None]
    for _ in range(2):
        assert [report.diverged_at for report in run.advance()] == [4, None]
        assert (run.picture(0).float() - starts[0] * 0.81).abs().max() <= 1
    if not average:
        assert (run.picture(1).float() - starts[1] * 0.9**5).abs().max() <= 1


def test_several_iterations_per_call_give_the_same_results_as_single_ones(
    tiny_engine: VggEngine, make_job: MakeJob
) -> None:
    job = make_job(smallest_size=34, iterations=5, coarse_iterations=4)
    one, many = tiny_engine.run_batch([job]), tiny_engine.run_batch([job])
    singly = finish(one)
    at_once = []
    while not many.finished:
        at_once += many.advance(3)
    assert [report.iteration for report in at_once] == [3, 4, 7, 9]  # none goes beyond its scale
    assert [report.losses.total for report in at_once] == [singly[i - 1].losses.total for i in (3, 4, 7, 9)]
    assert torch.equal(one.picture(0), many.picture(0))


def test_running_out_of_memory_raises_a_domain_error_and_the_engine_still_works(
    tiny_engine: VggEngine, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> Tensor:
        return torch.empty(2**50)

    monkeypatch.setattr(tiny_engine.features, "forward", too_much)
    with pytest.raises(OutOfDeviceMemory, match="too little memory for a 48x40 picture; ask for a smaller size"):
        tiny_engine.run_batch([make_job()]).advance()
    monkeypatch.undo()
    assert finish(tiny_engine.run_batch([make_job()]))[-1].iteration == 10


def resident_kb() -> int:
    """The current resident memory of this process. Its peak could be that of an earlier test, and hide a leak."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read the memory from")
def test_memory_does_not_grow_over_a_run(tiny_engine: VggEngine, make_job: MakeJob) -> None:
    """A feature map of 300 kB kept by each of the 200 iterations would be 60 MB."""
    run = tiny_engine.run_batch([make_job(size=160, iterations=220)])
    for _ in range(20):
        run.advance()
    before = resident_kb()
    for _ in range(200):
        run.advance()
    assert resident_kb() - before < 16 * 1024


def test_the_losses_of_bf16_are_close_to_those_of_fp32(make_job: MakeJob) -> None:
    totals = []
    for precision in ("fp32", "bf16"):
        engine = VggEngine(make_tiny_vgg(), torch.device("cpu"), MODES[precision])
        totals.append([r.losses.total for r in finish(engine.run_batch([make_job(iterations=30)]))])
    assert totals[1][0] == pytest.approx(totals[0][0], rel=0.02)
    assert totals[1][-1] == pytest.approx(totals[0][-1], rel=0.1)
