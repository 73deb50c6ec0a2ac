"""The rules for requests: pure functions from messages and limits to violations, each with its field path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

from google.protobuf import duration_pb2

from gramophone.options import FRAME_SIDE, FRAMES_IN_FLIGHT, INTERVAL_S, MAX_STYLE_WEIGHT
from gramophone.recipe import InvalidRecipeError, LayerWeight, Range, Recipe, Start, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.wire import recipe_from_message
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.job import StyleJob
from gramophone_server.domain.picture_size import MIN_SIDE
from gramophone_server.errors import InvalidRequest

__all__ = [
    "check_checkpoints",
    "check_first_message",
    "check_frames",
    "check_no_max_in_flight",
    "check_page_options",
    "check_request_id",
    "check_result_size",
    "check_resumed",
    "check_spec",
    "check_watch_options",
    "raise_violations",
]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def raise_violations(violations: Iterable[Violation]) -> None:
    """Raises `InvalidRequest` if there are any violations."""
    if violations := tuple(violations):
        raise InvalidRequest(violations)


def check_spec(spec: pb.JobSpec, limits: Limits, layers: Sequence[str]) -> Iterator[Violation]:
    """All violations of a job, except those in the bytes of its images and its checkpoint. `layers` are the names of
    the network's layers."""
    yield from _check_image("spec.content", spec.content, "the content image")
    yield from _check_styles(spec.styles, limits)
    resume = "resume" if spec.HasField("resume") else "resume_digest"  # asking for `resume` itself copies megabytes
    if resume == "resume" and spec.resume_digest:
        yield Violation("spec.resume_digest", "must be unset with `resume`; send the checkpoint or name it")
    elif spec.resume_digest:
        yield from _check_digest("spec.resume_digest", spec.resume_digest)
    if resume == "resume" or spec.resume_digest:
        for name in ("recipe", "start_image", "seed"):
            if spec.HasField(name):
                yield Violation(f"spec.{name}", f"must be unset with `{resume}`, because the checkpoint contains it")
    else:
        try:
            recipe = recipe_from_message(spec.recipe)
        except InvalidRecipeError as error:
            yield from (Violation(f"spec.recipe.{field}", description) for field, description in error.violations)
            recipe = _without_invalid_fields(spec.recipe, error.violations)
        yield from _check_recipe(recipe, limits, layers)
        yield from _check_start_image(spec, recipe.start)
    if spec.HasField("frames"):
        yield from check_frames(spec.frames, "spec.frames")
    yield from check_checkpoints(spec.checkpoints, "spec.checkpoints")
    grace_s = spec.detach_grace.seconds + spec.detach_grace.nanos / 1e9
    if not 0 <= grace_s <= limits.max_detach_s:
        yield Violation(
            "spec.detach_grace",
            f"must be 0 to {limits.max_detach_s} seconds (server setting {env_variable('max_detach_s')}), "
            f"got {grace_s:g}",
        )
    yield from _check_format("spec.result_format", spec.result_format)
    yield from _check_quality("spec.result_quality", spec.result_quality)


def check_resumed(path: str, recipe: Recipe, limits: Limits, layers: Sequence[str]) -> Iterator[Violation]:
    """Violations of the recipe of the checkpoint in field `path` on this server; another server may have written it."""
    for field, description in _check_recipe(recipe, limits, layers):
        yield Violation(path, f"has a recipe whose {field.removeprefix('spec.recipe.')} {description}")


def check_request_id(request_id: str) -> Iterator[Violation]:
    """Violations of the client's id of a request; it may be empty."""
    if request_id and not UUID.fullmatch(request_id):
        yield Violation("request_id", f"must be a UUID of 36 characters, or empty, got {request_id[:48]!a}")


def check_page_options(request: pb.ListJobsRequest) -> Iterator[Violation]:
    """Violations of a request for a page of jobs."""
    if request.page_size < 0:
        yield Violation("page_size", f"must be 0 or more, got {request.page_size}")
    if request.page_token and not re.fullmatch(r"[0-9]{1,18}", request.page_token):
        yield Violation("page_token", f"is not a page token of this server, got {request.page_token[:48]!a}")


def _without_invalid_fields(message: pb.Recipe, violations: Sequence[Violation]) -> Recipe:
    """The recipe without the fields that have violations, so that the others are still checked."""
    rest = pb.Recipe()
    rest.CopyFrom(message)
    for field, _ in violations:
        rest.ClearField(field.partition("[")[0])
    try:
        return recipe_from_message(rest)
    except InvalidRecipeError:  # the rest contradicts values of the preset; the first violations are enough
        return Recipe()


def check_result_size(job: StyleJob, limits: Limits) -> Iterator[Violation]:
    """Violations that need the size of the content image."""
    if min(job.result_size) < MIN_SIDE:
        sides, size = job.content.shape[1:], job.recipe.size
        needed = -(-max(sides) * MIN_SIDE // min(sides))
        larger = f", or ask for a size of {needed} or more" if needed <= limits.max_size else ""
        yield Violation(
            "spec.recipe.size",
            f"makes a {job.result_size[0]}x{job.result_size[1]} picture of this content image; its shorter side must "
            f"have at least {MIN_SIDE} pixels, so crop or pad the image until its longer side is at most "
            f"{size // MIN_SIDE} times the shorter one{larger}",
        )


def _check_image(field: str, image: pb.ImageSource, what: str) -> Iterator[Violation]:
    source = image.WhichOneof("source")  # does not copy the bytes, as reading `data` would
    if source is None:
        yield Violation(field, f"is missing; send {what} as `data`, or name it by the `digest` of UploadImage")
    elif source == "digest":
        yield from _check_digest(f"{field}.digest", image.digest)


def _check_digest(field: str, digest: str) -> Iterator[Violation]:
    if not DIGEST.fullmatch(digest):
        yield Violation(
            field, f"must be 'sha256:' and 64 lower-case hexadecimal digits, from UploadImage, got {digest[:80]!a}"
        )


def _check_styles(styles: Sequence[pb.StyleSource], limits: Limits) -> Iterator[Violation]:
    if not 1 <= len(styles) <= limits.max_styles:
        yield Violation(
            "spec.styles",
            f"must have 1 to {limits.max_styles} images (server setting {env_variable('max_styles')}), "
            f"got {len(styles)}",
        )
    for i, style in enumerate(styles):
        yield from _check_image(f"spec.styles[{i}].image", style.image, "the style image")
        if style.HasField("weight") and not 0 < style.weight <= MAX_STYLE_WEIGHT:  # true for NaN too
            yield Violation(
                f"spec.styles[{i}].weight",
                f"must be above 0 and at most {MAX_STYLE_WEIGHT:g}, got {style.weight:g}; "
                "leave a style out to give it no weight",
            )


def _check_recipe(recipe: Recipe, limits: Limits, layers: Sequence[str]) -> Iterator[Violation]:
    """Violations of the server's rules, beyond the recipe's own: its network and its limits."""
    yield from _check_layers("spec.recipe.content_layers", recipe.content_layers, layers)
    yield from _check_layers("spec.recipe.style_layers", recipe.style_layers, layers)
    setting = f"(server setting {env_variable('max_size')})"
    if recipe.size > limits.max_size:
        yield Violation("spec.recipe.size", f"must be at most {limits.max_size} pixels {setting}, got {recipe.size}")
    elif recipe.size * recipe.style_scale > limits.max_size:
        # A style image needs as much memory of the network as a result of its size.
        yield Violation(
            "spec.recipe.style_scale",
            f"makes style images of {recipe.size * recipe.style_scale:.0f} pixels at a size of {recipe.size}; "
            f"at most {limits.max_size} are allowed {setting}",
        )
    iterations = recipe.total_iterations()
    if iterations > limits.max_iterations:
        scales = len(recipe.scale_sizes())
        yield Violation(
            "spec.recipe.iterations",
            f"and coarse_iterations make {iterations} over {scales} scale{'s' if scales > 1 else ''}; "
            f"at most {limits.max_iterations} are allowed (server setting {env_variable('max_iterations')})",
        )


def _check_layers(field: str, wanted: Sequence[LayerWeight], layers: Sequence[str]) -> Iterator[Violation]:
    for i, (layer, _) in enumerate(wanted):
        if layer not in layers:
            name = layer[:32]  # a name has 7 letters, and comparing long texts is slow
            close = difflib.get_close_matches(name, layers, n=1, cutoff=0)
            nearest = f"did you mean {close[0]!r}? " if close else ""
            yield Violation(
                f"{field}[{i}].layer",
                f"{name!a} is not a layer of this network; {nearest}GetServerInfo (`gramophone info`) lists them all",
            )


def _check_start_image(spec: pb.JobSpec, start: Start) -> Iterator[Violation]:
    given = spec.HasField("start_image")
    if start is Start.IMAGE:
        yield from _check_image("spec.start_image", spec.start_image, "the image that START_IMAGE needs")
    if start is not Start.IMAGE and given:
        yield Violation("spec.start_image", f"is only for START_IMAGE; this recipe starts from {start.value}")


def check_frames(frames: pb.FrameOptions, field: str) -> Iterator[Violation]:
    """Violations of a watcher's frame options in `field`."""
    if frames.every_iterations < 0:
        yield Violation(f"{field}.every_iterations", f"must be 0 or more, got {frames.every_iterations}")
    yield from _check_interval(f"{field}.min_interval", frames.min_interval)
    if frames.max_side:
        yield from _check_range(f"{field}.max_side", frames.max_side, FRAME_SIDE)
    yield from _check_format(f"{field}.format", frames.format)
    yield from _check_quality(f"{field}.quality", frames.quality)
    yield from _check_range(f"{field}.max_in_flight", frames.max_in_flight, FRAMES_IN_FLIGHT)


def check_checkpoints(checkpoints: pb.CheckpointOptions, field: str) -> Iterator[Violation]:
    """Violations of a watcher's checkpoint options in `field`."""
    yield from _check_interval(f"{field}.min_interval", checkpoints.min_interval)


def check_watch_options(
    options: pb.JobSpec | pb.WatchJobRequest | pb.AttachCommand, prefix: str = ""
) -> Iterator[Violation]:
    """Violations of the options for watching an existing job."""
    yield from check_frames(options.frames, f"{prefix}frames")
    yield from check_checkpoints(options.checkpoints, f"{prefix}checkpoints")


def check_no_max_in_flight(frames: pb.FrameOptions, field: str) -> Iterator[Violation]:
    """A violation if `max_in_flight` is set for a stream without commands, which has no acknowledgements."""
    if frames.max_in_flight:
        yield Violation(
            f"{field}.max_in_flight",
            f"is only for StylizeInteractive, where frames are acknowledged, got {frames.max_in_flight}",
        )


def check_first_message(request: pb.StylizeInteractiveRequest | None) -> Iterator[Violation]:
    """Violations of a controller's first message; ``request`` is None if the client closed its side without one."""
    command = request.WhichOneof("command") if request is not None else "none"
    if command not in ("start", "attach"):
        yield Violation("command", f"the first message must be start or attach, got {command or 'an unknown one'}")


def _check_interval(field: str, interval: duration_pb2.Duration) -> Iterator[Violation]:
    interval_s = interval.seconds + interval.nanos / 1e9
    if not INTERVAL_S.low <= interval_s <= INTERVAL_S.high:
        yield Violation(field, f"must be {INTERVAL_S.low:g} to {INTERVAL_S.high:g} seconds, got {interval_s:g}")


def _check_range(field: str, value: int, allowed: Range) -> Iterator[Violation]:
    if not allowed.low <= value <= allowed.high:
        yield Violation(field, f"must be {allowed.low:g} to {allowed.high:g}, got {value}")


def _check_quality(field: str, value: int) -> Iterator[Violation]:
    if not 0 <= value <= 100:
        yield Violation(field, f"must be 1 to 100, or 0 for the default, got {value}")


def _check_format(field: str, value: int) -> Iterator[Violation]:
    if value not in pb.ImageFormat.values():
        yield Violation(field, f"is an unknown value {value}; this server knows JPEG, PNG and WebP")
