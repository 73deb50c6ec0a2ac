"""Captured iterations give the results of launched ones, and a replay uses the current contents of its buffers."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from gramophone_server.engine.batch_run import BatchRun
from gramophone_server.engine.graph_runner import GraphRunner, GraphRunnerPool
from tests.support.gpu_engines import engine, finish, fresh_engine, job, totals

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NETWORKS = ("tiny", "vgg")


def runner_of(run: BatchRun) -> GraphRunner:
    return run.batch.runner


def close(a: Tensor, b: Tensor) -> bool:
    """Whether pictures differ by less than 0.5 of 255 on average.

    Adam turns the rounding of tiny gradients into steps, so single pixels may differ more. Two precisions differ by 5
    after these few steps.
    """
    return float((a.int() - b.int()).abs().float().mean()) < 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_a_replayed_run_matches_a_launched_one(name: str) -> None:
    replayed, launched = (engine(name, "fp16", graphs=graphs).run_batch([job()]) for graphs in (True, False))
    mine, theirs = (totals(finish(run)) for run in (replayed, launched))
    assert runner_of(replayed).graphs and not runner_of(launched).graphs
    # Not bitwise: in a capture cuDNN may choose another plan for a convolution.
    assert mine[:4] == pytest.approx(theirs[:4], rel=2e-3)
    assert mine == pytest.approx(theirs, rel=2e-2)
    assert close(replayed.picture(0), launched.picture(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_runner_with_and_without_its_graphs(name: str) -> None:
    one = engine(name, "fp16")
    replayed = one.run_batch([job()])
    expected = totals(finish(replayed))
    picture = replayed.picture(0)
    replayed.close()
    launched = one.run_batch([job()])
    first = launched.advance()
    graphs, runner = dict(runner_of(launched).graphs), runner_of(launched)
    runner.graphs.clear()
    try:
        found = [first[0].losses.total, *totals(finish(launched))]
    finally:
        runner.graphs.update(graphs)
    assert found == pytest.approx(expected, rel=1e-3)
    assert close(launched.picture(0), picture)
    launched.close()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_run_twice_is_bitwise_equal(name: str, precision: str) -> None:
    one, losses, pictures = engine(name, precision), [], []
    for _ in range(2):
        run = one.run_batch([job()])
        losses.append(totals(finish(run)))
        pictures.append(run.picture(0))
        run.close()
    assert losses[0] == losses[1]
    assert torch.equal(pictures[0], pictures[1])


def test_many_iterations_at_once_match_single_ones() -> None:
    one = engine("vgg", "fp16")
    runs = [one.run_batch([job(iterations=23)]) for _ in range(2)]
    at_once, in_turn = finish(runs[0], 50), finish(runs[1], 1)
    assert (len(at_once), len(in_turn)) == (1, 23)
    assert totals(at_once)[-1] == pytest.approx(totals(in_turn)[-1], rel=1e-3)
    assert close(runs[0].picture(0), runs[1].picture(0))
    for run in runs:
        run.close()


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_and_step_act_on_the_next_replay(name: str) -> None:
    run = engine(name, "fp16").run_batch([job(iterations=20)])
    run.advance(5)
    runner = runner_of(run)
    graphs = {size: id(graph) for size, graph in runner.graphs.items()}
    with torch.inference_mode():
        runner.canvas.step.zero_()
    run.advance(1)  # its losses are those of the image before its step, the last image that differs
    before = run.picture(0)
    (still,) = run.advance(1)
    assert torch.equal(run.picture(0), before)
    with torch.inference_mode():
        runner.objective.style_weights.mul_(2)
    (doubled,) = run.advance(1)
    for layer, loss in still.losses.style.items():
        assert doubled.losses.style[layer] == pytest.approx(2 * loss, rel=1e-3)
    assert doubled.losses.tv == pytest.approx(still.losses.tv)
    with torch.inference_mode():
        runner.canvas.step.fill_(0.02)
    run.advance(1)
    assert not torch.equal(run.picture(0), before)
    assert {size: id(graph) for size, graph in runner.graphs.items()} == graphs
    with torch.inference_mode():
        runner.objective.style_weights.div_(2)
    run.close()


def test_a_diverged_job_keeps_its_last_good_picture_and_the_others_continue() -> None:
    jobs = [job(content=1), job(content=3), job(content=4)]
    one = engine("vgg", "fp16")
    finite, diverging = one.run_batch(jobs), one.run_batch(jobs)
    for run in (finite, diverging):
        run.advance(2)
    kept = diverging.picture(1)  # the image of the third evaluation, the last one that is finite
    for run in (finite, diverging):
        run.advance(1)
    with torch.inference_mode():
        runner_of(diverging).objective.style_weights[:, 1] = torch.nan
    expected, found = finish(finite), finish(diverging)
    assert [report.diverged_at for report in found[-1]] == [None, 4, None]
    assert torch.equal(diverging.picture(1), kept)
    for index in (0, 2):
        assert totals(found, index) == totals(expected, index)
        assert torch.equal(diverging.picture(index), finite.picture(index))


def test_a_runner_is_reused_and_keeps_nothing_of_its_last_run() -> None:
    one = engine("vgg", "fp16")
    first = one.run_batch([job(content=5, style=6, beta=9.0)])
    finish(first)
    runner = runner_of(first)
    first.close()
    second = one.run_batch([job()])
    again = totals(finish(second))
    assert runner_of(second) is runner
    fresh = fresh_engine("vgg", "fp16").run_batch([job()])
    assert again == pytest.approx(totals(finish(fresh)), rel=2e-2)
    assert close(second.picture(0), fresh.picture(0))


def test_a_limited_number_of_runners_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphRunnerPool, "MAX_IDLE", 2)
    one = fresh_engine("tiny", "fp16")
    for side in (32, 40, 48, 56):
        run = one.run_batch([job(side=side, iterations=1)])
        finish(run)
        run.close()
    assert [runner.shape.width for runner in one.graph_runners.idle.values()] == [48, 56]


def test_a_capture_survives_another_thread_on_the_gpu() -> None:
    stop, failures = threading.Event(), []

    def disturb() -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                turn = 0
                while not stop.is_set():
                    turn += 1
                    # A new size, so that the allocator has work.
                    x = torch.ones(1000 + 997 * (turn % 50), 64, device="cuda")
                    x.sum().item()
                    x.cpu()
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        run = fresh_engine("tiny", "fp16").run_batch([job(side=52)])
        disturbed = totals(finish(run))
    finally:
        stop.set()
        thread.join(30)
    assert not failures
    quiet = fresh_engine("tiny", "fp16").run_batch([job(side=52)])
    assert disturbed == pytest.approx(totals(finish(quiet)), rel=2e-2)
