import inspect
import io

import pytest
from PIL import Image

from gramophone.recipe import LayerWeight, Recipe, Start
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import Checkpoint, FrameOptions, Style, errors
from gramophone_client.transport.job_spec import job_spec
from gramophone_client.types.options import JobOptions
from tests.support.fake_service import PAINTING, PHOTO, accepted, result


@pytest.mark.parametrize("kind", ["bytes", "str", "path", "pil"])
async def test_images_are_paths_bytes_or_pil_images(client, service, tmp_path, kind):
    path = tmp_path / "photo.png"
    path.write_bytes(PHOTO)
    given = {"bytes": PHOTO, "str": str(path), "path": path, "pil": Image.open(io.BytesIO(PHOTO))}[kind]
    await client.stylize(given, given)
    spec = service.specs[0]
    for data in (spec.content.data, spec.styles[0].image.data):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size, image.convert("RGB").getpixel((0, 0))) == ("PNG", (24, 18), (255, 0, 0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "F", "HSV", "I;16"])
def test_pil_images_of_every_mode_can_be_sent(mode):
    data = job_spec(Image.new(mode, (20, 16)), PAINTING).content.data
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (20, 16)


def test_pil_images_are_sent_upright():
    turned = Image.new("RGB", (20, 16))
    turned.getexif()[0x0112] = 6  # Orientation: a quarter turn
    with Image.open(io.BytesIO(job_spec(turned, PAINTING).content.data)) as image:
        assert image.size == (16, 20)


@pytest.mark.parametrize(
    ("styles", "weights"),
    [
        (PAINTING, [1]),
        (Style(PAINTING, 2), [2]),
        ([PAINTING], [1]),
        ([PAINTING, Style(PAINTING, 0.5)], [1, 0.5]),
        ((PAINTING, PAINTING), [1, 1]),
    ],
)
def test_styles_are_one_or_several(styles, weights):
    sent = job_spec(PHOTO, styles).styles
    assert [style.weight for style in sent] == weights
    assert all(style.image.data == PAINTING for style in sent)


def test_options_reach_the_request():
    spec = job_spec(
        PHOTO,
        PAINTING,
        frames=FrameOptions(every_iterations=5, min_interval_s=0.25, max_side=64, format="webp", quality=50),
        preset="textbook",
        seed=0,
        start_image=PAINTING,
        result_format="jpeg",
        result_quality=80,
        beta=5.0,
        style_layers=(LayerWeight("relu1_1", 2),),
    )
    assert spec.recipe == pb.Recipe(
        preset="PRESET_TEXTBOOK",
        beta=5,
        style_layers=pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1", weight=2)]),
        start="START_IMAGE",  # because an image to start from was given
    )
    assert spec.HasField("seed") and spec.seed == 0
    assert (spec.start_image.data, spec.result_format, spec.result_quality) == (PAINTING, pb.IMAGE_FORMAT_JPEG, 80)
    assert (spec.frames.every_iterations, spec.frames.min_interval.ToMilliseconds()) == (5, 250)
    assert (spec.frames.max_side, spec.frames.format, spec.frames.quality) == (64, pb.IMAGE_FORMAT_WEBP, 50)


def test_what_is_not_given_is_left_to_the_server():
    spec = job_spec(PHOTO, PAINTING)
    assert not spec.HasField("seed") and not spec.HasField("frames") and not spec.HasField("start_image")
    assert spec.recipe == pb.Recipe(preset="PRESET_FAST")
    assert job_spec(PHOTO, PAINTING, start_image=PHOTO, start=Start.NOISE).recipe.start == pb.START_NOISE


def test_the_options_of_a_job_are_the_keywords_of_its_spec():
    keywords = {name for name, p in inspect.signature(job_spec).parameters.items() if p.kind is p.KEYWORD_ONLY}
    fields = {field for field in JobOptions.__annotations__ if field not in Recipe.__annotations__}
    assert fields == keywords - {"frames", "checkpoints"}


# --- resuming from a checkpoint


@pytest.mark.parametrize("kind", ["bytes", "path", "checkpoint"])
async def test_a_checkpoint_is_bytes_a_file_or_an_update(client, service, tmp_path, kind):
    state = Checkpoint(4, True, b"state after 4")
    state.save(tmp_path / "job.checkpoint")
    given = {"bytes": state.data, "path": tmp_path / "job.checkpoint", "checkpoint": state}[kind]
    service.scripts = [[accepted(resumed_at=4), result()]]
    stylized = await client.stylize(PHOTO, PAINTING, resume=given, result_format="webp")
    assert stylized.job_id == "j1"
    assert (service.specs[0].resume, service.specs[0].HasField("recipe")) == (b"state after 4", False)


@pytest.mark.parametrize(
    "given", [{"beta": 2.0}, {"seed": 0}, {"start_image": PHOTO}, {"preset": "fast"}, {"alpha": 0.0, "step": 1.0}]
)
def test_a_checkpoint_brings_the_recipe(given):
    with pytest.raises(
        errors.InvalidRequestError, match="cannot be given with resume: the job continues with"
    ) as raised:
        job_spec(PHOTO, PAINTING, resume=b"state", **given)
    assert [violation.field for violation in raised.value.violations] == list(given)


def test_an_empty_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(errors.InvalidRequestError, match="empty is empty, and not a checkpoint"):
        job_spec(PHOTO, PAINTING, resume=tmp_path / "empty")
