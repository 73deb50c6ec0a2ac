"""The files and the display of `gramophone stylize` and `gramophone watch`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from rich.console import Console

from gramophone_client.console.display import LiveDisplay, PlainDisplay, print_errors
from gramophone_client.console.timelapse import Timelapse
from gramophone_client.errors import GramophoneError, NotReadyError, QueueFullError, ServerBusyError
from gramophone_client.types.options import FrameOptions
from gramophone_client.types.updates import Accepted, Checkpoint, Frame, Result, Update, UploadProgress

__all__ = ["Display", "Outputs", "UsageError", "display", "showing_waits"]

FALLBACK_INTERVAL_S = 2.0  # between frames that are used only if the job ends early
DISPLAY_INTERVAL_S = 0.2  # between frames of a preview or a film
WAIT_SHOWN_AFTER_S = 1.0
WAIT_INTERVAL_S = 0.25  # between two looks at what a job waits for

Display = LiveDisplay | PlainDisplay


class Waits(Protocol):
    """What a job waits for, see `AsyncJobStream`."""

    @property
    def upload_progress(self) -> UploadProgress | None: ...
    @property
    def loss(self) -> GramophoneError | None: ...


class UsageError(Exception):
    """The command line, or a file that it names, cannot be used; the message states why."""


def display(args: argparse.Namespace) -> AbstractContextManager[Display | None]:
    """The display that suits standard error; None with --quiet."""
    if args.quiet:
        return nullcontext()
    console = Console(stderr=True)
    return LiveDisplay(console, preview=args.preview) if console.is_terminal else PlainDisplay(sys.stderr)


@asynccontextmanager
async def showing_waits(job: Waits, shown: Display | None) -> AsyncIterator[None]:
    """Shows in its block what a job waits for beside its updates, whenever that takes longer than a second: how much
    has been uploaded, and that its server is lost."""

    async def watch(display: Display) -> None:
        since_s: float | None = None
        while True:
            await asyncio.sleep(WAIT_INTERVAL_S)
            progress, loss = job.upload_progress, job.loss
            if progress is None and loss is None:
                since_s = None
                continue
            since_s = time.monotonic() if since_s is None else since_s
            waited_s = time.monotonic() - since_s
            if waited_s < WAIT_SHOWN_AFTER_S:
                continue
            if progress is not None:
                sent, total = progress.sent_bytes / 2**20, progress.total_bytes / 2**20
                display.set_status(f"uploads images, {sent:.1f} of {total:.1f} MiB")
            elif loss is not None:
                display.set_status(f"{_lacking(loss)}, for {waited_s:.0f} s so far")

    watching = None if shown is None else asyncio.create_task(watch(shown))
    try:
        yield
    finally:
        if watching is not None:
            watching.cancel()


def _lacking(loss: GramophoneError) -> str:
    if isinstance(loss, NotReadyError):
        return "waits until the server is ready"
    if isinstance(loss, QueueFullError | ServerBusyError):
        return "waits until the server has room"
    return "the server is lost; looks for it, or for another one"


class Outputs:
    """The files that are written from one job's updates: OUT, --frames, --timelapse, --checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.out_is_old: bool = self.out.exists()
        self.checkpoint: Path | None = getattr(args, "checkpoint", None)  # `watch` has none
        for path in (self.out, args.timelapse, self.checkpoint):
            if path and not path.parent.is_dir():
                raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
        self.accepted: Accepted | None = None
        self.frame: Frame | None = None
        self.frames_written: int = 0
        self.timelapse: Timelapse | None = None

    def make_frames_folder(self) -> None:
        """Makes the folder of --frames. Raises `UsageError` if it is not empty. Call it after all other checks."""
        if self.args.frames:
            self.args.frames.mkdir(parents=True, exist_ok=True)
            if old := next(self.args.frames.glob("frame-*"), None):
                raise UsageError(f"{old}: frames of another run would be mixed with these; name an empty folder")

    def frame_options(self) -> FrameOptions:
        """The frames that the flags require."""
        args = self.args
        if args.frame_every or args.frames:
            interval_s = 0.0
        else:
            interval_s = DISPLAY_INTERVAL_S if args.timelapse or args.preview else FALLBACK_INTERVAL_S
        return FrameOptions(every_iterations=args.frame_every, min_interval_s=interval_s, max_side=args.frame_size)

    async def follow(self, updates: AsyncIterator[Update], display: Display | None) -> None:
        """Shows the updates and writes the files until the job ends."""
        args = self.args
        async for update in updates:
            if display is not None:
                display.show(update)
            match update:
                case Accepted():
                    self.accepted = update
                    if args.timelapse and self.timelapse is None:  # not again after the job was sent again
                        self.timelapse = Timelapse((update.width, update.height))
                case Frame():
                    self._keep_frame(update)
                case Checkpoint() if self.checkpoint is not None:
                    await asyncio.to_thread(update.save, self.checkpoint)
                case Result():
                    self.frame = None  # the result replaces it
                    update.save(self.out)
                    if self.timelapse is not None:
                        self.timelapse.save(args.timelapse, last=update.picture)

    def keep_unfinished(self) -> None:
        """Writes the newest frame as OUT, or next to an OUT that existed before. Prints its path, or the error."""
        if self.frame is None:
            return
        path = self.out.with_stem(f"{self.out.stem}-unfinished") if self.out_is_old else self.out
        try:
            self.frame.picture.save(path)
        except OSError as error:
            print_errors(f"the unfinished picture is lost: {path}: {error.strerror}")
            return
        of = f" of {self.accepted.iterations}" if self.accepted is not None else ""
        print_errors(f"the picture after iteration {self.frame.iteration}{of} is kept as {path}")

    def _keep_frame(self, frame: Frame) -> None:
        self.frame = frame
        if self.timelapse is not None:
            self.timelapse.add(frame.picture)
        if self.args.frames:
            self.frames_written += 1
            suffix = "jpg" if frame.picture.format == "jpeg" else frame.picture.format
            frame.picture.save(self.args.frames / f"frame-{self.frames_written:04d}.{suffix}")
