"""Slots of a graph runner: a slot returns the tensors that were put into it, and does not affect the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gramophone.recipe import Optimiser, Recipe
from gramophone_server.domain.job_state import Shape
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.graph_runner import GraphRunner
from gramophone_server.engine.style_targets import style_grams
from tests.support.pictures import make_picture

HEIGHT, WIDTH, SLOTS = 24, 28, 3


@pytest.fixture
def runner_of(tiny_engine: VggEngine) -> Callable[..., GraphRunner]:
    def make(average: float = 0.5, optimiser: Optimiser = Optimiser.LBFGS) -> GraphRunner:
        shape = Shape.of(Recipe(optimiser=optimiser, average=average), HEIGHT, WIDTH)
        return GraphRunner(tiny_engine.features, shape, SLOTS)

    return make


def fill(runner: GraphRunner, slot: int, seed: int, recipe: Recipe | None = None) -> None:
    recipe = recipe or Recipe(beta=float(seed + 1))
    content, style = (make_picture(seed + i, HEIGHT, WIDTH)[None] / 255 for i in (0, 10))
    grams = style_grams(runner.objective.features, style, runner.shape.style_layers, runner.shape.pooling)
    runner.objective.set_targets(slot, recipe, content, [(grams, 1.0)])
    runner.put(slot, {"image": content[0], "last_good": content[0]}, recipe.step, 0, 0)


def everything(runner: GraphRunner, slot: int) -> list[Tensor]:
    """Copies of all tensors of a slot."""
    objective, canvas = runner.objective, runner.canvas
    targets = [target[slot] for target in (*objective.content_targets, *objective.style_targets)]
    weights = [objective.content_weights[:, slot], objective.style_weights[:, slot], objective.tv_weights[slot]]
    own = [x[slot] for x in (canvas.step, canvas.count, canvas.alive, canvas.diverged_at)]
    return [x.clone() for x in (*runner.slot(slot).values(), *targets, *weights, *own)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimiser", Optimiser)
def test_putting_taking_and_clearing_touch_one_slot(
    runner_of: Callable[..., GraphRunner], optimiser: Optimiser
) -> None:
    runner = runner_of(optimiser=optimiser)
    for slot in range(SLOTS):
        fill(runner, slot, slot)
    runner.iterate(3)
    others = [everything(runner, slot) for slot in (0, 2)]
    taken = runner.take(1)
    runner.clear(1)
    fill(runner, 1, 7)
    runner.objective.set_weights(1, Recipe(beta=0.0))
    assert all(equal(everything(runner, slot), before) for slot, before in zip((0, 2), others, strict=True))
    runner.put(1, taken, 0.02, 3, 0)
    assert all(torch.equal(view, taken[name]) for name, view in runner.slot(1).items())
    assert runner.canvas.count.tolist() == [3, 3, 3]


@pytest.mark.parametrize("optimiser", Optimiser)
def test_slots_do_not_see_each_other(runner_of: Callable[..., GraphRunner], optimiser: Optimiser) -> None:
    """A job gives the same results alone, between two others, and next to one that diverges, bit for bit."""
    results = []
    for company in ((), (0, 2), (0,)):  # slots of the other jobs
        runner = runner_of(optimiser=optimiser)
        fill(runner, 1, 1)
        for slot in company:
            fill(runner, slot, slot)
        runner.iterate(2)
        if company == (0,):
            with torch.inference_mode():
                runner.canvas.image[0].fill_(torch.nan)
        elif company:
            runner.clear(0)
            fill(runner, 0, 5)
        runner.iterate(3)
        results.append([*runner.take(1).values(), runner.terms[:, 1].clone()])
        assert runner.canvas.diverged_at.tolist() == [3 if company == (0,) else 0, 0, 0]
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("optimiser", Optimiser)
def test_empty_slots_stay_black_and_finite(runner_of: Callable[..., GraphRunner], optimiser: Optimiser) -> None:
    runner = runner_of(optimiser=optimiser)
    fill(runner, 0, 3)
    fill(runner, 1, 4)
    runner.iterate(2)
    with torch.inference_mode():
        runner.canvas.image[1].fill_(torch.nan)  # its slot is cleared before it is found to have diverged
    runner.clear(1)
    runner.iterate(12)
    for slot in (1, 2):
        assert not runner.canvas.alive[slot] and not runner.canvas.diverged_at[slot]
        assert all(not view.any() for view in runner.canvas.slot(slot).values())
        assert all(view.isfinite().all() for view in runner.slot(slot).values())
        assert not runner.terms[:, slot].any()
    assert runner.canvas.alive[0]


def test_its_bytes_are_the_size_of_its_buffers(runner_of: Callable[..., GraphRunner]) -> None:
    pictures = SLOTS * 3 * HEIGHT * WIDTH * 4
    adam, lbfgs = (runner_of(0.0, optimiser).bytes for optimiser in (Optimiser.ADAM, Optimiser.LBFGS))
    assert 19 * pictures <= lbfgs - adam < 20 * pictures  # 21 pictures for 2, and products
