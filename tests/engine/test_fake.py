"""The engine of `--engine fake`: what the real one promises, but for the art."""

import gc
import time

import pytest
import torch

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server import main
from gramophone_server.config import Limits, Settings
from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.fake import FakeBatch, FakeEngine
from gramophone_server.engine.optimisers import layout
from tests.support.serving import events_of, serving
from tests.support.specs import job_state, spec

MOST = 2**22


@pytest.fixture
def fast():
    return FakeEngine(0.0)


def through(engine, job, iterations=None):
    """The job after so many iterations, or at its end; and every picture that it showed."""
    pictures = []
    while not job.finished and (iterations is None or job.done < iterations):
        batch = engine.batch(job.shape, 2)
        slot = batch.join(job)
        while batch.iterations_left(slot) and (iterations is None or job.done < iterations):
            batch.advance()
            pictures.append(batch.snapshot(slot)())
        assert batch.leave(slot) is job
        batch.close()
    return job, pictures


@pytest.mark.parametrize(("protocol", "made"), [(Batch, FakeBatch), (BatchEngine, FakeEngine)])
def test_it_has_what_an_engine_has(protocol, made):
    methods = {name for name, value in vars(protocol).items() if not name.startswith("_") and callable(value)}
    assert methods <= set(dir(made))


def test_it_knows_the_layers_of_the_network(tiny_engine: VggEngine, fast):
    assert fast.layers == tiny_engine.layers


def test_a_job_goes_through_its_scales_and_each_picture_is_another(fast):
    job, pictures = through(fast, job_state(iterations=6, smallest_size=45, coarse_iterations=4))
    assert job.finished and job.done == 10
    assert [tuple(p.shape) for p in pictures] == [(22, 45, 3)] * 4 + [(32, 64, 3)] * 6
    assert len({p.numpy().tobytes() for p in pictures}) == 10 and all(p.dtype is torch.uint8 for p in pictures)


def test_a_picture_is_a_matter_of_seed_size_and_iteration(fast):
    alone, other = (through(fast, job_state(iterations=5))[1][-1] for _ in range(2))
    batch = fast.batch(job_state().shape, 4)
    mine, _ = (batch.join(job_state(iterations=n)) for n in (5, 9))
    batch.advance(5)
    assert torch.equal(alone, other) and torch.equal(batch.snapshot(mine)(), alone)


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
@pytest.mark.parametrize("light", [True, False])
def test_a_job_goes_on_from_its_checkpoint_as_if_nothing_had_happened(fast, light, optimiser):
    whole = through(fast, job_state(iterations=8, smallest_size=45, coarse_iterations=4, optimiser=optimiser))[1]
    job, before = through(fast, job_state(iterations=8, smallest_size=45, coarse_iterations=4, optimiser=optimiser), 7)
    written = fast.checkpoints.write(job, picture=before[-1] if light else None, most_bytes=MOST)
    again = fast.checkpoints.read(written, most_bytes=MOST).restore(job.job)
    assert torch.equal(fast.picture(again)(), before[-1])
    after = through(fast, again)[1]
    assert all(map(torch.equal, before + after, whole)) and len(before + after) == len(whole)


def test_its_tensors_are_those_of_a_slot(fast):
    job, _ = through(fast, job_state(), 2)
    expected = layout(job.recipe, 32, 64)
    for name, tensor in job.tensors.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)


def test_weights_show_in_the_losses(fast):
    job = job_state(iterations=20, beta=2.0)
    batch = fast.batch(job.shape, 1)
    slot = batch.join(job)
    before = batch.advance(4)[slot].losses
    assert batch.update(slot, beta=20.0) == 5
    after = batch.advance(4)[slot].losses
    assert after.style["relu1_1"] == pytest.approx(before.style["relu1_1"] * 10 * 4 / 8)


def test_an_iteration_takes_its_time_whatever_the_width():
    engine = FakeEngine(0.01)
    batch = engine.batch(job_state().shape, 8)
    for _ in range(8):
        batch.join(job_state(iterations=10))
    before = time.perf_counter()
    batch.advance(10)
    assert 0.1 <= time.perf_counter() - before < 0.2


def test_what_does_not_fit_is_refused(fast):
    batch = fast.batch(job_state().shape, 1)
    with pytest.raises(ValueError, match="needs jobs"):
        batch.advance()
    batch.join(job_state())
    for job in (job_state(), job_state(size=48)):
        with pytest.raises(ValueError, match="full or of another shape"):
            batch.join(job)
    with pytest.raises(ValueError, match="1 to 256 slots, got 257"):
        fast.batch(job_state().shape, 257)


async def test_a_server_with_it_says_so_and_serves(caplog):
    engine = main._load_engine(Settings(engine="fake", iter_ms=0.5))
    assert isinstance(engine, FakeEngine) and engine.iteration_s == 0.0005
    assert "every picture is a pattern, and an iteration takes 0.5 ms" in caplog.text
    engine.go = type("Always", (), {"set": staticmethod(lambda: None)})
    async with serving(engine, Limits()) as s:
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert "fake" in info.device and info.weights == "none"
        told = await events_of(s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec(iterations=12))))
    assert told[-1].result.iterations == 12


def test_what_was_there_when_the_server_was_ready_is_not_collected_again():
    before = gc.get_freeze_count()
    try:
        assert isinstance(main._loaded_for_good(Settings(engine="fake")), FakeEngine)
        assert gc.get_freeze_count() > before + 10_000  # torch alone has more
    finally:
        gc.unfreeze()
