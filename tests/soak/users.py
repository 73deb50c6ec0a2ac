"""The users of a soaked server: each performs one action after another, and each action has its allowed errors."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gramophone_client import (
    Accepted,
    AsyncGramophoneClient,
    CallCancelledError,
    Checkpoint,
    CheckpointOptions,
    DeadlineExceededError,
    DeadlineUnattainableError,
    FrameOptions,
    GramophoneError,
    InvalidRequestError,
    JobEndedError,
    JobNotFoundError,
    JobState,
    Progress,
    Update,
)
from gramophone_client.bench.pictures import synthetic
from tests.support.monitoring import RuleViolation

USERS = 6
CALLS_PER_CONNECTION = 20
SIZES = (48, 64)  # pixels
# Of an honest user; the longest takes seconds on a quiet server, also with the real engine. Beside hostile crowds a job
# may wait until each place was someone's for five seconds of the device, and then shares it with all of them: 52 s were
# seen beside other work. Only a server that hangs takes longer than this.
MAX_ACTION_S = 180.0
CONTENTS = [synthetic(seed, 64) for seed in range(4)]
STYLES = [synthetic(100 + seed, 64, 16) for seed in range(8)]


class User:
    """A user of a server, with random actions."""

    def __init__(
        self, target: str, rng: random.Random, ends: Counter[tuple[str, str]], slowest_s: dict[str, float]
    ) -> None:
        """``ends`` and ``slowest_s`` are shared by all users: how actions ended, and how long each took at most."""
        self.target, self.rng, self.ends, self.slowest_s = target, rng, ends, slowest_s
        self.client: AsyncGramophoneClient

    async def use_server(self, stop: asyncio.Event) -> None:
        """Streams one job, then performs random actions until `stop` is set.

        Raises `RuleViolation` if an action ends in an error that it does not allow.
        """
        names, is_first = list(ACTIONS), True
        while is_first or not stop.is_set():
            async with AsyncGramophoneClient(self.target, timeout=3600) as self.client:
                weights = [ACTIONS[name].weight for name in names]
                for name in self.rng.choices(names, weights, k=CALLS_PER_CONNECTION):
                    if stop.is_set() and not is_first:
                        break
                    await self._perform("stream" if is_first else name)
                    is_first = False

    async def _perform(self, name: str) -> None:
        action, start = ACTIONS[name], time.monotonic()
        try:
            async with asyncio.timeout(MAX_ACTION_S):
                end = await action.perform(self)
        except TimeoutError:
            jobs = await self._open_jobs()
            raise RuleViolation(f"{name} was not done within {MAX_ACTION_S:g} s; open jobs: {jobs or 'none'}") from None
        except GramophoneError as error:
            if not isinstance(error, action.errors):
                raise RuleViolation(f"{name} ended in {type(error).__name__} ({error.code}): {error}") from error
            end = type(error).__name__
        self.ends[name, end] += 1
        self.slowest_s[name] = max(self.slowest_s.get(name, 0.0), time.monotonic() - start)

    async def _open_jobs(self) -> str:
        """What the server is doing, for the report of a violation."""
        async with AsyncGramophoneClient(self.target) as client:
            jobs = [job for job in await client.list_jobs() if job.state in (JobState.RUNNING, JobState.QUEUED)]
        return ", ".join(f"{job.state} {job.iteration}/{job.iterations} {job.width}x{job.height}" for job in jobs)

    def job(self, iterations: int = 8) -> dict[str, Any]:
        """The images and the recipe of a small job."""
        return {
            "content": self.rng.choice(CONTENTS),
            "styles": self.rng.choice(STYLES),
            "size": self.rng.choice(SIZES),
            "smallest_size": self.rng.choice((0, 32)),
            "iterations": iterations,
            "coarse_iterations": 4,
        }


async def stylize(user: User) -> str:
    """Runs a job as a unary call."""
    await user.client.stylize(**user.job())
    return "result"


async def stream(user: User) -> str:
    """Streams a job with frames in a random format."""
    image_format = user.rng.choice(("jpeg", "png", "webp"))
    async for _ in user.client.stream(frames=FrameOptions(format=image_format), **user.job(30)):
        pass
    return "result"


async def watch(user: User) -> str:
    """Streams a job and watches it from its start with four more calls."""
    updates = user.client.stream(detach_grace=10, **user.job(30))
    job_id = await wait_until_started(updates)

    async def watch_job() -> None:
        async for _ in user.client.watch(job_id):
            pass

    await asyncio.gather(read_to_end(updates), *(watch_job() for _ in range(4)))
    return "result"


async def cancel(user: User) -> str:
    """Cancels a job by its id."""
    updates = user.client.stream(**user.job(1000))
    await user.client.cancel_job(await wait_until_started(updates))
    await read_to_end(updates)
    return "result"


async def leave(user: User) -> str:
    """Disconnects from a job, with or without a grace period."""
    grace_s = user.rng.choice((None, 0.2))
    async with user.client.stream(detach_grace=grace_s, **user.job(200)) as updates:
        await wait_until_started(updates)
    return "left"


async def control(user: User) -> str:
    """Sends every command of the interactive call to a job."""
    async with user.client.control(**user.job(400)) as job:
        await anext(job)
        async for update in job:
            if isinstance(update, Progress):
                break
        await job.update(beta=user.rng.uniform(1, 5))
        await job.pause()
        await job.picture()
        await job.checkpoint(light=user.rng.random() < 0.5)
        await job.resume()
        await job.finish()
        await job.result()
    return "result"


async def upload(user: User) -> str:
    """Uploads an image for two jobs. Half of the images are new to the server, so it must drop others."""
    seed = user.rng.randrange(8) if user.rng.random() < 0.5 else user.rng.randrange(10**6)
    image = await user.client.upload(synthetic(seed, 128))
    for _ in range(2):
        await user.client.stylize(**user.job() | {"content": image})
    return "result"


async def resume(user: User) -> str:
    """Disconnects from a job after a checkpoint, and resumes it from there."""
    light, job = user.rng.random() < 0.5, user.job(30)
    updates = user.client.stream(checkpoints=CheckpointOptions(light=light), **job)
    async with updates:
        async for update in updates:
            if isinstance(update, Checkpoint):
                break
        else:
            return "result without a checkpoint"
    await user.client.stylize(job["content"], job["styles"], resume=update)
    return "result"


async def send_invalid(user: User) -> str:
    """Sends a job that the server, and not the client alone, finds invalid in one way."""
    valid = user.job()
    changes = user.rng.choice(
        [
            {"content": valid["content"][: user.rng.randrange(1, 200)]},
            {"styles": user.rng.randbytes(500)},
            {"size": 16_384},
            {"iterations": 100_000},
            {"style_layers": {"relu9_9": 1.0}},
            {"resume": user.rng.randbytes(100), **dict.fromkeys(RECIPE)},
        ]
    )
    job = {name: value for name, value in (valid | changes).items() if value is not None}
    await user.client.stylize(**job)
    return "result"


async def get_missing(user: User) -> str:
    """Asks for a job that does not exist."""
    await user.client.server_info()
    await user.client.get_job("no such job")
    return "found"


async def miss_deadline(user: User) -> str:
    """Sends a job that cannot meet its deadline."""
    await user.client.stylize(timeout=0.2, **user.job(2000))
    return "result"


async def meet_deadline(user: User) -> str:
    """Sends a job with a deadline between half and three times of what such a job just took."""
    job = user.job(20)
    start = time.monotonic()
    await user.client.stylize(**job)
    took_s = time.monotonic() - start
    await user.client.stylize(timeout=took_s * user.rng.uniform(0.5, 3.0), **job)
    return "result"


RECIPE = ("size", "smallest_size", "iterations", "coarse_iterations")


@dataclass(frozen=True)
class Action:
    """An action of a user, the errors in which it may end, and its relative frequency."""

    perform: Callable[[User], Awaitable[str]]
    errors: tuple[type[GramophoneError], ...] = ()
    weight: float = 1.0


ACTIONS: Mapping[str, Action] = {
    "stylize": Action(stylize, weight=4),
    "stream": Action(stream, weight=3),
    "watch": Action(watch),
    "cancel": Action(cancel, (CallCancelledError,), 2),
    "leave": Action(leave, weight=2),
    "control": Action(control, (JobEndedError,)),
    "upload": Action(upload),
    "resume": Action(resume),
    "send invalid": Action(send_invalid, (InvalidRequestError,)),
    "get missing": Action(get_missing, (JobNotFoundError, InvalidRequestError)),
    "meet deadline": Action(meet_deadline, (DeadlineExceededError, DeadlineUnattainableError)),
    "miss deadline": Action(miss_deadline, (DeadlineExceededError, DeadlineUnattainableError)),
}


async def wait_until_started(updates: AsyncIterator[Update]) -> str:
    """Reads a job's updates until it has made progress. Returns its id."""
    job_id = ""
    async for update in updates:
        if isinstance(update, Accepted):
            job_id = update.job_id
        elif isinstance(update, Progress):
            return job_id
    raise RuleViolation("a job ended before it had started")


async def read_to_end(updates: AsyncIterator[Update]) -> None:
    """Reads all further updates."""
    async for _ in updates:
        pass
