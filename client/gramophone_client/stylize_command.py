"""`gramophone stylize`: one job from files to files."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import AbstractContextManager, aclosing, nullcontext
from pathlib import Path

from rich.console import Console

from gramophone import recipe as recipes
from gramophone_client.client import GramophoneClient
from gramophone_client.errors import GramophoneError
from gramophone_client.flags import recipe_overrides
from gramophone_client.job_spec import FrameOptions, Style
from gramophone_client.picture import format_of
from gramophone_client.terminal import LiveDisplay, PlainDisplay, complain
from gramophone_client.timelapse import Timelapse
from gramophone_client.updates import Accepted, Frame, Result

__all__ = ["Unusable", "stylize"]

CALM_INTERVAL_S = 2.0  # between frames that nobody looks at unless the job ends early
LIVELY_INTERVAL_S = 0.2


class Unusable(Exception):
    """The command line, or a file that it names, cannot be used; the text says why."""


def stylize(args: argparse.Namespace) -> None:
    """Runs the command. Raises `Unusable`, `InvalidRecipe`, `GramophoneError`, OSError and KeyboardInterrupt."""
    job = _Job(args)
    try:
        with _display(args) as display:
            asyncio.run(job.run(display))
    except (KeyboardInterrupt, GramophoneError):
        job.keep_unfinished()
        raise
    print(args.out)


class _Job:
    """One run of `stylize`: checks everything that can be checked before a server is asked, then keeps what comes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.out_is_old = self.out.exists()
        for path in (self.out, args.timelapse):
            if path and not path.parent.is_dir():
                raise Unusable(f"{path}: there is no folder {path.parent}; make it first")
        for path in (args.content, *args.styles, args.start_image):
            if path and not path.is_file():
                raise Unusable(f"{path}: {'is not a file' if path.exists() else 'there is no such file'}")
        self.styles = _styles(args)
        self.overrides = recipe_overrides(args)
        recipes.preset(args.preset, **self.overrides)  # raises; the server would say the same, but later
        if args.frames:
            args.frames.mkdir(parents=True, exist_ok=True)
            if old := next(args.frames.glob("frame-*"), None):
                raise Unusable(f"{old}: frames of another run would be mixed with these; name an empty folder")
        self.accepted: Accepted | None = None
        self.frame: Frame | None = None
        self.frames_written = 0
        self.timelapse: Timelapse | None = None

    async def run(self, display: LiveDisplay | PlainDisplay | None) -> None:
        """The job, from the server's first answer to the files on disk."""
        args = self.args
        async with GramophoneClient(args.server, timeout_s=args.timeout) as client:
            if args.wait:
                await client.wait_until_ready(args.wait)
            updates = client.stream(
                args.content,
                self.styles,
                frames=self._frame_options(),
                preset=args.preset,
                seed=args.seed,
                start_image=args.start_image,
                result_format=format_of(self.out),
                result_quality=args.result_quality,
                **self.overrides,
            )
            async with aclosing(updates):
                async for update in updates:
                    if display is not None:
                        display.show(update)
                    match update:
                        case Accepted():
                            self.accepted = update
                            if args.timelapse:
                                self.timelapse = Timelapse((update.width, update.height))
                        case Frame():
                            self._keep_frame(update)
                        case Result():
                            update.save(self.out)
                            self.frame = None  # nothing is unfinished any more
                            if self.timelapse is not None:
                                self.timelapse.save(args.timelapse, last=update.picture)

    def keep_unfinished(self) -> None:
        """Writes the newest frame as OUT, or beside it if an older picture is there, and says so."""
        if self.frame is None:
            return
        path = self.out.with_stem(f"{self.out.stem}-unfinished") if self.out_is_old else self.out
        self.frame.picture.save(path)
        of = f" of {self.accepted.iterations}" if self.accepted is not None else ""
        complain(f"the picture after iteration {self.frame.iteration}{of} is kept as {path}")

    def _keep_frame(self, frame: Frame) -> None:
        self.frame = frame
        if self.timelapse is not None:
            self.timelapse.add(frame.picture)
        if self.args.frames:
            self.frames_written += 1
            suffix = "jpg" if frame.picture.format == "jpeg" else frame.picture.format
            frame.picture.save(self.args.frames / f"frame-{self.frames_written:04d}.{suffix}")

    def _frame_options(self) -> FrameOptions:
        args = self.args
        if args.frame_every or args.frames:
            interval_s = 0.0
        else:
            interval_s = LIVELY_INTERVAL_S if args.timelapse or args.preview else CALM_INTERVAL_S
        return FrameOptions(every_iterations=args.frame_every, min_interval_s=interval_s, max_side=args.frame_size)


def _display(args: argparse.Namespace) -> AbstractContextManager[LiveDisplay | PlainDisplay | None]:
    if args.quiet:
        return nullcontext()
    console = Console(stderr=True)
    return LiveDisplay(console, preview=args.preview) if console.is_terminal else PlainDisplay(sys.stderr)


def _styles(args: argparse.Namespace) -> list[Style]:
    weights = args.style_weights or [1.0] * len(args.styles)
    if len(weights) != len(args.styles):
        raise Unusable(f"--style-weights: expected one for each of {len(args.styles)} styles, got {len(weights)}")
    return [Style(path, weight) for path, weight in zip(args.styles, weights, strict=True)]
