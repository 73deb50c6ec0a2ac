"""`gramophone control`: controls a running job by single keys or by options."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gramophone.recipe import OTHER_NAMES
from gramophone.values import nearest
from gramophone_client.commands.clients import async_client
from gramophone_client.console.keyboard import pressed_keys
from gramophone_client.console.outputs import Display, UsageError, display
from gramophone_client.console.recipe_flags import value_of
from gramophone_client.console.targets import Target, chosen_target
from gramophone_client.errors import InvalidRequestError, JobEndedError
from gramophone_client.streams.job_control import AsyncJobControl
from gramophone_client.types.options import Changes, FrameOptions
from gramophone_client.types.updates import Accepted, Changed, Paused, Resumed

__all__ = ["CHANGEABLE", "KEYS_HELP", "change", "control"]

CHANGEABLE = list(Changes.__annotations__)  # fields of a recipe
KEYS_HELP = "p pause or go on, + - style strength, s save the picture, c checkpoint, f finish, q leave"
BETA_FACTOR = 1.25  # + multiplies beta by it, - divides
PREVIEW = FrameOptions(min_interval_s=0.2, max_side=360, max_in_flight=2)


def change(text: str) -> tuple[str, Any]:
    """Parses a change like `beta=5`. Raises argparse.ArgumentTypeError."""
    name, equals, value = text.partition("=")
    field = name.replace("-", "_")
    if not equals or field not in CHANGEABLE:
        flags = [field.replace("_", "-") for field in CHANGEABLE]
        meant = nearest(name, CHANGEABLE, OTHER_NAMES) if field not in CHANGEABLE else None
        raise argparse.ArgumentTypeError(
            f"expected FIELD=VALUE with a field of {', '.join(flags)}, got {text!r}"
            + (f"; did you mean {meant.replace('_', '-')}?" if meant else "")
        )
    try:
        return field, value_of(field, value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None


def control(args: argparse.Namespace) -> None:
    """Runs the command. Raises `UsageError`, `GramophoneError`, OSError and KeyboardInterrupt."""
    for path in (args.save, args.checkpoint):
        if path and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    if args.pause or args.resume or args.changes or args.save or args.checkpoint or args.finish:
        asyncio.run(_by_options(chosen_target(args), args))
    elif sys.stdin.isatty():
        target = chosen_target(args)
        with display(args) as shown:
            asyncio.run(_by_keys(target, args, shown))
    else:
        raise UsageError(
            "standard input is not a terminal, so that no keys can be read; use --pause, --resume, --set, --save, "
            "--checkpoint or --finish"
        )


async def _by_options(target: Target, args: argparse.Namespace) -> None:
    async with (
        async_client(target, args) as client,
        client.control_job(args.job_id, frames=None, detach_grace=args.detach) as job,
    ):
        if args.pause:
            print(f"paused before iteration {await job.pause()}")
        if args.resume:
            print(f"goes on with iteration {await job.resume()}")
        if args.changes:
            print(f"changed from iteration {await job.update(**dict(args.changes))} on")
        if args.save:
            (await job.picture()).picture.save(args.save)
            print(args.save)
        if args.checkpoint:
            (await job.checkpoint()).save(args.checkpoint)
            print(args.checkpoint)
        if args.finish:
            await job.finish()
            print(f"finished after {(await job.result()).iterations} iterations")


async def _by_keys(target: Target, args: argparse.Namespace, shown: Display | None) -> None:
    async with async_client(target, args) as client:
        frames = PREVIEW if args.preview else None
        async with client.control_job(args.job_id, frames=frames, detach_grace=args.detach) as job:
            with pressed_keys(sys.stdin) as keys:
                await _KeyControl(job, shown).run(keys)


class _KeyControl:
    """Turns keys into commands for a job, and shows its updates."""

    def __init__(self, job: AsyncJobControl, shown: Display | None) -> None:
        self._job = job
        self._shown = shown
        self._name = ""  # of the files that are saved
        self._beta = 0.0
        self._paused = False

    async def run(self, keys: asyncio.Queue[str]) -> None:
        """Returns at the end of the job or at "q"."""
        self._print_line(KEYS_HELP)
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                key = asyncio.create_task(keys.get())
                await asyncio.wait({watching, key}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    key.cancel()
                    return await watching
                if key.result() == "q":
                    return
                await self._press(key.result())
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({watching})

    async def _watch(self) -> None:
        async for update in self._job:
            match update:
                case Accepted():
                    self._name, self._beta = update.job_id[:8], update.recipe.beta
                case Paused() | Resumed():
                    self._paused = isinstance(update, Paused)
                case Changed():
                    self._beta = update.recipe.beta
            if self._shown is not None:
                self._shown.show(update)

    async def _press(self, key: str) -> None:
        try:
            match key:
                case "p":
                    await (self._job.resume() if self._paused else self._job.pause())
                case "+":
                    await self._job.update(beta=self._beta * BETA_FACTOR)
                case "-":
                    await self._job.update(beta=self._beta / BETA_FACTOR)
                case "s":
                    frame = await self._job.picture()
                    path = Path(f"{self._name}-{frame.iteration:04d}.png")
                    frame.picture.save(path)
                    self._print_line(f"the picture after iteration {frame.iteration} is kept as {path}")
                case "c":
                    checkpoint = await self._job.checkpoint()
                    path = Path(f"{self._name}-{checkpoint.iteration:04d}.checkpoint")
                    checkpoint.save(path)
                    self._print_line(f"the state after iteration {checkpoint.iteration} is kept as {path}")
                case "f":
                    await self._job.finish()
                case _:
                    self._print_line(KEYS_HELP)
        except InvalidRequestError as error:
            self._print_line(str(error))
        except JobEndedError:
            pass  # `_watch` has the result

    def _print_line(self, text: str) -> None:
        if self._shown is not None:
            self._shown.print_line(text)
