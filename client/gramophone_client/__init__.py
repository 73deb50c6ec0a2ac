"""Gramophone's client: paint a photo in the style of a picture, over gRPC, and watch it form.

with SyncGramophoneClient() as client:
    client.stylize("photo.jpg", "painting.jpg").save("out.png")
"""

from gramophone.recipe import LayerWeight, Normalisation, Optimiser, Pooling, Recipe, Start, Violation
from gramophone_client.client import GramophoneClient
from gramophone_client.errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    Diverged,
    Exhausted,
    GramophoneError,
    InvalidRequest,
    JobNotFound,
    ListingDisabled,
    MessageTooLarge,
    NotReady,
    OutOfDeviceMemory,
    QueueFull,
    RequestIdTaken,
    ServerFailed,
    ShuttingDown,
    SlowReader,
)
from gramophone_client.job_spec import FrameOptions, Style
from gramophone_client.picture import Picture
from gramophone_client.sync_client import SyncGramophoneClient
from gramophone_client.updates import (
    Accepted,
    Frame,
    JobStatus,
    Limits,
    Losses,
    Progress,
    Result,
    ServerInfo,
    Stylized,
    Update,
    Waiting,
)

__all__ = [
    "Accepted",
    "Cancelled",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Diverged",
    "Exhausted",
    "Frame",
    "FrameOptions",
    "GramophoneClient",
    "GramophoneError",
    "InvalidRequest",
    "JobNotFound",
    "JobStatus",
    "LayerWeight",
    "Limits",
    "ListingDisabled",
    "Losses",
    "MessageTooLarge",
    "Normalisation",
    "NotReady",
    "Optimiser",
    "OutOfDeviceMemory",
    "Picture",
    "Pooling",
    "Progress",
    "QueueFull",
    "Recipe",
    "RequestIdTaken",
    "Result",
    "ServerFailed",
    "ServerInfo",
    "ShuttingDown",
    "SlowReader",
    "Start",
    "Style",
    "Stylized",
    "SyncGramophoneClient",
    "Update",
    "Violation",
    "Waiting",
]
