"""The engine: how it is loaded, and that it and its batches have all methods of the protocols."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gramophone.recipe import Optimiser
from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.batch import EngineBatch
from gramophone_server.engine.engine import VggEngine
from gramophone_server.errors import StartupError
from gramophone_server.network.precision import MODES
from gramophone_server.network.vgg import Vgg
from gramophone_server.ops import functional
from tests.support.engines import FakeBatch, FakeEngine


@pytest.mark.parametrize(
    ("protocol", "implementations"), [(Batch, (EngineBatch, FakeBatch)), (BatchEngine, (VggEngine, FakeEngine))]
)
def test_the_engine_and_its_fake_have_all_methods_of_the_protocol(
    protocol: type, implementations: tuple[type, ...]
) -> None:
    methods = {name for name, value in vars(protocol).items() if not name.startswith("_") and callable(value)}
    assert methods
    for implementation in implementations:
        assert methods <= set(dir(implementation))


def test_settings_that_cannot_be_loaded_are_refused_with_one_sentence() -> None:
    good = {"device": "cpu", "precision": "fp32", "weights": "embedded", "backbone": "vgg19", "threads": 0}
    for change, message in (
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"device": "cuda"}, "device cuda is not possible: .*, or run the server with --device cpu"),
        ({"precision": "fp16"}, "precision on cpu must be auto, fp32 or bf16, got 'fp16'"),
    ):
        with pytest.raises(StartupError, match=message):
            VggEngine.load(**{**good, **change})


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("optimiser", Optimiser)
def test_an_engine_without_kernels_makes_the_same_picture(
    tiny_vgg: Vgg, make_job: Callable[..., StyleJob], optimiser: Optimiser
) -> None:
    def painted(library_ops: str) -> torch.Tensor:
        engine = VggEngine(tiny_vgg, torch.device("cpu"), MODES["fp32"], library_ops=library_ops)
        assert set(engine.kernels.by_library) == set(functional.by_library) and engine.kernels.seconds > 0
        run = engine.run_batch([make_job(optimiser=optimiser)])
        while not run.finished:
            run.advance()
        return run.picture(0)

    expected = painted("")
    assert not functional.by_library
    got = painted("all")
    assert len(functional.by_library) == len(functional.OPS) + len(functional.CUDA_OPS) - 2  # less two for autograd
    assert (got.int() - expected.int()).abs().max() <= 2


def test_the_self_test_is_not_repeated_for_an_engine_with_the_report_of_an_earlier_one(tiny_vgg: Vgg) -> None:
    first, other = (VggEngine(tiny_vgg, torch.device("cpu"), MODES["fp32"]) for _ in range(2))
    assert other.kernels is not first.kernels
    assert VggEngine(tiny_vgg, torch.device("cpu"), MODES["fp32"], kernels=first.kernels).kernels is first.kernels
