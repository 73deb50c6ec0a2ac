"""`gramophone watch`, `cancel` and `jobs`: commands for existing jobs."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from datetime import datetime

from gramophone_client.commands.clients import async_client, client
from gramophone_client.console.outputs import Display, Outputs, display
from gramophone_client.console.targets import chosen_target
from gramophone_client.errors import GramophoneError
from gramophone_client.types.updates import JobStatus

__all__ = ["cancel", "jobs", "watch"]


def watch(args: argparse.Namespace) -> None:
    """`gramophone watch`."""
    outputs, target = Outputs(args), chosen_target(args)
    outputs.make_frames_folder()

    async def follow(shown: Display | None) -> None:
        frames = outputs.frame_options()
        async with (
            async_client(target, args) as connected,
            connected.watch(args.job_id, frames=frames, detach_grace=args.detach) as updates,
        ):
            await outputs.follow(updates, shown)

    try:
        with display(args) as shown:
            asyncio.run(follow(shown))
    except (KeyboardInterrupt, GramophoneError, OSError):
        outputs.keep_unfinished()
        raise
    print(args.out)


def cancel(args: argparse.Namespace) -> None:
    """`gramophone cancel`."""
    with client(args) as connected:
        print(_line(connected.cancel_job(args.job_id)))


def jobs(args: argparse.Namespace) -> None:
    """`gramophone jobs`."""
    with client(args) as connected:
        statuses = connected.list_jobs()
    if args.json:
        print(json.dumps([asdict(job) for job in statuses], indent=2, default=datetime.isoformat))
    else:
        for job in statuses:
            print(_line(job))


def _line(job: JobStatus) -> str:
    words = [f"{job.job_id}  {job.state.lower():<9}", f"{job.iteration}/{job.iterations}"]
    if job.width:
        words.append(f"{job.width}x{job.height}")
    words.append(f"since {job.create_time.astimezone():%Y-%m-%d %H:%M:%S}")
    if job.queue_position:
        words.append(f"at place {job.queue_position} of the queue")
    return "  ".join(words)
