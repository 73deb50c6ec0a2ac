"""Jobs of a registry and their events, and what their watchers receive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import torch

from gramophone.recipe import Recipe
from gramophone_server.domain.events import Accepted, Event, Finished, Picture, Progress
from gramophone_server.domain.job import Losses, Report, StyleJob
from gramophone_server.domain.job_state import JobState
from gramophone_server.images.codec import Encoding, Format
from gramophone_server.jobs.job import Job
from gramophone_server.jobs.mailbox import Mailbox
from gramophone_server.jobs.registry import JobRegistry

LOSSES = Losses(content={"relu4_2": 1.0}, style={"relu1_1": 2.0}, tv=0.5)


def create(
    jobs: JobRegistry, request_id: str = "", grace_s: float = 0.0, owner: str = "", **size: int
) -> tuple[Job, Mailbox]:
    """A job that was accepted, and its first watcher; keyword arguments are width and height."""
    job = jobs.create(request_id, grace_s, Encoding(Format.PNG, 0), owner)
    watcher = job.watch()
    assert job.admit(_state(**size))
    job.publish(Accepted(0))
    return job, watcher


def picture() -> Picture:
    return Picture(lambda: torch.zeros(32, 64, 3, dtype=torch.uint8), 64, 32)


def progress(iteration: int) -> Progress:
    return Progress(Report(iteration, 1000, 64, 32, 1, 1, LOSSES, 0), 10.0, 1.0)


def finished() -> Finished:
    return Finished(picture(), LOSSES, 10, 1.0)


def unread(watcher: Mailbox) -> list[tuple[int, Any]]:
    """Reads all that the watcher can read now, as (number, event)."""
    items: list[tuple[int, Event | Any]] = []
    while (item := watcher.read_nowait()) is not None:
        items.append(item)
    return items


async def events_of(watcher: Mailbox) -> AsyncIterator[tuple[int, Any]]:
    """All events as (number, event), as a reader on the event loop takes them. Raises the error of the job."""
    while (item := await watcher.read()) is not None:
        yield item


def numbers(watcher: Mailbox) -> list[int]:
    return [number for number, _ in unread(watcher)]


def kinds(watcher: Mailbox) -> list[str]:
    return [type(event).__name__ for _, event in unread(watcher)]


def _state(width: int = 64, height: int = 32) -> JobState:
    recipe = Recipe(size=max(width, height), smallest_size=0, iterations=10)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return JobState(StyleJob(recipe=recipe, content=image, styles=(image,), style_weights=(1.0,), start=None, seed=1))
