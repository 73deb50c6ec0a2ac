"""What a user writes. It is type-checked, not run."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import numpy as np
from PIL import Image

from gramophone_client import (
    PRESETS,
    Accepted,
    AsyncGramophoneClient,
    AsyncJobControl,
    AsyncJobStream,
    CallCancelledError,
    Changed,
    Checkpoint,
    CheckpointOptions,
    ClientUsageError,
    ConnectionFailedError,
    ErrorReason,
    Frame,
    FrameOptions,
    GramophoneClient,
    GramophoneError,
    ImageInput,
    ImageRecipe,
    InvalidRequestError,
    JobControl,
    JobOptions,
    JobState,
    JobStatus,
    JobStream,
    LayerWeight,
    Metadata,
    Normalisation,
    Optimiser,
    Paused,
    Pooling,
    Progress,
    QueueFullError,
    Recipe,
    Result,
    Resumed,
    Start,
    StopReason,
    Style,
    Styles,
    Stylized,
    Update,
    UploadedImage,
    Violation,
    Waiting,
    recipe_of,
)


def every_form_of_image(client: GramophoneClient) -> list[Stylized]:
    """Each of these is an image, alone or in a list."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    with open("photo.jpg", "rb") as file:
        images: list[ImageInput] = [
            "photo.jpg",
            Path("photo.jpg"),
            Path("photo.jpg").read_bytes(),
            bytearray(b"..."),
            memoryview(b"..."),
            io.BytesIO(b"..."),
            file,
            pixels,
            Image.new("RGB", (32, 32)),
            client.upload("painting.jpg"),
        ]
        return [client.stylize(image, images) for image in images]


def every_form_of_styles(painting: ImageInput, paths: list[Path], names: tuple[str, ...]) -> list[Styles]:
    """Each of these is a value for `styles`."""
    return [painting, paths, names, Style("a.jpg", 2), [Style("a.jpg"), ("b.jpg", 0.5), "c.jpg"], ("a.jpg", 0.5)]


def every_form_of_option(client: GramophoneClient) -> Stylized:
    """Options as they stand, and as one value."""
    job: JobOptions = {"preset": "quality", "beta": 5, "style_layers": {"relu1_1": 1, "relu2_1": 0.5}}
    client.stylize("photo.jpg", "painting.jpg", **job)
    return client.stylize(
        "photo.jpg",
        "painting.jpg",
        preset="textbook",
        seed=np.uint64(7),
        start_image=Path("start.png"),
        result_format="webp",
        result_quality=90,
        detach_grace=30,
        content_layers=["relu4_2", ("relu3_2", 0.5), LayerWeight("relu2_2", 0.25)],
        alpha=np.float32(1),
        normalisation="gatys",
        pooling=Pooling.AVERAGE,
        size=np.int64(512),
        start=Start.IMAGE,
        optimiser="adam",
        time_budget=2.5,
        timeout=60.0,
    )


def follow(client: GramophoneClient) -> Result | None:
    """A stream of updates."""
    with client.stream("photo.jpg", "painting.jpg", frames=FrameOptions(max_side=360, format="webp")) as updates:
        assert_type(updates, JobStream)
        assert_type(updates.job_id, str | None)
        for update in updates:
            assert_type(update, Update)
            show(update)
            if isinstance(update, Result):
                return update
    for update in client.watch("id", metadata={"x-team": "prints"}):
        show(update)
    return None


def show(update: Update) -> None:
    """All updates, and nothing else."""
    match update:
        case Accepted():
            assert_type(update.recipe, Recipe)
        case Waiting():
            assert_type(update.queue_position, int)
        case Progress():
            assert_type(update.losses.style_layers["relu1_1"], float)
        case Frame():
            assert_type(update.picture.image(), Image.Image)
        case Checkpoint():
            update.save("job.checkpoint")
        case Paused() | Resumed():
            assert_type(update.iteration, int)
        case Changed():
            assert_type(update.recipe.normalisation, Normalisation)
        case Result():
            assert_type(update.stop_reason, StopReason)
            update.save("out.png")


def steer(client: GramophoneClient) -> Result:
    """Control of a job."""
    with client.control("photo.jpg", "painting.jpg", checkpoints=CheckpointOptions(every_s=2.5)) as job:
        job.update(beta=8, style_layers={"relu1_1": 2.0}, iterations=200)
        assert_type(job, JobControl)
        assert_type(job.accepted, Accepted | None)
        assert_type(job.pause(), int)
        assert_type(job.picture(), Frame)
        assert_type(job.checkpoint(light=True), Checkpoint)
        job.resume()
        for update in job:
            if isinstance(update, Progress) and update.losses.total < 1:
                job.finish()
        return job.result()


def handle(client: GramophoneClient, photos: Sequence[str | os.PathLike[str]]) -> list[Violation]:
    """Errors."""
    wrong: list[Violation] = []
    for photo in photos:
        try:
            client.stylize(photo, "painting.jpg")
        except InvalidRequestError as error:
            wrong += error.violations
        except QueueFullError as error:
            print(error.retry_after_s)
        except (ConnectionFailedError, CallCancelledError, ClientUsageError):
            raise
        except GramophoneError as error:
            if error.reason is ErrorReason.DIVERGED or error.reason == "INTERNAL":
                print(error.code)
            if error.frame is not None:
                error.frame.picture.save("unfinished.png")
            if error.checkpoint is not None:
                client.stylize(photo, "painting.jpg", resume=error.checkpoint)
    return wrong


def look(client: GramophoneClient) -> None:
    """Everything else."""
    status = client.get_job("id")
    assert_type(status, JobStatus)
    assert_type(status.state, JobState)
    assert_type(status.stop_reason, StopReason | None)
    if status.state is JobState.FAILED or status.state == "CANCELLED":
        client.cancel_job(status.job_id)
    assert_type(client.list_jobs(), list[JobStatus])
    info = client.server_info()
    assert_type(info.presets["fast"].size, int)
    assert_type(info.limits.max_size, int)
    assert_type(recipe_of("out.png"), ImageRecipe)
    assert_type(PRESETS["fast"].optimiser, Optimiser)
    assert_type(client.upload("painting.jpg"), UploadedImage)


async def asynchronous() -> Stylized:
    """The twin for asyncio."""
    token: Metadata = [("authorization", "Bearer ..."), ("trace-bin", b"...")]
    async with AsyncGramophoneClient("gpu-1:50051", timeout=60.0, max_retries=0, metadata=token) as client:
        await client.wait_until_ready()
        async for update in client.stream("photo.jpg", "painting.jpg", optimiser=Optimiser.ADAM):
            show(update)
        async with client.stream("photo.jpg", "painting.jpg", patience=0) as updates:
            assert_type(updates, AsyncJobStream)
            assert_type(updates.accepted, Accepted | None)
            async for update in updates:
                show(update)
        async with client.control("photo.jpg", "painting.jpg") as job:
            assert_type(job, AsyncJobControl)
            assert_type(await job.update(beta=np.float64(3)), int)
            assert_type(await job.picture(), Frame)
            async for update in job:
                show(update)
        return await client.stylize("photo.jpg", ["a.jpg", "b.jpg"], size=256)


if __name__ == "__main__":
    with GramophoneClient() as connected:
        follow(connected)
    asyncio.run(asynchronous())
