import io
import math

import numpy as np
import pytest

from gramophone.recipe import LayerWeight, Optimiser, RecipeOverrides, Start, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import Checkpoint, CheckpointOptions, FrameOptions, Style, errors
from gramophone_client.transport.job_spec import image_bytes, job_request, job_spec, update_command, watch_request
from gramophone_client.types.options import OPTIONS, JobOptions
from gramophone_server.config import Limits
from gramophone_server.rpc.validation import check_spec
from tests.support.engines import FakeEngine
from tests.support.fake_service import PAINTING, PHOTO, accepted, result

IMAGE_FITS = (
    "must be an image: a path, the bytes of a file, an open binary file, a uint8 array, a PIL image or an upload"
)


def spec_of(content, styles, *, frames=None, checkpoints=None, **job):
    return job_spec(content, styles, job, frames=frames, checkpoints=checkpoints)


async def test_images_reach_the_request(client, service):
    await client.stylize(PHOTO, PAINTING, start_image=PHOTO)
    spec = service.specs[0]
    assert (spec.content.data, spec.styles[0].image.data, spec.start_image.data) == (PHOTO, PAINTING, PHOTO)


@pytest.mark.parametrize(
    ("styles", "weights"),
    [
        (PAINTING, [1]),
        (Style(PAINTING, 2), [2]),
        ([PAINTING], [1]),
        ([PAINTING, Style(PAINTING, 0.5)], [1, 0.5]),
        ((PAINTING, PAINTING), [1, 1]),
        ([(PAINTING, 2), (PAINTING, 0.5)], [2, 0.5]),
        ((PAINTING, 2), [2]),
        ((PAINTING, np.float32(0.5)), [0.5]),
        (bytearray(PAINTING), [1]),
        ([memoryview(PAINTING), bytearray(PAINTING)], [1, 1]),
        (io.BytesIO(PAINTING), [1]),
    ],
)
def test_styles_are_one_or_several(styles, weights):
    sent = spec_of(PHOTO, styles).styles
    assert [style.weight for style in sent] == weights
    assert all(style.image.data == PAINTING for style in sent)


def test_options_reach_the_request():
    spec = spec_of(
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
    spec = spec_of(PHOTO, PAINTING)
    assert not spec.HasField("seed") and not spec.HasField("frames") and not spec.HasField("start_image")
    assert spec.recipe == pb.Recipe(preset="PRESET_FAST")
    assert spec_of(PHOTO, PAINTING, start_image=PHOTO, start=Start.NOISE).recipe.start == pb.START_NOISE


def test_numbers_of_numpy_and_texts_of_choices_reach_the_request():
    spec = spec_of(
        PHOTO,
        PAINTING,
        frames=FrameOptions(every_iterations=np.int64(5), min_interval_s=np.float32(0.25), quality=np.uint8(50)),
        checkpoints=CheckpointOptions(every_s=np.float64(2.5)),
        seed=np.uint64(2**64 - 1),
        result_quality=np.int16(80),
        detach_grace=np.float32(1.5),
        beta=np.float32(2.5),
        size=np.int64(64),
        optimiser="adam",
        style_layers={"relu1_1": np.float32(2)},
    )
    assert spec == spec_of(
        PHOTO,
        PAINTING,
        frames=FrameOptions(every_iterations=5, min_interval_s=0.25, quality=50),
        checkpoints=CheckpointOptions(every_s=2.5),
        seed=2**64 - 1,
        result_quality=80,
        detach_grace=1.5,
        beta=2.5,
        size=64,
        optimiser=Optimiser.ADAM,
        style_layers=(LayerWeight("relu1_1", 2.0),),
    )


def test_the_options_of_a_job_are_the_recipe_and_those_with_a_help():
    assert JobOptions.__annotations__.keys() == RecipeOverrides.__annotations__.keys() | OPTIONS.keys()
    assert spec_of(PHOTO, PAINTING, **{name: option.default for name, option in OPTIONS.items()}) == spec_of(
        PHOTO, PAINTING
    )


# --- values that do not fit


async def test_frames_are_no_option_of_a_call_that_returns_only_the_result(client, service):
    with pytest.raises(errors.InvalidRequestError, match=r"^frames: is not an option of this method$"):
        await client.stylize(PHOTO, PAINTING, frames=FrameOptions())
    assert service.specs == []


BAD = [
    ("sise", 3, "sise", "is not an option of a job; did you mean size?"),
    ("lr", 0.1, "lr", "is not an option of a job; did you mean step?"),
    ("init_image", PHOTO, "init_image", "is not an option of a job; did you mean start_image?"),
    ("timout", 3, "timout", "is not an option of a job; did you mean timeout?"),
    ("size", "big", "spec.recipe.size", "must be a whole number, got 'big'"),
    ("size", 10**12, "spec.recipe.size", "must be between 16 and 16384, got 1e+12"),
    (
        "optimiser",
        "adma",
        "spec.recipe.optimiser",
        "must be one of gradient-descent, normalised-descent, adam, lbfgs, got 'adma'; did you mean adam?",
    ),
    ("style_layers", {"relu1_1": -1}, "spec.recipe.style_layers[0].weight", "must be between 0 and 1e+06, got -1"),
    ("preset", "fsat", "spec.recipe.preset", "must be one of fast, quality, textbook, got 'fsat'; did you mean fast?"),
    ("preset", "", "spec.recipe.preset", "must be one of fast, quality, textbook, got ''"),
    ("seed", -1, "spec.seed", "must be a whole number from 0 to 2**64-1, got -1"),
    ("seed", 2**64, "spec.seed", "must be a whole number from 0 to 2**64-1, got 18446744073709551616"),
    ("seed", True, "spec.seed", "must be a whole number, got True"),
    ("result_format", "jpg", "spec.result_format", "must be one of jpeg, png, webp, got 'jpg'; did you mean jpeg?"),
    ("result_format", None, "spec.result_format", "must be one of jpeg, png, webp, got None"),
    ("result_quality", 2**40, "spec.result_quality", "must be 1 to 100, got 1.09951e+12"),
    ("detach_grace", math.nan, "spec.detach_grace", "must be 0 to 3.15576e+11 seconds, got nan"),
    ("detach_grace", 1e300, "spec.detach_grace", "must be 0 to 3.15576e+11 seconds, got 1e+300"),
    ("detach_grace", "10", "spec.detach_grace", "must be a number, got '10'"),
    ("start_image", 3, "spec.start_image.data", f"{IMAGE_FITS}, got 3"),
    ("frames", True, "spec.frames", "must be FrameOptions or None, got True"),
    ("checkpoints", {"light": True}, "spec.checkpoints", "must be CheckpointOptions or None, got a dict of 1"),
]


@pytest.mark.parametrize(("option", "value", "path", "description"), BAD)
def test_a_wrong_value_is_named_with_what_fits(option, value, path, description):
    with pytest.raises(errors.InvalidRequestError) as raised:
        spec_of(PHOTO, PAINTING, **{option: value})
    assert str(raised.value) == f"{path.rpartition('recipe.')[2] if 'recipe' in path else option}: {description}"
    assert raised.value.violations == (Violation(path, description),)


@pytest.mark.parametrize(
    ("options", "argument", "path", "description"),
    [
        (FrameOptions(every_iterations=-1), "every_iterations", "every_iterations", "from 0 to 2147483647, got -1"),
        (FrameOptions(every_iterations=2.0), "every_iterations", "every_iterations", "a whole number, got 2.0"),
        (FrameOptions(min_interval_s=3601), "min_interval_s", "min_interval", "must be 0 to 3600 seconds, got 3601"),
        (FrameOptions(max_side=8), "max_side", "max_side", "must be 16 to 16384, or 0, got 8"),
        (FrameOptions(max_side=False), "max_side", "max_side", "must be a whole number, got False"),
        (FrameOptions(format="jpg"), "format", "format", "got 'jpg'; did you mean jpeg?"),
        (FrameOptions(quality=0), "quality", "quality", "must be 1 to 100, got 0"),
        (FrameOptions(max_in_flight=17), "max_in_flight", "max_in_flight", "must be 0 to 16, got 17"),
        (CheckpointOptions(every_s=-1), "every_s", "min_interval", "must be 0 to 3600 seconds, got -1"),
        (CheckpointOptions(light="no"), "light", "light", "must be True or False, got 'no'"),
        (CheckpointOptions(every_s=None), "every_s", "min_interval", "must be a number, got None"),
    ],
)
def test_a_wrong_value_of_options_is_named_with_what_fits(options, argument, path, description):
    kind = "frames" if isinstance(options, FrameOptions) else "checkpoints"
    given = {"frames": None, "checkpoints": None} | {kind: options}
    for prefix, make in (("spec.", lambda: spec_of(PHOTO, PAINTING, **given)), ("", lambda: watch("j1", **given))):
        with pytest.raises(errors.InvalidRequestError) as raised:
            make()
        (violation,) = raised.value.violations
        assert str(raised.value) == f"{kind}.{argument}: {violation.description}"
        assert violation.field == f"{prefix}{kind}.{path}" and violation.description.endswith(description)


# The same wrong value as an argument, and as a message of a client without these checks.
WRONG_IN_BOTH = {
    "spec.recipe.preset": ({"preset": "best"}, lambda s: setattr(s.recipe, "preset", 99)),
    "spec.recipe.size": ({"size": 8}, lambda s: setattr(s.recipe, "size", 8)),
    "spec.recipe.beta": ({"beta": -1}, lambda s: setattr(s.recipe, "beta", -1)),
    "spec.recipe.optimiser": ({"optimiser": "sgd"}, lambda s: setattr(s.recipe, "optimiser", 99)),
    "spec.recipe.style_layers[0].weight": (
        {"style_layers": {"relu1_1": -1}},
        lambda s: s.recipe.style_layers.layers.add(layer="relu1_1", weight=-1),
    ),
    "spec.recipe.content_layers": ({"content_layers": []}, lambda s: s.recipe.content_layers.SetInParent()),
    "spec.styles[0].weight": ({"styles": Style(PAINTING, 0)}, lambda s: setattr(s.styles[0], "weight", 0)),
    "spec.styles": ({"styles": []}, lambda s: s.ClearField("styles")),
    "spec.frames.every_iterations": (
        {"frames": FrameOptions(every_iterations=-1)},
        lambda s: setattr(s.frames, "every_iterations", -1),
    ),
    "spec.frames.min_interval": (
        {"frames": FrameOptions(min_interval_s=3601)},
        lambda s: setattr(s.frames.min_interval, "seconds", 3601),
    ),
    "spec.frames.max_side": ({"frames": FrameOptions(max_side=8)}, lambda s: setattr(s.frames, "max_side", 8)),
    "spec.frames.format": ({"frames": FrameOptions(format="gif")}, lambda s: setattr(s.frames, "format", 99)),
    "spec.frames.quality": ({"frames": FrameOptions(quality=101)}, lambda s: setattr(s.frames, "quality", 101)),
    "spec.frames.max_in_flight": (
        {"frames": FrameOptions(max_in_flight=17)},
        lambda s: setattr(s.frames, "max_in_flight", 17),
    ),
    "spec.checkpoints.min_interval": (
        {"checkpoints": CheckpointOptions(every_s=3601)},
        lambda s: setattr(s.checkpoints.min_interval, "seconds", 3601),
    ),
    "spec.detach_grace": ({"detach_grace": -1}, lambda s: setattr(s.detach_grace, "seconds", -1)),
    "spec.result_format": ({"result_format": "gif"}, lambda s: setattr(s, "result_format", 99)),
    "spec.result_quality": ({"result_quality": 101}, lambda s: setattr(s, "result_quality", 101)),
}


@pytest.mark.parametrize("path", WRONG_IN_BOTH)
def test_paths_are_those_of_the_server(path):
    wrong, spoil = WRONG_IN_BOTH[path]
    spec = spec_of(PHOTO, PAINTING)
    spoil(spec)
    assert [violation.field for violation in check_spec(spec, Limits(), FakeEngine.layers)][:1] == [path]
    with pytest.raises(errors.InvalidRequestError) as raised:
        spec_of(PHOTO, **{"styles": PAINTING} | wrong)
    assert [violation.field for violation in raised.value.violations] == [path]


def watch(job_id, after_sequence=0, **options):
    return watch_request(job_id, after_sequence, **options)


def test_a_job_is_watched_by_its_id():
    with pytest.raises(errors.InvalidRequestError, match="job_id: must be a job's id, got None; after_sequence: must"):
        watch(None, 1.5, frames=None, checkpoints=None)


@pytest.mark.parametrize("kind", [pb.GetJobRequest, pb.CancelJobRequest])
def test_a_job_is_named_by_its_id(kind):
    assert job_request(kind(), "j1") == kind(job_id="j1")
    with pytest.raises(errors.InvalidRequestError, match="job_id: must be a job's id, got 7") as raised:
        job_request(kind(), 7)
    assert [violation.field for violation in raised.value.violations] == ["job_id"]


@pytest.mark.parametrize(
    ("styles", "argument", "path", "description"),
    [
        (None, "styles", "spec.styles[0].image.data", f"{IMAGE_FITS}, got None"),
        ([], "styles", "spec.styles", "must be one style image or several, got an empty list"),
        ((PAINTING for _ in range(2)), "styles", "spec.styles", "got a generator; write list(...)"),
        ([PAINTING, 3], "styles[1]", "spec.styles[1].image.data", f"{IMAGE_FITS}, got 3"),
        ([PAINTING, [PAINTING]], "styles[1]", "spec.styles[1].image.data", "got a list of 1; give one image"),
        (
            [(PAINTING, 0)],
            "styles[0].weight",
            "spec.styles[0].weight",
            "above 0 and at most 1000, got 0; leave",
        ),
        (Style(PAINTING, "1"), "styles.weight", "spec.styles[0].weight", "must be a number, got '1'"),
        (Style(PAINTING, math.nan), "styles.weight", "spec.styles[0].weight", "got nan; leave a style out"),
    ],
)
def test_a_wrong_style_is_named_with_what_fits(styles, argument, path, description):
    with pytest.raises(errors.InvalidRequestError) as raised:
        spec_of(PHOTO, styles)
    (violation,) = raised.value.violations
    assert str(raised.value) == f"{argument}: {violation.description}"
    assert violation.field == path and description in violation.description


def test_everything_that_is_wrong_is_named_at_once_and_no_file_is_read():
    file = io.BytesIO(PAINTING)
    wrong = {option: value for option, value, *_ in BAD if option not in ("frames", "checkpoints")}
    with pytest.raises(errors.InvalidRequestError) as raised:
        spec_of(None, [file, 3], frames=FrameOptions(quality=101, max_side=-1), **wrong)
    paths = {violation.field for violation in raised.value.violations}
    assert paths >= {"spec.content.data", "spec.styles[1].image.data", "spec.frames.quality", "spec.frames.max_side"}
    assert len(paths) == len(raised.value.violations) == len(wrong) + 4
    assert file.tell() == 0


def test_all_files_without_contents_are_named_at_once(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(errors.InvalidRequestError) as raised:
        spec_of(tmp_path / "empty.png", [PAINTING, io.BytesIO()])
    assert [violation.field for violation in raised.value.violations] == [
        "spec.content.data",
        "spec.styles[1].image.data",
    ]


def test_changes_have_the_forms_of_options():
    command = update_command({"beta": np.float32(2), "iterations": np.int64(7), "style_layers": {"relu1_1": 2}})
    assert command == pb.UpdateCommand(
        beta=2, iterations=7, style_layers=pb.LayerWeights(layers=[pb.LayerWeight(layer="relu1_1", weight=2)])
    )


def test_wrong_changes_are_named_at_once():
    with pytest.raises(errors.InvalidRequestError) as raised:
        update_command({"size": 64, "style_weight": 2, "beta": -1, "iterations": "many", "style_layers": ["a", 3]})
    assert raised.value.violations == (
        Violation(
            "update.size",
            "cannot be changed while a job runs; "
            "alpha, beta, tv_weight, step, content_layers, style_layers, iterations can",
        ),
        Violation("update.style_weight", "cannot be changed while a job runs; did you mean beta?"),
        Violation("update.beta", "must be between 0 and 1e+15, got -1"),
        Violation("update.iterations", "must be a whole number, got 'many'"),
        Violation("update.style_layers[1]", 'must be the name of a layer or a pair like ("relu1_1", 1.0), got 3'),
    )


def test_an_image_to_upload_is_named():
    with pytest.raises(errors.InvalidRequestError, match=f"^image: {IMAGE_FITS}, got None$"):
        image_bytes(None)


# --- resuming from a checkpoint


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "path", "file", "checkpoint"])
async def test_a_checkpoint_is_bytes_a_file_or_an_update(client, service, tmp_path, kind):
    state = Checkpoint(4, True, b"state after 4")
    state.save(tmp_path / "job.checkpoint")
    forms = {"bytearray": bytearray(state.data), "file": io.BytesIO(state.data)}
    given = forms | {"bytes": state.data, "path": tmp_path / "job.checkpoint", "checkpoint": state}
    service.scripts = [[accepted(resumed_at=4), result()]]
    stylized = await client.stylize(PHOTO, PAINTING, resume=given[kind], result_format="webp")
    assert stylized.job_id == "j1"
    assert (service.specs[0].resume, service.specs[0].HasField("recipe")) == (b"state after 4", False)


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 2.0},
        {"seed": 0},
        {"start_image": PHOTO},
        {"preset": "fast"},
        {"alpha": 0.0, "step": 1.0},
        {"beta": None},
    ],
)
def test_a_checkpoint_brings_the_recipe(given):
    with pytest.raises(
        errors.InvalidRequestError, match="cannot be given with resume: the job continues with"
    ) as raised:
        spec_of(PHOTO, PAINTING, resume=b"state", **given)
    paths = {"seed": "spec.seed", "start_image": "spec.start_image"}
    expected = [paths.get(name, f"spec.recipe.{name}") for name in given]
    assert [violation.field for violation in raised.value.violations] == expected


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    for resume, problem in (
        (tmp_path / "empty", "got the empty file .*empty"),
        (3, "a Checkpoint, its bytes or a file"),
    ):
        with pytest.raises(errors.InvalidRequestError, match=f"resume: must be .*{problem}") as raised:
            spec_of(PHOTO, PAINTING, resume=resume)
        assert [violation.field for violation in raised.value.violations] == ["spec.resume"]


def test_two_arrays_are_two_styles_and_an_array_with_a_number_is_one():
    array = np.zeros((16, 16, 3), np.uint8)
    assert len(job_spec(PHOTO, (array, array), {}).styles) == 2
    assert [style.weight for style in job_spec(PHOTO, (array, np.array(2.0)), {}).styles] == [2]
