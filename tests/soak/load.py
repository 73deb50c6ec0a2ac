"""What users of a soaked server do: one habit after another, each with the ends that its jobs may have."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from gramophone_client import (
    Accepted,
    Cancelled,
    Checkpoint,
    CheckpointOptions,
    DeadlineExceeded,
    DeadlineUnattainable,
    FrameOptions,
    GramophoneClient,
    GramophoneError,
    InvalidRequest,
    JobEnded,
    JobNotFound,
    Progress,
    Update,
)
from gramophone_client.bench.pictures import synthetic
from tests.chaos.watch import Broken

USERS = 6
CALLS_PER_CONNECTION = 20
SIZES = (48, 64)  # pixels
CONTENTS = [synthetic(seed, 64) for seed in range(4)]
STYLES = [synthetic(100 + seed, 64, 16) for seed in range(8)]


class User:
    """Somebody who uses a server, now in this way, now in that."""

    def __init__(self, target: str, chance: random.Random, ends: Counter[tuple[str, str]]) -> None:
        self.target, self.chance, self.ends = target, chance, ends
        self.client: GramophoneClient

    async def use(self, over: asyncio.Event) -> None:
        """A stream, and then one habit after another until it is over. Raises `Broken` at an end that must not be."""
        names, is_first = list(HABITS), True
        while is_first or not over.is_set():
            async with GramophoneClient(self.target, timeout_s=3600) as self.client:
                for name in self.chance.choices(names, [HABITS[name].weight for name in names], k=CALLS_PER_CONNECTION):
                    if over.is_set() and not is_first:
                        break
                    await self._one("stream" if is_first else name)
                    is_first = False

    async def _one(self, name: str) -> None:
        habit = HABITS[name]
        try:
            end = await habit.act(self)
        except GramophoneError as error:
            if not isinstance(error, habit.ends):
                raise Broken(f"{name} ended in {type(error).__name__} ({error.code}): {error}") from error
            end = type(error).__name__
        self.ends[name, end] += 1

    def job(self, iterations: int = 8) -> dict[str, Any]:
        """A small job: its images and its recipe."""
        return {
            "content": self.chance.choice(CONTENTS),
            "styles": self.chance.choice(STYLES),
            "size": self.chance.choice(SIZES),
            "smallest_size": self.chance.choice((0, 32)),
            "iterations": iterations,
            "coarse_iterations": 4,
        }


async def asks(user: User) -> str:
    """A picture in one call."""
    await user.client.stylize(**user.job())
    return "result"


async def streams(user: User) -> str:
    """A picture while it forms."""
    image_format = user.chance.choice(("jpeg", "png", "webp"))
    async for _ in user.client.stream(frames=FrameOptions(format=image_format), **user.job(30)):
        pass
    return "result"


async def watches(user: User) -> str:
    """A job, and four more who look at it, from its beginning."""
    stream = user.client.stream(detach_grace=10, **user.job(30))
    job_id = await begun(stream)

    async def watch() -> None:
        async for _ in user.client.watch(job_id):
            pass

    await asyncio.gather(rest(stream), *(watch() for _ in range(4)))
    return "result"


async def cancels(user: User) -> str:
    """A job that is stopped by its id."""
    stream = user.client.stream(**user.job(1000))
    await user.client.cancel_job(await begun(stream))
    await rest(stream)
    return "result"


async def leaves(user: User) -> str:
    """A job that is left alone, with a grace or without."""
    grace_s = user.chance.choice((None, 0.2))
    async with aclosing(user.client.stream(detach_grace=grace_s, **user.job(200))) as stream:
        await begun(stream)
    return "left"


async def controls(user: User) -> str:
    """A job whose owner has a hand on it."""
    async with user.client.control(**user.job(400)) as job:
        await anext(job)
        async for update in job:
            if isinstance(update, Progress):
                break
        await job.update(beta=user.chance.uniform(1, 5))
        await job.pause()
        await job.picture()
        await job.checkpoint(light=user.chance.random() < 0.5)
        await job.resume()
        await job.finish()
        await job.result()
    return "result"


async def uploads(user: User) -> str:
    """An image that is sent once for two jobs. Half of them are new to the server, so that it must drop others."""
    seed = user.chance.randrange(8) if user.chance.random() < 0.5 else user.chance.randrange(10**6)
    image = await user.client.upload(synthetic(seed, 128))
    for _ in range(2):
        await user.client.stylize(**user.job() | {"content": image})
    return "result"


async def resumes(user: User) -> str:
    """A job that is left with a checkpoint, and goes on from it."""
    light, wanted = user.chance.random() < 0.5, user.job(30)
    stream = user.client.stream(checkpoints=CheckpointOptions(light=light), **wanted)
    async with aclosing(stream):
        async for update in stream:
            if isinstance(update, Checkpoint):
                break
        else:
            return "result without a checkpoint"
    await user.client.stylize(wanted["content"], wanted["styles"], resume=update)
    return "result"


async def errs(user: User) -> str:
    """What no server takes."""
    good = user.job()
    broken = user.chance.choice(
        [
            {"content": good["content"][: user.chance.randrange(1, 200)]},
            {"styles": user.chance.randbytes(500)},
            {"size": 10**6},
            {"iterations": -1},
            {"beta": float("nan")},
            {"resume": user.chance.randbytes(100), **dict.fromkeys(RECIPE)},
        ]
    )
    wanted = {name: value for name, value in (good | broken).items() if value is not None}
    await user.client.stylize(**wanted)
    return "result"


async def asks_for_what_is_not_there(user: User) -> str:
    """A job that nobody made."""
    await user.client.server_info()
    await user.client.get_job("no such job")
    return "found"


async def hurries(user: User) -> str:
    """A job that cannot be done in time."""
    await user.client.stylize(timeout_s=0.2, **user.job(2000))
    return "result"


RECIPE = ("size", "smallest_size", "iterations", "coarse_iterations")


@dataclass(frozen=True)
class Habit:
    """What is done, in which errors it may end, and how often it is done."""

    act: Callable[[User], Awaitable[str]]
    ends: tuple[type[GramophoneError], ...] = ()
    weight: float = 1.0


HABITS: Mapping[str, Habit] = {
    "ask": Habit(asks, weight=4),
    "stream": Habit(streams, weight=3),
    "watch": Habit(watches),
    "cancel": Habit(cancels, (Cancelled,), 2),
    "leave": Habit(leaves, weight=2),
    "control": Habit(controls, (JobEnded,)),
    "upload": Habit(uploads),
    "resume": Habit(resumes),
    "err": Habit(errs, (InvalidRequest,)),
    "look": Habit(asks_for_what_is_not_there, (JobNotFound, InvalidRequest)),
    "hurry": Habit(hurries, (DeadlineExceeded, DeadlineUnattainable)),
}


async def begun(stream: AsyncGenerator[Update, None]) -> str:
    """Reads until the job has done something; its id."""
    job_id = ""
    async for update in stream:
        if isinstance(update, Accepted):
            job_id = update.job_id
        elif isinstance(update, Progress):
            return job_id
    raise Broken("a job ended before it had begun")


async def rest(stream: AsyncGenerator[Update, None]) -> None:
    """Reads to the end."""
    async for _ in stream:
        pass
