"""Gramophone's client: paint a photo in the style of a picture, over gRPC, and watch it form.

with GramophoneClient() as client:
    client.stylize("photo.jpg", "painting.jpg").save("out.png")
"""

import importlib.metadata as _metadata
import logging as _logging
import typing as _typing

import gramophone_client.transport.grpc_import as _grpc_import  # noqa: F401  # before the others

# isort: split

from gramophone.recipe import PRESETS, LayerWeight, Normalisation, Optimiser, Pooling, Recipe, Start, Violation
from gramophone_client.async_client import AsyncGramophoneClient
from gramophone_client.blocking.job_streams import JobControl, JobStream
from gramophone_client.client import GramophoneClient
from gramophone_client.deprecations import of_old_name as _of_old_name
from gramophone_client.errors import (
    AccessDeniedError,
    CallCancelledError,
    ClientClosedError,
    ClientUsageError,
    ConnectionFailedError,
    DeadlineExceededError,
    DeadlineUnattainableError,
    DivergedError,
    ErrorReason,
    ExhaustedError,
    GramophoneError,
    ImageNotFoundError,
    InvalidRequestError,
    JobControlledError,
    JobEndedError,
    JobNotFoundError,
    ListingDisabledError,
    MessageTooLargeError,
    NotReadyError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestIdTakenError,
    ServerBusyError,
    ServerFailedError,
    ShuttingDownError,
    SlowReaderError,
    SlowSenderError,
    TooManyWatchersError,
)
from gramophone_client.streams.job_control import AsyncJobControl
from gramophone_client.streams.job_stream import AsyncJobStream
from gramophone_client.transport.call_options import Metadata
from gramophone_client.types.options import (
    CheckpointOptions,
    FrameOptions,
    ImageInput,
    JobOptions,
    Style,
    Styles,
    UploadedImage,
)
from gramophone_client.types.picture import Picture
from gramophone_client.types.recipe_metadata import ImageRecipe, NoRecipeError, recipe_of
from gramophone_client.types.server_info import CacheStats, Limits, ServerInfo
from gramophone_client.types.updates import (
    Accepted,
    Changed,
    Checkpoint,
    Frame,
    JobState,
    JobStatus,
    Losses,
    Paused,
    Progress,
    Result,
    Resumed,
    StopReason,
    Stylized,
    Update,
    UploadProgress,
    Waiting,
)

__all__ = [
    "PRESETS",
    "Accepted",
    "AccessDeniedError",
    "AsyncGramophoneClient",
    "AsyncJobControl",
    "AsyncJobStream",
    "CacheStats",
    "CallCancelledError",
    "Changed",
    "Checkpoint",
    "CheckpointOptions",
    "ClientClosedError",
    "ClientUsageError",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "DeadlineUnattainableError",
    "DivergedError",
    "ErrorReason",
    "ExhaustedError",
    "Frame",
    "FrameOptions",
    "GramophoneClient",
    "GramophoneError",
    "ImageInput",
    "ImageNotFoundError",
    "ImageRecipe",
    "InvalidRequestError",
    "JobControl",
    "JobControlledError",
    "JobEndedError",
    "JobNotFoundError",
    "JobOptions",
    "JobState",
    "JobStatus",
    "JobStream",
    "LayerWeight",
    "Limits",
    "ListingDisabledError",
    "Losses",
    "MessageTooLargeError",
    "Metadata",
    "NoRecipeError",
    "Normalisation",
    "NotReadyError",
    "Optimiser",
    "OutOfDeviceMemoryError",
    "Paused",
    "Picture",
    "Pooling",
    "Progress",
    "QueueFullError",
    "Recipe",
    "RequestIdTakenError",
    "Result",
    "Resumed",
    "ServerBusyError",
    "ServerFailedError",
    "ServerInfo",
    "ShuttingDownError",
    "SlowReaderError",
    "SlowSenderError",
    "Start",
    "StopReason",
    "Style",
    "Styles",
    "Stylized",
    "TooManyWatchersError",
    "Update",
    "UploadProgress",
    "UploadedImage",
    "Violation",
    "Waiting",
    "recipe_of",
]

__version__: str

# The program decides what of the log is shown.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())

if not _typing.TYPE_CHECKING:  # unseen by type checkers, which would accept any name otherwise

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return _metadata.version("gramophone")
        return _of_old_name(__name__, name)
