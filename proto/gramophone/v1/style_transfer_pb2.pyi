import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Preset(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRESET_UNSPECIFIED: _ClassVar[Preset]
    PRESET_FAST: _ClassVar[Preset]
    PRESET_QUALITY: _ClassVar[Preset]
    PRESET_TEXTBOOK: _ClassVar[Preset]

class Normalisation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NORMALISATION_UNSPECIFIED: _ClassVar[Normalisation]
    NORMALISATION_NONE: _ClassVar[Normalisation]
    NORMALISATION_GATYS: _ClassVar[Normalisation]
    NORMALISATION_ELEMENTS: _ClassVar[Normalisation]
    NORMALISATION_RELATIVE: _ClassVar[Normalisation]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_MAX: _ClassVar[Pooling]
    POOLING_AVERAGE: _ClassVar[Pooling]

class Start(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    START_UNSPECIFIED: _ClassVar[Start]
    START_CONTENT: _ClassVar[Start]
    START_NOISE: _ClassVar[Start]
    START_IMAGE: _ClassVar[Start]

class Optimiser(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPTIMISER_UNSPECIFIED: _ClassVar[Optimiser]
    OPTIMISER_GRADIENT_DESCENT: _ClassVar[Optimiser]
    OPTIMISER_NORMALISED_DESCENT: _ClassVar[Optimiser]
    OPTIMISER_ADAM: _ClassVar[Optimiser]
    OPTIMISER_LBFGS: _ClassVar[Optimiser]

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_JPEG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_UNSPECIFIED: _ClassVar[StopReason]
    STOP_REASON_ITERATIONS_DONE: _ClassVar[StopReason]
    STOP_REASON_TIME_BUDGET: _ClassVar[StopReason]
    STOP_REASON_FINISHED: _ClassVar[StopReason]

class JobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATE_UNSPECIFIED: _ClassVar[JobState]
    JOB_STATE_QUEUED: _ClassVar[JobState]
    JOB_STATE_RUNNING: _ClassVar[JobState]
    JOB_STATE_SUCCEEDED: _ClassVar[JobState]
    JOB_STATE_FAILED: _ClassVar[JobState]
    JOB_STATE_CANCELLED: _ClassVar[JobState]
    JOB_STATE_PAUSED: _ClassVar[JobState]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_INVALID_REQUEST: _ClassVar[ErrorReason]
    ERROR_REASON_QUEUE_FULL: _ClassVar[ErrorReason]
    ERROR_REASON_SHUTTING_DOWN: _ClassVar[ErrorReason]
    ERROR_REASON_DIVERGED: _ClassVar[ErrorReason]
    ERROR_REASON_OUT_OF_MEMORY: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_READY: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_REQUEST_ID_TAKEN: _ClassVar[ErrorReason]
    ERROR_REASON_CANCELLED: _ClassVar[ErrorReason]
    ERROR_REASON_SLOW_READER: _ClassVar[ErrorReason]
    ERROR_REASON_LISTING_DISABLED: _ClassVar[ErrorReason]
    ERROR_REASON_DEADLINE_UNATTAINABLE: _ClassVar[ErrorReason]
    ERROR_REASON_JOB_CONTROLLED: _ClassVar[ErrorReason]
    ERROR_REASON_IMAGE_NOT_FOUND: _ClassVar[ErrorReason]
    ERROR_REASON_TOO_MANY_WATCHERS: _ClassVar[ErrorReason]
    ERROR_REASON_SERVER_BUSY: _ClassVar[ErrorReason]
    ERROR_REASON_SLOW_SENDER: _ClassVar[ErrorReason]
PRESET_UNSPECIFIED: Preset
PRESET_FAST: Preset
PRESET_QUALITY: Preset
PRESET_TEXTBOOK: Preset
NORMALISATION_UNSPECIFIED: Normalisation
NORMALISATION_NONE: Normalisation
NORMALISATION_GATYS: Normalisation
NORMALISATION_ELEMENTS: Normalisation
NORMALISATION_RELATIVE: Normalisation
POOLING_UNSPECIFIED: Pooling
POOLING_MAX: Pooling
POOLING_AVERAGE: Pooling
START_UNSPECIFIED: Start
START_CONTENT: Start
START_NOISE: Start
START_IMAGE: Start
OPTIMISER_UNSPECIFIED: Optimiser
OPTIMISER_GRADIENT_DESCENT: Optimiser
OPTIMISER_NORMALISED_DESCENT: Optimiser
OPTIMISER_ADAM: Optimiser
OPTIMISER_LBFGS: Optimiser
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_JPEG: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
STOP_REASON_UNSPECIFIED: StopReason
STOP_REASON_ITERATIONS_DONE: StopReason
STOP_REASON_TIME_BUDGET: StopReason
STOP_REASON_FINISHED: StopReason
JOB_STATE_UNSPECIFIED: JobState
JOB_STATE_QUEUED: JobState
JOB_STATE_RUNNING: JobState
JOB_STATE_SUCCEEDED: JobState
JOB_STATE_FAILED: JobState
JOB_STATE_CANCELLED: JobState
JOB_STATE_PAUSED: JobState
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_INVALID_REQUEST: ErrorReason
ERROR_REASON_QUEUE_FULL: ErrorReason
ERROR_REASON_SHUTTING_DOWN: ErrorReason
ERROR_REASON_DIVERGED: ErrorReason
ERROR_REASON_OUT_OF_MEMORY: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason
ERROR_REASON_NOT_READY: ErrorReason
ERROR_REASON_JOB_NOT_FOUND: ErrorReason
ERROR_REASON_REQUEST_ID_TAKEN: ErrorReason
ERROR_REASON_CANCELLED: ErrorReason
ERROR_REASON_SLOW_READER: ErrorReason
ERROR_REASON_LISTING_DISABLED: ErrorReason
ERROR_REASON_DEADLINE_UNATTAINABLE: ErrorReason
ERROR_REASON_JOB_CONTROLLED: ErrorReason
ERROR_REASON_IMAGE_NOT_FOUND: ErrorReason
ERROR_REASON_TOO_MANY_WATCHERS: ErrorReason
ERROR_REASON_SERVER_BUSY: ErrorReason
ERROR_REASON_SLOW_SENDER: ErrorReason

class ImageSource(_message.Message):
    __slots__ = ("data", "digest")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    digest: str
    def __init__(self, data: _Optional[bytes] = ..., digest: _Optional[str] = ...) -> None: ...

class StyleSource(_message.Message):
    __slots__ = ("image", "weight")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    image: ImageSource
    weight: float
    def __init__(self, image: _Optional[_Union[ImageSource, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class LayerWeight(_message.Message):
    __slots__ = ("layer", "weight")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    layer: str
    weight: float
    def __init__(self, layer: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class LayerWeights(_message.Message):
    __slots__ = ("layers",)
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerWeight]
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerWeight, _Mapping]]] = ...) -> None: ...

class Recipe(_message.Message):
    __slots__ = ("preset", "content_layers", "style_layers", "alpha", "beta", "tv_weight", "normalisation", "pooling", "size", "style_scale", "start", "optimiser", "step", "iterations", "coarse_iterations", "smallest_size", "average", "time_budget")
    PRESET_FIELD_NUMBER: _ClassVar[int]
    CONTENT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    STYLE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    TV_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    NORMALISATION_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    STYLE_SCALE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    OPTIMISER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    COARSE_ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    SMALLEST_SIZE_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    TIME_BUDGET_FIELD_NUMBER: _ClassVar[int]
    preset: Preset
    content_layers: LayerWeights
    style_layers: LayerWeights
    alpha: float
    beta: float
    tv_weight: float
    normalisation: Normalisation
    pooling: Pooling
    size: int
    style_scale: float
    start: Start
    optimiser: Optimiser
    step: float
    iterations: int
    coarse_iterations: int
    smallest_size: int
    average: float
    time_budget: float
    def __init__(self, preset: _Optional[_Union[Preset, str]] = ..., content_layers: _Optional[_Union[LayerWeights, _Mapping]] = ..., style_layers: _Optional[_Union[LayerWeights, _Mapping]] = ..., alpha: _Optional[float] = ..., beta: _Optional[float] = ..., tv_weight: _Optional[float] = ..., normalisation: _Optional[_Union[Normalisation, str]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., size: _Optional[int] = ..., style_scale: _Optional[float] = ..., start: _Optional[_Union[Start, str]] = ..., optimiser: _Optional[_Union[Optimiser, str]] = ..., step: _Optional[float] = ..., iterations: _Optional[int] = ..., coarse_iterations: _Optional[int] = ..., smallest_size: _Optional[int] = ..., average: _Optional[float] = ..., time_budget: _Optional[float] = ...) -> None: ...

class FrameOptions(_message.Message):
    __slots__ = ("every_iterations", "min_interval", "max_side", "format", "quality", "max_in_flight")
    EVERY_ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    MIN_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    every_iterations: int
    min_interval: _duration_pb2.Duration
    max_side: int
    format: ImageFormat
    quality: int
    max_in_flight: int
    def __init__(self, every_iterations: _Optional[int] = ..., min_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_side: _Optional[int] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., quality: _Optional[int] = ..., max_in_flight: _Optional[int] = ...) -> None: ...

class CheckpointOptions(_message.Message):
    __slots__ = ("min_interval", "light")
    MIN_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    LIGHT_FIELD_NUMBER: _ClassVar[int]
    min_interval: _duration_pb2.Duration
    light: bool
    def __init__(self, min_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., light: _Optional[bool] = ...) -> None: ...

class JobSpec(_message.Message):
    __slots__ = ("content", "styles", "recipe", "start_image", "frames", "result_format", "result_quality", "seed", "detach_grace", "checkpoints", "resume", "resume_digest")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    STYLES_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    START_IMAGE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    RESULT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    RESULT_QUALITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DETACH_GRACE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    RESUME_DIGEST_FIELD_NUMBER: _ClassVar[int]
    content: ImageSource
    styles: _containers.RepeatedCompositeFieldContainer[StyleSource]
    recipe: Recipe
    start_image: ImageSource
    frames: FrameOptions
    result_format: ImageFormat
    result_quality: int
    seed: int
    detach_grace: _duration_pb2.Duration
    checkpoints: CheckpointOptions
    resume: bytes
    resume_digest: str
    def __init__(self, content: _Optional[_Union[ImageSource, _Mapping]] = ..., styles: _Optional[_Iterable[_Union[StyleSource, _Mapping]]] = ..., recipe: _Optional[_Union[Recipe, _Mapping]] = ..., start_image: _Optional[_Union[ImageSource, _Mapping]] = ..., frames: _Optional[_Union[FrameOptions, _Mapping]] = ..., result_format: _Optional[_Union[ImageFormat, str]] = ..., result_quality: _Optional[int] = ..., seed: _Optional[int] = ..., detach_grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., checkpoints: _Optional[_Union[CheckpointOptions, _Mapping]] = ..., resume: _Optional[bytes] = ..., resume_digest: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("format", "width", "height", "data")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    format: ImageFormat
    width: int
    height: int
    data: bytes
    def __init__(self, format: _Optional[_Union[ImageFormat, str]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class LayerLoss(_message.Message):
    __slots__ = ("layer", "value")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    layer: str
    value: float
    def __init__(self, layer: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Losses(_message.Message):
    __slots__ = ("total", "content", "style", "tv", "content_layers", "style_layers")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    STYLE_FIELD_NUMBER: _ClassVar[int]
    TV_FIELD_NUMBER: _ClassVar[int]
    CONTENT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    STYLE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    total: float
    content: float
    style: float
    tv: float
    content_layers: _containers.RepeatedCompositeFieldContainer[LayerLoss]
    style_layers: _containers.RepeatedCompositeFieldContainer[LayerLoss]
    def __init__(self, total: _Optional[float] = ..., content: _Optional[float] = ..., style: _Optional[float] = ..., tv: _Optional[float] = ..., content_layers: _Optional[_Iterable[_Union[LayerLoss, _Mapping]]] = ..., style_layers: _Optional[_Iterable[_Union[LayerLoss, _Mapping]]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("job_id", "recipe", "seed", "width", "height", "iterations", "queue_position", "attached", "resumed_at", "estimated_wait")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_AT_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    recipe: Recipe
    seed: int
    width: int
    height: int
    iterations: int
    queue_position: int
    attached: bool
    resumed_at: int
    estimated_wait: _duration_pb2.Duration
    def __init__(self, job_id: _Optional[str] = ..., recipe: _Optional[_Union[Recipe, _Mapping]] = ..., seed: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., iterations: _Optional[int] = ..., queue_position: _Optional[int] = ..., attached: _Optional[bool] = ..., resumed_at: _Optional[int] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("queue_position", "estimated_wait")
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    queue_position: int
    estimated_wait: _duration_pb2.Duration
    def __init__(self, queue_position: _Optional[int] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("iteration", "iterations", "width", "height", "losses", "iterations_per_second", "time_left", "scale", "scales")
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    iterations: int
    width: int
    height: int
    losses: Losses
    iterations_per_second: float
    time_left: _duration_pb2.Duration
    scale: int
    scales: int
    def __init__(self, iteration: _Optional[int] = ..., iterations: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., losses: _Optional[_Union[Losses, _Mapping]] = ..., iterations_per_second: _Optional[float] = ..., time_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., scale: _Optional[int] = ..., scales: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("iteration", "image", "dropped")
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    image: Image
    dropped: int
    def __init__(self, iteration: _Optional[int] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., dropped: _Optional[int] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("iteration", "light", "data")
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    LIGHT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    light: bool
    data: bytes
    def __init__(self, iteration: _Optional[int] = ..., light: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class Paused(_message.Message):
    __slots__ = ("iteration",)
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    def __init__(self, iteration: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("iteration",)
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    def __init__(self, iteration: _Optional[int] = ...) -> None: ...

class Changed(_message.Message):
    __slots__ = ("iteration", "recipe", "iterations")
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    iteration: int
    recipe: Recipe
    iterations: int
    def __init__(self, iteration: _Optional[int] = ..., recipe: _Optional[_Union[Recipe, _Mapping]] = ..., iterations: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("image", "losses", "iterations", "stop_reason", "elapsed")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    image: Image
    losses: Losses
    iterations: int
    stop_reason: StopReason
    elapsed: _duration_pb2.Duration
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., losses: _Optional[_Union[Losses, _Mapping]] = ..., iterations: _Optional[int] = ..., stop_reason: _Optional[_Union[StopReason, str]] = ..., elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("sequence", "accepted", "progress", "frame", "result", "waiting", "checkpoint", "paused", "resumed", "changed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    accepted: Accepted
    progress: Progress
    frame: Frame
    result: Result
    waiting: Waiting
    checkpoint: Checkpoint
    paused: Paused
    resumed: Resumed
    changed: Changed
    def __init__(self, sequence: _Optional[int] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., paused: _Optional[_Union[Paused, _Mapping]] = ..., resumed: _Optional[_Union[Resumed, _Mapping]] = ..., changed: _Optional[_Union[Changed, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("job_id", "state", "create_time", "start_time", "end_time", "expire_time", "iteration", "iterations", "width", "height", "losses", "stop_reason", "queue_position")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    state: JobState
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    iteration: int
    iterations: int
    width: int
    height: int
    losses: Losses
    stop_reason: StopReason
    queue_position: int
    def __init__(self, job_id: _Optional[str] = ..., state: _Optional[_Union[JobState, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., iteration: _Optional[int] = ..., iterations: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., losses: _Optional[_Union[Losses, _Mapping]] = ..., stop_reason: _Optional[_Union[StopReason, str]] = ..., queue_position: _Optional[int] = ...) -> None: ...

class StylizeRequest(_message.Message):
    __slots__ = ("spec", "request_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    request_id: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class StylizeResponse(_message.Message):
    __slots__ = ("accepted", "result")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    result: Result
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class StylizeStreamRequest(_message.Message):
    __slots__ = ("spec", "request_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    request_id: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class StylizeStreamResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ...) -> None: ...

class StylizeInteractiveRequest(_message.Message):
    __slots__ = ("command_id", "start", "attach", "pause", "resume", "update", "frame", "checkpoint", "finish", "ack")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    start: StartCommand
    attach: AttachCommand
    pause: PauseCommand
    resume: ResumeCommand
    update: UpdateCommand
    frame: FrameCommand
    checkpoint: CheckpointCommand
    finish: FinishCommand
    ack: AckCommand
    def __init__(self, command_id: _Optional[int] = ..., start: _Optional[_Union[StartCommand, _Mapping]] = ..., attach: _Optional[_Union[AttachCommand, _Mapping]] = ..., pause: _Optional[_Union[PauseCommand, _Mapping]] = ..., resume: _Optional[_Union[ResumeCommand, _Mapping]] = ..., update: _Optional[_Union[UpdateCommand, _Mapping]] = ..., frame: _Optional[_Union[FrameCommand, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointCommand, _Mapping]] = ..., finish: _Optional[_Union[FinishCommand, _Mapping]] = ..., ack: _Optional[_Union[AckCommand, _Mapping]] = ...) -> None: ...

class StartCommand(_message.Message):
    __slots__ = ("spec", "request_id")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    spec: JobSpec
    request_id: str
    def __init__(self, spec: _Optional[_Union[JobSpec, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class AttachCommand(_message.Message):
    __slots__ = ("job_id", "after_sequence", "frames", "checkpoints")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_sequence: int
    frames: FrameOptions
    checkpoints: CheckpointOptions
    def __init__(self, job_id: _Optional[str] = ..., after_sequence: _Optional[int] = ..., frames: _Optional[_Union[FrameOptions, _Mapping]] = ..., checkpoints: _Optional[_Union[CheckpointOptions, _Mapping]] = ...) -> None: ...

class PauseCommand(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeCommand(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateCommand(_message.Message):
    __slots__ = ("alpha", "beta", "tv_weight", "step", "content_layers", "style_layers", "iterations")
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    TV_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTENT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    STYLE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    alpha: float
    beta: float
    tv_weight: float
    step: float
    content_layers: LayerWeights
    style_layers: LayerWeights
    iterations: int
    def __init__(self, alpha: _Optional[float] = ..., beta: _Optional[float] = ..., tv_weight: _Optional[float] = ..., step: _Optional[float] = ..., content_layers: _Optional[_Union[LayerWeights, _Mapping]] = ..., style_layers: _Optional[_Union[LayerWeights, _Mapping]] = ..., iterations: _Optional[int] = ...) -> None: ...

class FrameCommand(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointCommand(_message.Message):
    __slots__ = ("light",)
    LIGHT_FIELD_NUMBER: _ClassVar[int]
    light: bool
    def __init__(self, light: _Optional[bool] = ...) -> None: ...

class FinishCommand(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AckCommand(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class FieldError(_message.Message):
    __slots__ = ("field", "description")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    field: str
    description: str
    def __init__(self, field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class CommandResult(_message.Message):
    __slots__ = ("command_id", "iteration", "field_errors")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    FIELD_ERRORS_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    iteration: int
    field_errors: _containers.RepeatedCompositeFieldContainer[FieldError]
    def __init__(self, command_id: _Optional[int] = ..., iteration: _Optional[int] = ..., field_errors: _Optional[_Iterable[_Union[FieldError, _Mapping]]] = ...) -> None: ...

class StylizeInteractiveResponse(_message.Message):
    __slots__ = ("event", "command_result")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_RESULT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    command_result: CommandResult
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ..., command_result: _Optional[_Union[CommandResult, _Mapping]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id", "after_sequence", "frames", "checkpoints")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_sequence: int
    frames: FrameOptions
    checkpoints: CheckpointOptions
    def __init__(self, job_id: _Optional[str] = ..., after_sequence: _Optional[int] = ..., frames: _Optional[_Union[FrameOptions, _Mapping]] = ..., checkpoints: _Optional[_Union[CheckpointOptions, _Mapping]] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: JobEvent
    def __init__(self, event: _Optional[_Union[JobEvent, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: Job
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ...) -> None: ...

class UploadImageRequest(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class UploadImageResponse(_message.Message):
    __slots__ = ("digest", "width", "height")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    width: int
    height: int
    def __init__(self, digest: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_image_bytes", "max_image_pixels", "max_size", "max_styles", "max_iterations", "max_queued", "max_detach_s", "max_kept_s", "max_kept", "max_kept_bytes", "max_blocked_s", "max_running", "max_paused_s", "max_checkpoint_bytes", "max_uploads_bytes", "max_watchers", "max_message_bytes", "max_receiving_bytes", "max_sending_bytes", "max_decoded_bytes", "max_idle_s", "max_connections", "max_calls", "max_calls_per_connection", "max_parked_bytes", "max_decoders")
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_STYLES_FIELD_NUMBER: _ClassVar[int]
    MAX_ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_FIELD_NUMBER: _ClassVar[int]
    MAX_DETACH_S_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_FIELD_NUMBER: _ClassVar[int]
    MAX_KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKED_S_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_PAUSED_S_FIELD_NUMBER: _ClassVar[int]
    MAX_CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOADS_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_WATCHERS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RECEIVING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IDLE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_PER_CONNECTION_FIELD_NUMBER: _ClassVar[int]
    MAX_PARKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODERS_FIELD_NUMBER: _ClassVar[int]
    max_image_bytes: int
    max_image_pixels: int
    max_size: int
    max_styles: int
    max_iterations: int
    max_queued: int
    max_detach_s: int
    max_kept_s: int
    max_kept: int
    max_kept_bytes: int
    max_blocked_s: int
    max_running: int
    max_paused_s: int
    max_checkpoint_bytes: int
    max_uploads_bytes: int
    max_watchers: int
    max_message_bytes: int
    max_receiving_bytes: int
    max_sending_bytes: int
    max_decoded_bytes: int
    max_idle_s: int
    max_connections: int
    max_calls: int
    max_calls_per_connection: int
    max_parked_bytes: int
    max_decoders: int
    def __init__(self, max_image_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_size: _Optional[int] = ..., max_styles: _Optional[int] = ..., max_iterations: _Optional[int] = ..., max_queued: _Optional[int] = ..., max_detach_s: _Optional[int] = ..., max_kept_s: _Optional[int] = ..., max_kept: _Optional[int] = ..., max_kept_bytes: _Optional[int] = ..., max_blocked_s: _Optional[int] = ..., max_running: _Optional[int] = ..., max_paused_s: _Optional[int] = ..., max_checkpoint_bytes: _Optional[int] = ..., max_uploads_bytes: _Optional[int] = ..., max_watchers: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_receiving_bytes: _Optional[int] = ..., max_sending_bytes: _Optional[int] = ..., max_decoded_bytes: _Optional[int] = ..., max_idle_s: _Optional[int] = ..., max_connections: _Optional[int] = ..., max_calls: _Optional[int] = ..., max_calls_per_connection: _Optional[int] = ..., max_parked_bytes: _Optional[int] = ..., max_decoders: _Optional[int] = ...) -> None: ...

class CacheStats(_message.Message):
    __slots__ = ("hits", "misses", "bytes", "max_bytes")
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    hits: int
    misses: int
    bytes: int
    max_bytes: int
    def __init__(self, hits: _Optional[int] = ..., misses: _Optional[int] = ..., bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class PresetRecipe(_message.Message):
    __slots__ = ("name", "recipe")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    recipe: Recipe
    def __init__(self, name: _Optional[str] = ..., recipe: _Optional[_Union[Recipe, _Mapping]] = ...) -> None: ...

class LibraryOp(_message.Message):
    __slots__ = ("name", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "device", "precision", "backbone", "weights", "layers", "limits", "presets", "running_jobs", "queued_jobs", "paused_jobs", "style_cache", "uploads", "estimated_wait", "library_ops", "self_test_time")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_JOBS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_JOBS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_JOBS_FIELD_NUMBER: _ClassVar[int]
    STYLE_CACHE_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    LIBRARY_OPS_FIELD_NUMBER: _ClassVar[int]
    SELF_TEST_TIME_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    precision: str
    backbone: str
    weights: str
    layers: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    presets: _containers.RepeatedCompositeFieldContainer[PresetRecipe]
    running_jobs: int
    queued_jobs: int
    paused_jobs: int
    style_cache: CacheStats
    uploads: CacheStats
    estimated_wait: _duration_pb2.Duration
    library_ops: _containers.RepeatedCompositeFieldContainer[LibraryOp]
    self_test_time: _duration_pb2.Duration
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., precision: _Optional[str] = ..., backbone: _Optional[str] = ..., weights: _Optional[str] = ..., layers: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., presets: _Optional[_Iterable[_Union[PresetRecipe, _Mapping]]] = ..., running_jobs: _Optional[int] = ..., queued_jobs: _Optional[int] = ..., paused_jobs: _Optional[int] = ..., style_cache: _Optional[_Union[CacheStats, _Mapping]] = ..., uploads: _Optional[_Union[CacheStats, _Mapping]] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., library_ops: _Optional[_Iterable[_Union[LibraryOp, _Mapping]]] = ..., self_test_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
