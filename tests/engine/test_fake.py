"""The engine of `--engine fake` keeps the contract of the real one, except that its pictures are patterns."""

import gc

import pytest
import torch

from gramophone.recipe import Optimiser
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server import main
from gramophone_server.config import Limits, Settings
from gramophone_server.domain.engine_api import Batch, BatchEngine
from gramophone_server.engine.engine import VggEngine
from gramophone_server.engine.fake import FakeBatch, FakeEngine
from gramophone_server.engine.optimisers import slot_layout
from tests.support.serving import events_of, serving
from tests.support.specs import job_state, spec

MAX_BYTES = 2**22


@pytest.fixture
def fast():
    return FakeEngine(0.0)


def through(engine, job, iterations=None):
    """Runs a job until ``iterations`` are done, or to its end. Returns its state and the picture of each iteration."""
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
def test_it_has_all_methods_of_the_protocol(protocol, made):
    methods = {name for name, value in vars(protocol).items() if not name.startswith("_") and callable(value)}
    assert methods <= set(dir(made))


def test_its_layers_are_those_of_vgg19(tiny_engine: VggEngine, fast):
    assert fast.layers == tiny_engine.layers


def test_a_job_goes_through_its_scales_and_all_its_pictures_differ(fast):
    job, pictures = through(fast, job_state(iterations=6, smallest_size=45, coarse_iterations=4))
    assert job.finished and job.done == 10
    assert [tuple(p.shape) for p in pictures] == [(22, 45, 3)] * 4 + [(32, 64, 3)] * 6
    assert len({p.numpy().tobytes() for p in pictures}) == 10 and all(p.dtype is torch.uint8 for p in pictures)


def test_a_picture_depends_only_on_seed_size_and_iteration(fast):
    alone, other = (through(fast, job_state(iterations=5))[1][-1] for _ in range(2))
    batch = fast.batch(job_state().shape, 4)
    mine, _ = (batch.join(job_state(iterations=n)) for n in (5, 9))
    batch.advance(5)
    assert torch.equal(alone, other) and torch.equal(batch.snapshot(mine)(), alone)


@pytest.mark.parametrize("optimiser", list(Optimiser))
@pytest.mark.parametrize("light", [True, False])
def test_a_job_continues_from_its_checkpoint_with_the_same_pictures(fast, light, optimiser):
    whole = through(fast, job_state(iterations=8, smallest_size=45, coarse_iterations=4, optimiser=optimiser))[1]
    job, before = through(fast, job_state(iterations=8, smallest_size=45, coarse_iterations=4, optimiser=optimiser), 7)
    written = fast.checkpoints.write(job, picture=before[-1] if light else None, max_bytes=MAX_BYTES)
    again = fast.checkpoints.read(written, max_bytes=MAX_BYTES).restore(job.job)
    assert torch.equal(fast.picture(again)(), before[-1])
    after = through(fast, again)[1]
    assert all(map(torch.equal, before + after, whole)) and len(before + after) == len(whole)


@pytest.mark.parametrize("optimiser", list(Optimiser))
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_it_and_the_real_engine_read_the_checkpoints_of_each_other(fast, optimiser, average):
    job, _ = through(fast, job_state(iterations=8, optimiser=optimiser, average=average), 7)
    written = fast.checkpoints.write(job, max_bytes=MAX_BYTES)
    assert written == VggEngine.checkpoints.write(job, max_bytes=MAX_BYTES)
    for engine in (fast, VggEngine):
        again = engine.checkpoints.read(written, max_bytes=MAX_BYTES).restore(job.job)
        assert again.done == 7 and torch.equal(again.tensors["image"], job.tensors["image"])


def test_its_tensors_have_the_shapes_and_types_of_the_real_engines(fast):
    job, _ = through(fast, job_state(), 2)
    expected = slot_layout(job.recipe, 32, 64)
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


def test_an_iteration_takes_the_same_time_for_any_number_of_jobs():
    slept = []
    batch = FakeEngine(0.01, sleep=slept.append).batch(job_state().shape, 8)
    for jobs in range(1, 9):
        batch.join(job_state(iterations=100))
        batch.advance(10)
        assert slept == [pytest.approx(0.1)] * jobs


def test_jobs_that_do_not_fit_are_refused(fast):
    batch = fast.batch(job_state().shape, 1)
    with pytest.raises(ValueError, match="has no job"):
        batch.advance()
    batch.join(job_state())
    for job in (job_state(), job_state(size=48)):
        with pytest.raises(ValueError, match="full or of another shape"):
            batch.join(job)
    with pytest.raises(ValueError, match="1 to 256 slots, got 257"):
        fast.batch(job_state().shape, 257)


async def test_a_server_with_it_logs_a_warning_and_serves_jobs(caplog):
    engine = main.load_engine(Settings(engine="fake", iter_ms=0.5))
    assert isinstance(engine, FakeEngine) and engine.iteration_s == 0.0005
    assert "every picture is a pattern, and an iteration takes 0.5 ms" in caplog.text
    engine.go = type("Always", (), {"set": staticmethod(lambda: None)})
    async with serving(engine, Limits()) as s:
        info = await s.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert "fake" in info.device and info.weights == "none"
        events = await events_of(s.stub.StylizeStream(pb.StylizeStreamRequest(spec=spec(iterations=12))))
    assert events[-1].result.iterations == 12


def test_objects_from_before_the_server_was_ready_are_not_garbage_collected_again():
    before = gc.get_freeze_count()
    try:
        assert isinstance(main.load_and_freeze(Settings(engine="fake")), FakeEngine)
        assert gc.get_freeze_count() > before + 10_000  # torch alone has more
    finally:
        gc.unfreeze()
