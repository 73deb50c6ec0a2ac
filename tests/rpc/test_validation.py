"""Invalid requests and their violations."""

import grpc
import pytest
from google.protobuf import duration_pb2

from gramophone.recipe import Start
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import overrides_to_message
from gramophone_server.config import Limits
from gramophone_server.rpc.validation import check_spec
from tests.support.engines import FakeEngine
from tests.support.pictures import png
from tests.support.serving import (
    refused,
    serving,
)
from tests.support.specs import spec

DIGEST = "sha256:" + "0" * 64
NAN = float("nan")


def violations(change, limits=None):
    wanted = spec()
    change(wanted)
    return list(check_spec(wanted, limits or Limits(max_size=1024, max_iterations=500), FakeEngine.layers))


def set_recipe(**values):
    return lambda s: s.recipe.MergeFrom(overrides_to_message(values))


def set_layers(*layers, which="style_layers"):
    return lambda s: getattr(s.recipe, which).layers.extend(pb.LayerWeight(layer=l, weight=w) for l, w in layers)


CASES = {
    "no content": (lambda s: s.ClearField("content"), "spec.content", "is missing"),
    "no styles": (
        lambda s: s.ClearField("styles"),
        "spec.styles",
        "must have 1 to 4 images (server setting GRAMOPHONE_MAX",
    ),
    "five styles": (lambda s: s.styles.extend([s.styles[0]] * 4), "spec.styles", "must have 1 to 4 images (server"),
    "content digest": (
        lambda s: setattr(s.content, "digest", "sha256:" + "F" * 64),
        "spec.content.digest",
        "must be 'sha256:' and 64 lower-case hexadecimal digits, from UploadImage, got 'sha256:FFF",
    ),
    "empty digest": (lambda s: setattr(s.content, "digest", ""), "spec.content.digest", "got ''"),
    "style digest": (lambda s: setattr(s.styles[0].image, "digest", "x"), "spec.styles[0].image.digest", "got 'x'"),
    "start digest": (
        lambda s: (setattr(s.recipe, "start", pb.START_IMAGE), setattr(s.start_image, "digest", "sha256:")),
        "spec.start_image.digest",
        "got 'sha256:'",
    ),
    "resume and a recipe": (lambda s: setattr(s, "resume", b"x"), "spec.recipe", "must be unset with `resume`"),
    "resume and a seed": (
        lambda s: (s.ClearField("recipe"), setattr(s, "resume", b"x"), setattr(s, "seed", 0)),
        "spec.seed",
        "must be unset with `resume`, because the checkpoint contains it",
    ),
    "resume and a start image": (
        lambda s: (s.ClearField("recipe"), setattr(s, "resume", b"x"), setattr(s.start_image, "data", b"x")),
        "spec.start_image",
        "must be unset with `resume`",
    ),
    "resume twice": (
        lambda s: (s.ClearField("recipe"), setattr(s, "resume", b"x"), setattr(s, "resume_digest", DIGEST)),
        "spec.resume_digest",
        "must be unset with `resume`",
    ),
    "resume by digest and a recipe": (
        lambda s: setattr(s, "resume_digest", DIGEST),
        "spec.recipe",
        "must be unset with `resume_digest`, because the checkpoint contains it",
    ),
    "resume digest": (
        lambda s: (s.ClearField("recipe"), setattr(s, "resume_digest", "x")),
        "spec.resume_digest",
        "must be 'sha256:' and 64 lower-case hexadecimal digits, from UploadImage, got 'x'",
    ),
    "empty style": (lambda s: s.styles.add(), "spec.styles[1].image", "is missing"),
    "no weight": (
        lambda s: setattr(s.styles[0], "weight", 0),
        "spec.styles[0].weight",
        "above 0 and at most 1000, got 0;",
    ),
    "NaN weight": (lambda s: setattr(s.styles[0], "weight", NAN), "spec.styles[0].weight", "got nan"),
    "large weight": (lambda s: setattr(s.styles[0], "weight", 1001), "spec.styles[0].weight", "got 1001"),
    "negative beta": (set_recipe(beta=-1.0), "spec.recipe.beta", "must be between 0 and 1e+15, got -1"),
    "NaN alpha": (set_recipe(alpha=NAN), "spec.recipe.alpha", "must be between 0 and 1e+15, got nan"),
    "nothing to do": (set_recipe(alpha=0.0, beta=0.0), "spec.recipe.beta", "there is nothing to optimise"),
    "no iterations": (set_recipe(iterations=0), "spec.recipe.iterations", "must be between 1 and 100000, got 0"),
    "unknown preset": (lambda s: setattr(s.recipe, "preset", 99), "spec.recipe.preset", "is an unknown value 99"),
    "unknown start": (lambda s: setattr(s.recipe, "start", 99), "spec.recipe.start", "is an unknown value 99"),
    "unknown layer": (
        set_layers(("relu4_1", 1), ("relu41", 1)),
        "spec.recipe.style_layers[1].layer",
        "'relu41' is not a layer of this network; did you mean 'relu4_1'? GetServerInfo (`gramophone info`) lists",
    ),
    "layer weight": (
        set_layers(("relu4_2", -1), which="content_layers"),
        "spec.recipe.content_layers[0].weight",
        "must be between 0 and 1e+06, got -1",
    ),
    "size": (
        set_recipe(size=1025),
        "spec.recipe.size",
        "at most 1024 pixels (server setting GRAMOPHONE_MAX_SIZE), got 1025",
    ),
    "style size": (
        set_recipe(size=600, style_scale=2.0),
        "spec.recipe.style_scale",
        "makes style images of 1200 pixels",
    ),
    "too long": (
        set_recipe(size=512, iterations=400, coarse_iterations=50, smallest_size=128),
        "spec.recipe.iterations",
        (
            "and coarse_iterations make 600 over 5 scales; at most 500 are allowed "
            "(server setting GRAMOPHONE_MAX_ITERATIONS)"
        ),
    ),
    "no start image": (
        lambda s: setattr(s.recipe, "start", pb.START_IMAGE),
        "spec.start_image",
        "send the image that START_IMAGE needs as `data`, or name it by the `digest` of UploadImage",
    ),
    "a start image": (lambda s: setattr(s.start_image, "data", b"x"), "spec.start_image", "is only for START_IMAGE"),
    "every -1": (
        lambda s: setattr(s.frames, "every_iterations", -1),
        "spec.frames.every_iterations",
        "0 or more, got -1",
    ),
    "interval": (
        lambda s: s.frames.min_interval.CopyFrom(duration_pb2.Duration(seconds=3601)),
        "spec.frames.min_interval",
        "must be 0 to 3600 seconds, got 3601",
    ),
    "frame side": (lambda s: setattr(s.frames, "max_side", 8), "spec.frames.max_side", "must be 16 to 16384, got 8"),
    "frame format": (lambda s: setattr(s.frames, "format", 9), "spec.frames.format", "is an unknown value 9"),
    "frame quality": (
        lambda s: setattr(s.frames, "quality", 101),
        "spec.frames.quality",
        "must be 1 to 100, or 0 for the default, got 101",
    ),
    "result format": (lambda s: setattr(s, "result_format", 9), "spec.result_format", "is an unknown value 9"),
    "result quality": (
        lambda s: setattr(s, "result_quality", -1),
        "spec.result_quality",
        "must be 1 to 100, or 0 for the default, got -1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_invalid_field_is_named(case):
    change, field, words = CASES[case]
    (violation,) = violations(change)
    assert violation.field == field
    assert words in violation.description


def test_a_valid_request_has_no_violations():
    assert violations(lambda s: None) == []
    assert violations(set_recipe(alpha=0.0, size=1024, style_scale=1.0)) == []
    assert violations(set_layers(("relu5_1", 0.5))) == []


async def test_all_violations_are_reported_at_once_also_those_of_images():
    wanted = spec(beta=-1.0)
    wanted.content.data = b"GIF89a"
    wanted.styles[0].image.data = png()[:20]
    wanted.styles.add(image=pb.ImageSource(data=png(15, 15)), weight=NAN)
    engine = FakeEngine()
    async with serving(engine) as s:
        got = await refused(s.stub.StylizeStream(pb.StylizeStreamRequest(spec=wanted)))
    assert got.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (got.ErrorInfo.reason, got.ErrorInfo.domain) == ("INVALID_REQUEST", "gramophone")
    reported = {v.field: v.description for v in got.BadRequest.field_violations}
    assert list(reported) == [
        "spec.styles[1].weight",
        "spec.recipe.beta",
        "spec.content.data",
        "spec.styles[0].image.data",
        "spec.styles[1].image.data",
    ]
    assert "a GIF file" in reported["spec.content.data"]
    assert "truncated" in reported["spec.styles[0].image.data"]
    assert got.message.startswith("spec.styles[1].weight: must be above 0")
    assert engine.jobs == []


def test_violations_of_recipe_rules_do_not_hide_those_of_server_rules():
    def change(s):
        set_recipe(beta=-1.0, size=4096, start=Start.IMAGE)(s)
        set_layers(("relu9_1", 1.0))(s)

    fields = [violation.field for violation in violations(change)]
    assert fields == ["spec.recipe.beta", "spec.recipe.style_layers[0].layer", "spec.recipe.size", "spec.start_image"]


async def test_a_result_that_is_too_thin_is_refused_with_the_smallest_valid_size():
    wanted = spec(size=64)
    wanted.content.data = png(640, 80)
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
        (violation,) = got.BadRequest.field_violations
        assert violation.field == "spec.recipe.size"
        assert "makes a 64x8 picture" in violation.description and "size of 128 or more" in violation.description
        wanted.recipe.size = 128
        response = await s.stub.Stylize(pb.StylizeRequest(spec=wanted))
        assert response.result.image.height == 16


async def test_violations_that_do_not_fit_are_counted():
    wanted = spec()
    set_layers(*((f"{'x' * 5000}{i}", 1) for i in range(16)))(wanted)
    set_layers(*((f"\N{WHITE SMILING FACE}{i}", 1) for i in range(16)), which="content_layers")(wanted)
    async with serving(FakeEngine()) as s:
        got = await refused(s.stub.Stylize(pb.StylizeRequest(spec=wanted)))
    assert got.code is grpc.StatusCode.INVALID_ARGUMENT
    reported = got.BadRequest.field_violations
    assert 10 <= len(reported) <= 20
    assert reported[-1].description == f"has {32 - len(reported) + 1} more violations, which did not fit here"
    assert len(got.trailers["grpc-status-details-bin"]) <= 4096
