"""Jobs that resume from a checkpoint, sent with the request or uploaded before."""

import io
import threading

import grpc
import pytest
import torch
from PIL import Image

from gramophone.recipe import Optimiser, Recipe
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_to_message
from gramophone_server.config import Limits
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.engine.engine import VggEngine
from gramophone_server.images import codec
from gramophone_server.network.precision import MODES
from gramophone_server.scheduling.reservation import Reservation
from tests.support.engines import CHECKPOINTS, FakeEngine
from tests.support.pictures import make_picture, png
from tests.support.serving import refused, serving
from tests.support.specs import spec

MAX_BYTES = 2**26
RESERVATION = Reservation(1)
LATER = 10.0**9  # s on the monotonic clock


def state_after(engine, wanted, iterations):
    """The state of a request's job after this many iterations."""
    recipe = Recipe(size=64, smallest_size=45, coarse_iterations=4, iterations=6)
    decode = [codec.decode(source.data, Limits(), 64) for source in (wanted.content, wanted.styles[0].image)]
    state = engine.admit(
        StyleJob(recipe=recipe, content=decode[0], styles=(decode[1],), style_weights=(1.0,), start=None, seed=5)
    )
    advance_to(engine, state, iterations)
    return state


def advance_to(engine, state, iterations):
    """Iterates until the job has done this many iterations."""
    while state.done < iterations:
        batch = engine.batch(state.shape, 1)
        slot = batch.join(state)
        batch.advance(iterations - state.done)
        batch.leave(slot)
        batch.close()


def written(state, light=False):
    # A fake batch has no state of the optimiser; `write` writes zeros for it.
    picture = FakeEngine().picture(state)() if light else None
    return CHECKPOINTS.write(state, picture=picture, max_bytes=MAX_BYTES)


def resumed(data):
    wanted = spec()
    wanted.ClearField("recipe")
    wanted.resume = data
    return wanted


@pytest.mark.parametrize("light", [False, True])
async def test_a_job_resumes_where_its_checkpoint_was_taken(light):
    engine = FakeEngine()
    state = state_after(engine, spec(), 7)
    async with serving(engine) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=resumed(written(state, light=light))))
        accepted = response.accepted
        assert (accepted.resumed_at, accepted.iterations, accepted.seed) == (7, 10, 5)
        assert accepted.recipe == recipe_to_message(state.recipe)
        assert (accepted.width, accepted.height) == (64, 32)
        assert response.result.iterations == 10
        with Image.open(io.BytesIO(response.result.image.data)) as image:
            assert image.getpixel((0, 0)) == (10, 10, 10)
        plain = await s.stub.Stylize(pb.StylizeRequest(spec=spec()))
        assert plain.accepted.resumed_at == 0


async def uploaded(s, data):
    chunks = [pb.UploadImageRequest(chunk=data[at : at + 2**20]) for at in range(0, len(data), 2**20)]
    return await s.stub.UploadImage(iter(chunks))


def resumed_by_digest(digest):
    wanted = resumed(b"")
    wanted.ClearField("resume")
    wanted.resume_digest = digest
    return wanted


@pytest.mark.parametrize("light", [False, True])
async def test_a_job_resumes_from_an_uploaded_checkpoint(light):
    engine = FakeEngine()
    data = written(state_after(engine, spec(), 7), light=light)
    async with serving(engine, Limits(max_image_bytes=1024)) as s:  # images have another limit
        stored = await uploaded(s, data)
        assert (stored.width, stored.height) == (64, 32)
        inline, by_digest = [
            await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
            for wanted in (resumed(data), resumed_by_digest(stored.digest))
        ]
    assert inline.accepted.resumed_at == by_digest.accepted.resumed_at == 7
    assert inline.accepted.seed == by_digest.accepted.seed == 5
    assert inline.result.image == by_digest.result.image


async def test_everything_that_is_missing_is_named_at_once():
    engine = FakeEngine()
    data = written(state_after(engine, spec(), 7))
    first, second, checkpoint = (f"sha256:{letter * 64}" for letter in "abc")
    wanted = resumed_by_digest(checkpoint)
    wanted.content.digest = wanted.styles[0].image.digest = first
    wanted.styles.add().image.digest = second
    async with serving(engine) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        assert got.code is grpc.StatusCode.NOT_FOUND
        assert got.ErrorInfo.metadata["digests"].split(",") == [first, second, checkpoint]
        assert got.message == (
            f"this server keeps no image '{first}' and 1 more and no checkpoint '{checkpoint}'; "
            "upload them with UploadImage, and send the job again"
        )
        wanted.resume_digest = (await uploaded(s, data)).digest
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        assert got.ErrorInfo.metadata["digests"].split(",") == [first, second]
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=resumed_by_digest(checkpoint))))
        assert got.ErrorInfo.metadata["digests"] == checkpoint
        assert got.message.startswith(f"this server keeps no checkpoint '{checkpoint}'; upload it with UploadImage")


async def test_a_server_that_keeps_no_uploads_does_not_ask_for_one():
    wanted = spec()
    wanted.content.digest = digest = "sha256:" + "a" * 64
    async with serving(FakeEngine(), Limits(max_uploads_bytes=0)) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    assert got.message == (
        f"this server keeps no image '{digest}'; it keeps no uploads, so send it with the job, as `data` or `resume`"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "makes a checkpoint that is cut off or damaged: "),
        (lambda data: data[:9], "makes a checkpoint that is cut off or damaged: its header does not fit"),
        (lambda data: data[:7] + b"\x02" + data[8:], "makes a checkpoint that has version 02, this server reads"),
    ],
)
async def test_a_damaged_checkpoint_is_refused_when_it_is_uploaded(change, words):
    engine = FakeEngine()
    data = change(written(state_after(engine, spec(), 7)))
    async with serving(engine) as s:
        got = await refused(uploaded(s, data))
        assert s.servicer.uploads.counts.bytes == 0
    (violation,) = got.BadRequest.field_violations
    assert violation.field == "chunk" and violation.description.startswith(words)


async def test_a_checkpoint_above_its_limit_is_refused_while_it_arrives():
    engine = FakeEngine()
    data = written(state_after(engine, spec(), 7))
    async with serving(engine, Limits(max_checkpoint_bytes=65536)) as s:
        got = await refused(uploaded(s, data))
    assert "makes a checkpoint of" in got.message and "at most 65536 are allowed" in got.message


async def test_uploads_of_the_other_kind_are_refused_by_name():
    engine = FakeEngine()
    data = written(state_after(engine, spec(), 7))
    async with serving(engine) as s:
        checkpoint, image = (await uploaded(s, data)).digest, (await uploaded(s, png())).digest
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=resumed_by_digest(image))))
        assert got.message == "spec.resume_digest: is not a checkpoint"
        wanted = spec()
        wanted.content.digest = checkpoint
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        assert got.message.startswith("spec.content.digest: must be a JPEG, PNG or WebP image")
        wanted = resumed_by_digest(checkpoint)
        wanted.content.data = png(64, 33)
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        assert got.message == "spec.resume_digest: is of a job with other images"


async def test_a_queued_resumed_job_has_the_iteration_of_its_checkpoint():
    engine = FakeEngine()
    data = written(state_after(engine, spec(), 7))
    engine.go.clear()
    async with serving(engine) as s:
        call = s.stub.StylizeStream(pb.StylizeStreamRequest(spec=resumed(data)))
        job_id = (await call.read()).event.accepted.job_id
        job = (await s.stub.GetJob(pb.GetJobRequest(job_id=job_id))).job
        assert (job.iteration, job.iterations) == (7, 10)
        call.cancel()


async def test_updates_of_the_recipe_are_in_the_checkpoint():
    engine = FakeEngine()
    state = state_after(engine, spec(), 7)
    state.update(beta=9.0, iterations=16)
    async with serving(engine) as s:
        response = await s.stub.Stylize(pb.StylizeRequest(spec=resumed(written(state))))
    assert (response.accepted.recipe.beta, response.accepted.recipe.iterations) == (9.0, 16)
    assert (response.accepted.iterations, response.result.iterations) == (20, 20)


async def test_an_invalid_checkpoint_is_refused_after_all_other_violations():
    """It is read last, because it may have 64 MiB."""
    engine = FakeEngine()
    data = written(state_after(engine, spec(), 7))
    other_images = resumed(data)
    other_images.content.data = png(64, 33)
    wrong = resumed(b"x")
    wrong.seed = 3
    wrong.content.data = b"GIF89a"
    async with serving(engine, Limits(max_size=50, max_iterations=9)) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wrong)))
        reported = [(violation.field, violation.description) for violation in got.BadRequest.field_violations]
        assert [field for field, _ in reported] == ["spec.seed", "spec.content.data"]
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=resumed(b"x"))))
        assert got.message == "spec.resume: is not a checkpoint"
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=resumed(data))))
        reported = [(violation.field, violation.description) for violation in got.BadRequest.field_violations]
        assert reported == [
            (
                "spec.resume",
                "has a recipe whose size must be at most 50 pixels (server setting GRAMOPHONE_MAX_SIZE), got 64",
            ),
            (
                "spec.resume",
                "has a recipe whose iterations and coarse_iterations make 10 over 2 scales; at most 9 are allowed "
                + "(server setting GRAMOPHONE_MAX_ITERATIONS)",
            ),
        ]
        assert s.scheduler.queued == 0
    async with serving(engine) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=other_images)))
        assert got.message == "spec.resume: is of a job with other images"
    async with serving(engine, Limits(max_checkpoint_bytes=65536)) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=resumed(data))))
        assert got.message == f"spec.resume: has {len(data)} bytes, at most 65536 are allowed"


async def test_a_checkpoint_of_a_finished_job_is_refused():
    engine = FakeEngine()
    async with serving(engine) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=resumed(written(state_after(engine, spec(), 10))))))
    assert got.message == (
        "spec.resume: is of a job that has done all of its 10 iterations, so there is nothing to resume; "
        "its picture is the result"
    )


async def test_the_remaining_time_is_estimated_from_the_checkpoint(admission):
    engine = FakeEngine()
    state = state_after(engine, spec(), 7)
    await admission.prepare(resumed(written(state)), RESERVATION, LATER)
    assert (
        [asked[2].pixel_iterations_left for asked in admission.asked if asked[0] == "time"]
        == [state.pixel_iterations_left]
        == [3 * 64 * 32]
    )


class Painter(VggEngine):
    """The real engine, with the event of the fake one that `serving` sets."""

    go = threading.Event()


def encoded(picture):
    out = io.BytesIO()
    Image.frombytes("RGB", picture.shape[:0:-1], bytes(picture.permute(1, 2, 0).flatten().tolist())).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("at", [2, 4, 7], ids=["first scale", "between scales", "last scale"])
@pytest.mark.parametrize(
    ("optimiser", "average", "start"),
    [(Optimiser.LBFGS, 0.0, "content"), (Optimiser.ADAM, 0.9, "noise"), (Optimiser.LBFGS, 0.5, "image")],
)
async def test_a_stopped_and_resumed_job_has_the_same_result(tiny_vgg, optimiser, average, start, at):
    content, style, start_image = (
        make_picture(seed, *size) for seed, size in ((1, (40, 48)), (2, (36, 36)), (3, (30, 36)))
    )
    recipe = Recipe(
        size=48, smallest_size=34, coarse_iterations=4, iterations=6, optimiser=optimiser, average=average, start=start
    )
    wanted = pb.JobSpec(
        content=pb.ImageSource(data=encoded(content)),
        styles=[pb.StyleSource(image=pb.ImageSource(data=encoded(style)))],
    )
    whole, rest = pb.JobSpec(), pb.JobSpec()
    whole.CopyFrom(wanted)
    whole.recipe.CopyFrom(recipe_to_message(recipe))
    whole.seed = 11
    if start == "image":
        whole.start_image.data = encoded(start_image)
    engine = Painter(tiny_vgg, torch.device("cpu"), MODES["fp32"])
    job = StyleJob(
        recipe=recipe,
        content=content,
        styles=(style,),
        style_weights=(1.0,),
        start=start_image if start == "image" else None,
        seed=11,
    )
    half = JobState(job)
    advance_to(engine, half, at)
    rest.CopyFrom(wanted)
    rest.resume = written(half)
    async with serving(engine) as s:
        first = await s.stub.Stylize(pb.StylizeRequest(spec=whole))
        events = [r.event async for r in s.stub.StylizeStream(pb.StylizeStreamRequest(spec=rest))]
    assert (events[0].accepted.resumed_at, events[0].accepted.iterations) == (at, 10)
    result = events[-1].result
    assert result.iterations == first.result.iterations == 10
    assert result.image.data == first.result.image.data
    assert result.losses == first.result.losses


async def test_a_job_resumes_from_a_checkpoint_sent_over_the_wire(tiny_vgg):
    images = {"content": encoded(make_picture(1)), "style": encoded(make_picture(2, 36, 36))}
    wanted = pb.JobSpec(
        content=pb.ImageSource(data=images["content"]),
        styles=[pb.StyleSource(image=pb.ImageSource(data=images["style"]))],
        recipe=recipe_to_message(Recipe(size=48, smallest_size=0, iterations=400, start="noise")),
        seed=3,
    )
    async with serving(Painter(tiny_vgg, torch.device("cpu"), MODES["fp32"])) as s:
        call = s.stub.StylizeInteractive()
        await call.write(pb.StylizeInteractiveRequest(start=pb.StartCommand(spec=wanted)))
        while not (await call.read()).event.HasField("progress"):
            pass
        for command in (
            {"pause": pb.PauseCommand()},
            {"checkpoint": pb.CheckpointCommand()},
        ):
            await call.write(pb.StylizeInteractiveRequest(**command))
        while not (response := await call.read()).event.HasField("checkpoint"):
            assert not response.event.HasField("result")
        saved = response.event.checkpoint
        call.cancel()
        assert 0 < saved.iteration < 400 and not saved.light
        whole = await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        for name in ("recipe", "seed"):
            wanted.ClearField(name)
        wanted.resume = saved.data
        rest = await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
    assert rest.accepted.resumed_at == saved.iteration
    assert rest.result.image.data == whole.result.image.data
