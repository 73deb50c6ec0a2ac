"""Builds messages from what a caller gives: images, keyword arguments, options. Names every value that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from gramophone import recipe as recipes
from gramophone.options import (
    FRAME_SIDE,
    FRAMES_IN_FLIGHT,
    INTERVAL_S,
    MAX_DURATION_S,
    MAX_INT32,
    MAX_UINT64,
    QUALITY,
)
from gramophone.recipe import FIELD_TYPES, OTHER_NAMES, InvalidRecipeError, Range
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.values import MisfitError, did_you_mean, shown
from gramophone.wire import layers_to_message, overrides_to_message
from gramophone_client.transport import images
from gramophone_client.transport.attachments import Attachment, Attachments
from gramophone_client.transport.problems import Problems, count, duration, image_format, in_range, style_weight
from gramophone_client.types.options import (
    OPTIONS,
    Changes,
    CheckpointOptions,
    FrameOptions,
    ImageInput,
    JobOptions,
    Style,
    Styles,
    UploadedImage,
)
from gramophone_client.types.updates import Checkpoint

__all__ = [
    "image_bytes",
    "job_request",
    "job_spec",
    "resumed_spec",
    "update_command",
    "uploaded_images",
    "watch_request",
]

# The keyword arguments of methods beside the options of a job. An unknown option may be one of them, misspelt.
METHOD_KEYWORDS = ("timeout", "patience", "metadata", "request_id", "frames", "checkpoints")
OTHER_OPTIONS: Mapping[str, str] = {
    **OTHER_NAMES,
    "init_image": "start_image",
    "format": "result_format",
    "output_format": "result_format",
    "random_seed": "seed",
    "checkpoint": "resume",
}
CHECKPOINT_FITS = "must be a Checkpoint, its bytes or a file of them"

R = TypeVar("R", pb.GetJobRequest, pb.CancelJobRequest)


def job_spec(
    content: ImageInput,
    styles: Styles,
    job: JobOptions,
    *,
    frames: FrameOptions | None = None,
    checkpoints: CheckpointOptions | None = None,
) -> pb.JobSpec:
    """The message that describes a job. Reads files, so it may block.

    Raises `InvalidRequestError` with all options and images that do not fit, before a file is read if there are any,
    and OSError for a file that cannot be read. Layer names and the server's limits are checked by the server.
    """
    problems = Problems()
    for name in (name for name in job if name not in JobOptions.__annotations__):
        if name in METHOD_KEYWORDS:  # as `frames` of `stylize`, which returns only the result
            problems.add(name, name, "is not an option of this method")
            continue
        hint = did_you_mean(name, (*JobOptions.__annotations__, *METHOD_KEYWORDS), OTHER_OPTIONS)
        problems.add(name, name, f"is not an option of a job{hint}")
    options: dict[str, Any] = {name: job.get(name, option.default) for name, option in OPTIONS.items()}
    resume, start_image = options["resume"], options["start_image"]
    spec = pb.JobSpec()
    if resume is None:
        overrides = {name: value for name, value in job.items() if name in FIELD_TYPES}
        if start_image is not None:
            overrides.setdefault("start", "image")
        _set_recipe(spec, "fast" if options["preset"] is None else options["preset"], overrides, problems)
        if options["seed"] is not None:
            with problems.of("seed", "spec.seed"):
                spec.seed = count(options["seed"], MAX_UINT64)
    else:
        for name in ("preset", "seed", "start_image", *FIELD_TYPES):
            if job.get(name) is not None or (name in FIELD_TYPES and name in job):
                path = f"spec.{name}" if name in ("seed", "start_image") else f"spec.recipe.{name}"
                problems.add(name, path, "cannot be given with resume: the job continues with the checkpoint's")
    with problems.of("result_format", "spec.result_format"):
        spec.result_format = image_format(options["result_format"])
    with problems.of("result_quality", "spec.result_quality"):
        spec.result_quality = in_range(options["result_quality"], QUALITY)
    if options["detach_grace"] is not None:
        with problems.of("detach_grace", "spec.detach_grace"):
            spec.detach_grace.CopyFrom(duration(options["detach_grace"], Range(0, MAX_DURATION_S)))
    _set_watching(spec, frames, checkpoints, problems, "spec.")
    _set_files(spec, content, styles, start_image, resume, problems)
    return spec


def resumed_spec(spec: pb.JobSpec, seed: int, checkpoint: Checkpoint | None) -> pb.JobSpec:
    """The same job again: from the checkpoint, or from its start with the seed that it had."""
    resumed = pb.JobSpec()
    resumed.CopyFrom(spec)
    if checkpoint is not None:
        for name in ("recipe", "start_image", "seed", "resume_digest"):
            resumed.ClearField(name)
        resumed.resume = checkpoint.data
    elif not (resumed.HasField("resume") or resumed.resume_digest):
        resumed.seed = seed
    return resumed


def uploaded_images(content: ImageInput, styles: Styles, start_image: ImageInput | None = None) -> Attachments:
    """The images of a job that its caller has uploaded, so that its spec names them by digest only."""
    fields = [("spec.content.data", content), ("spec.start_image.data", start_image)]
    fields += [(f"spec.styles[{i}].image.data", image) for i, (image, _) in enumerate(_as_styles(styles))]
    return {image.digest: Attachment(field, image.data) for field, image in fields if isinstance(image, UploadedImage)}


def watch_request(
    job_id: str, after_sequence: int, frames: FrameOptions | None, checkpoints: CheckpointOptions | None
) -> pb.WatchJobRequest:
    """The message that asks for a job's events. Raises `InvalidRequestError` with all values that do not fit."""
    problems, request = Problems(), pb.WatchJobRequest()
    _set_job_id(request, job_id, problems)
    with problems.of("after_sequence", "after_sequence"):
        request.after_sequence = count(after_sequence, MAX_UINT64)
    _set_watching(request, frames, checkpoints, problems)
    problems.raise_if_any()
    return request


def job_request(request: R, job_id: str) -> R:
    """The request about a job, with the job's id. Raises `InvalidRequestError` if it is no text."""
    problems = Problems()
    _set_job_id(request, job_id, problems)
    problems.raise_if_any()
    return request


def update_command(changes: Changes) -> pb.UpdateCommand:
    """The command that changes a job. Raises `InvalidRequestError` with all changes that do not fit."""
    problems, command = Problems(), pb.UpdateCommand()
    known = Changes.__annotations__
    for name, value in changes.items():
        if name not in known:
            hint = did_you_mean(name, known, OTHER_NAMES) or f"; {', '.join(known)} can"
            problems.add(name, f"update.{name}", f"cannot be changed while a job runs{hint}")
            continue
        try:
            exact = recipes.field_value(name, value)
        except InvalidRecipeError as error:
            problems.add_all(error.violations, "update.")
            continue
        if name.endswith("_layers"):
            getattr(command, name).CopyFrom(layers_to_message(exact))
        else:
            setattr(command, name, exact)
    problems.raise_if_any()
    return command


def image_bytes(image: ImageInput) -> bytes:
    """The bytes of an image file; reads the file, so it may block. Raises `InvalidRequestError` and OSError."""
    problems = Problems()
    with problems.of("image", "image"):
        return images.image_bytes(image)
    raise problems.error()


class _ImageSlot(NamedTuple):
    """An image that a caller gave: its argument, its path in the request, and its message there."""

    argument: str
    path: str
    image: Any
    message: pb.ImageSource


def _set_recipe(spec: pb.JobSpec, preset: Any, overrides: Mapping[str, Any], problems: Problems) -> None:
    try:
        recipe = recipes.preset(preset, **overrides)
    except InvalidRecipeError as error:
        return problems.add_all(error.violations, "spec.recipe.")
    exact = {name: getattr(recipe, name) for name in overrides}
    spec.recipe.CopyFrom(overrides_to_message(exact, preset))


def _set_job_id(
    request: pb.WatchJobRequest | pb.GetJobRequest | pb.CancelJobRequest, job_id: str, problems: Problems
) -> None:
    with problems.of("job_id", "job_id"):
        if not isinstance(job_id, str):
            raise MisfitError(f"must be a job's id, got {shown(job_id)}")
        if not job_id.isascii():
            raise MisfitError(f"must be a job's id, which is ASCII, got {shown(job_id)}")
        request.job_id = job_id


def _set_watching(
    message: pb.JobSpec | pb.WatchJobRequest,
    frames: FrameOptions | None,
    checkpoints: CheckpointOptions | None,
    problems: Problems,
    prefix: str = "",
) -> None:
    """Sets the fields `frames` and `checkpoints`, whose paths begin with the prefix."""
    if isinstance(frames, FrameOptions):
        target = message.frames
        target.SetInParent()
        with problems.of("frames.every_iterations", f"{prefix}frames.every_iterations"):
            target.every_iterations = count(frames.every_iterations, MAX_INT32)
        with problems.of("frames.min_interval_s", f"{prefix}frames.min_interval"):
            target.min_interval.CopyFrom(duration(frames.min_interval_s, INTERVAL_S))
        with problems.of("frames.max_side", f"{prefix}frames.max_side"):
            target.max_side = in_range(frames.max_side, FRAME_SIDE, or_zero=True)
        with problems.of("frames.format", f"{prefix}frames.format"):
            target.format = image_format(frames.format)
        with problems.of("frames.quality", f"{prefix}frames.quality"):
            target.quality = in_range(frames.quality, QUALITY)
        with problems.of("frames.max_in_flight", f"{prefix}frames.max_in_flight"):
            target.max_in_flight = in_range(frames.max_in_flight, FRAMES_IN_FLIGHT)
    elif frames is not None:
        problems.add("frames", f"{prefix}frames", f"must be FrameOptions or None, got {shown(frames)}")
    if isinstance(checkpoints, CheckpointOptions):
        with problems.of("checkpoints.every_s", f"{prefix}checkpoints.min_interval"):
            message.checkpoints.min_interval.CopyFrom(duration(checkpoints.every_s, INTERVAL_S))
        with problems.of("checkpoints.light", f"{prefix}checkpoints.light"):
            if not isinstance(checkpoints.light, bool):
                raise MisfitError(f"must be True or False, got {shown(checkpoints.light)}")
            message.checkpoints.light = checkpoints.light
    elif checkpoints is not None:
        description = f"must be CheckpointOptions or None, got {shown(checkpoints)}"
        problems.add("checkpoints", f"{prefix}checkpoints", description)


def _set_files(spec: pb.JobSpec, content: Any, styles: Any, start_image: Any, resume: Any, problems: Problems) -> None:
    """Sets the images and the checkpoint. Reads files only if nothing is wrong so far."""
    slots = [_ImageSlot("content", "spec.content.data", content, spec.content)]
    with problems.of("styles", "spec.styles"):
        is_list = _is_list(styles)
        for i, (image, weight) in enumerate(_as_styles(styles)):
            style = spec.styles.add()
            argument = f"styles[{i}]" if is_list else "styles"
            slots.append(_ImageSlot(argument, f"spec.styles[{i}].image.data", image, style.image))
            with problems.of(f"{argument}.weight", f"spec.styles[{i}].weight"):
                style.weight = style_weight(weight)
    if start_image is not None and resume is None:
        slots.append(_ImageSlot("start_image", "spec.start_image.data", start_image, spec.start_image))
    for slot in slots:
        with problems.of(slot.argument, slot.path):
            images.check_image(slot.image)
    is_checkpoint = isinstance(resume, Checkpoint)
    if resume is not None and not is_checkpoint:
        with problems.of("resume", "spec.resume"):
            images.check_file(resume, CHECKPOINT_FITS)
    problems.raise_if_any()

    for slot in slots:
        with problems.of(slot.argument, slot.path):
            if isinstance(slot.image, UploadedImage):
                slot.message.digest = slot.image.digest
            else:
                slot.message.data = images.image_bytes(slot.image)
    if resume is not None:
        with problems.of("resume", "spec.resume"):
            spec.resume = resume.data if is_checkpoint else images.file_bytes(resume)
    problems.raise_if_any()


def _as_styles(styles: Any) -> list[tuple[Any, Any]]:
    """Pairs of an image and its weight. Raises `MisfitError` for a list of none, or an iterator."""
    if not _is_list(styles):
        return [_as_style(styles)]
    if not styles:
        raise MisfitError("must be one style image or several, got an empty list")
    return [_as_style(style) for style in styles]


def _as_style(style: Any) -> tuple[Any, Any]:
    return (style[0], style[1]) if _is_pair(style) else (style, 1.0)


def _is_list(styles: Any) -> bool:
    if isinstance(styles, str | bytes | bytearray | memoryview) or _is_pair(styles):
        return False
    if isinstance(styles, Iterator) and not hasattr(styles, "read"):
        raise MisfitError(f"must be one style image or a list of them, got {shown(styles)}; write list(...)")
    return isinstance(styles, Sequence)


def _is_pair(value: Any) -> bool:
    """Whether the value is a `Style`, or a tuple like one. A tuple of two images is none."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return isinstance(value, Style) or (hasattr(value[1], "__float__") and not getattr(value[1], "shape", ()))
