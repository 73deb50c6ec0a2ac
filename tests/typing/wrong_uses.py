"""What a type checker must find. A line with an error ends in `# mypy's code, pyright's rule`."""

from __future__ import annotations

import io

from gramophone_client import (
    AsyncGramophoneClient,
    FrameOptions,
    GramophoneClient,
    JobOptions,
    JobState,
    Progress,
    Recipe,
    Style,
    Stylized,
    Update,
)


def images(client: GramophoneClient, update: Update) -> None:
    """What is no image."""
    client.stylize(None, "painting.jpg")  # arg-type, reportArgumentType
    client.stylize(5, "painting.jpg")  # arg-type, reportArgumentType
    client.stylize(io.StringIO("text"), "painting.jpg")  # arg-type, reportArgumentType
    client.stylize(["photo.jpg"], "painting.jpg")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", 5)  # arg-type, reportArgumentType
    client.upload(Style("painting.jpg"))  # arg-type, reportArgumentType


def options(client: GramophoneClient) -> None:
    """Options that do not exist, or have another type."""
    client.stylize("photo.jpg", "painting.jpg", sise=3)  # call-arg, reportCallIssue
    client.stylize("photo.jpg", "painting.jpg", size="big")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", size=512.0)  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", beta="5")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", optimiser="adma")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", normalisation=None)  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", style_layers={"relu1_1": "1"})  # dict-item, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", result_format="jpg")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", frames=FrameOptions())  # call-arg, reportCallIssue
    client.stylize("photo.jpg", "painting.jpg", "other.jpg")  # call-arg, reportCallIssue
    client.stream("photo.jpg", "painting.jpg", frames=FrameOptions(format="gif"))  # arg-type, reportArgumentType
    job: JobOptions = {"sise": 3}  # typeddict-unknown-key, reportAssignmentType
    client.stylize("photo.jpg", "painting.jpg", **job)


def values(client: GramophoneClient, update: Update, stylized: Stylized) -> None:
    """What values do not have."""
    print(update.losses)  # union-attr, reportAttributeAccessIssue
    stylized.seed = 3  # misc, reportAttributeAccessIssue
    Recipe(optimiser="adma")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", timeout="60")  # arg-type, reportArgumentType
    client.stylize("photo.jpg", "painting.jpg", timeout_s=60)  # call-arg, reportCallIssue
    GramophoneClient(metadata={"authorization": 5})  # dict-item, reportArgumentType
    GramophoneClient(retries=False)  # call-arg, reportCallIssue
    print(client.stream("photo.jpg", "painting.jpg").losses)  # attr-defined, reportAttributeAccessIssue
    print(client.get_job("id").state is JobState.DONE)  # attr-defined, reportAttributeAccessIssue
    with client.control("photo.jpg", "painting.jpg") as job:
        job.update(size=3)  # call-arg, reportCallIssue


async def asynchronous(client: AsyncGramophoneClient) -> None:
    """What is forgotten with asyncio."""
    stylized = client.stylize("photo.jpg", "painting.jpg")
    stylized.save("out.png")  # attr-defined, reportAttributeAccessIssue
    for update in client.stream("photo.jpg", "painting.jpg"):  # attr-defined, reportGeneralTypeIssues
        print(isinstance(update, Progress))
