"""The engine: how it is loaded, and that it and its batches have all methods of the protocols."""

from __future__ import annotations

import pytest

from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.engine.batch import EngineBatch
from gramophone_server.engine.engine import VggEngine
from gramophone_server.errors import StartupError
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
