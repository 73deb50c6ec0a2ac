"""`gramophone stylize`: runs one job, from files to files."""

from __future__ import annotations

import argparse
import asyncio

from gramophone import recipe as recipes
from gramophone_client.async_client import AsyncGramophoneClient
from gramophone_client.console.outputs import Display, Outputs, UsageError, display
from gramophone_client.console.recipe_flags import flag, recipe_overrides
from gramophone_client.errors import GramophoneError
from gramophone_client.types.options import CheckpointOptions, Style
from gramophone_client.types.picture import format_of

__all__ = ["CHECKPOINT_EVERY_S", "stylize"]

CHECKPOINT_EVERY_S = 10.0  # a checkpoint with the optimiser's state can have tens of megabytes


def stylize(args: argparse.Namespace) -> None:
    """Runs the command. Raises `UsageError`, `InvalidRecipeError`, `GramophoneError`, OSError and KeyboardInterrupt."""
    job = _Job(args)
    try:
        with display(args) as shown:
            asyncio.run(job.run(shown))
    except (KeyboardInterrupt, GramophoneError, OSError):
        job.keep_unfinished()
        raise
    print(args.out)


class _Job(Outputs):
    """One run of `stylize`: checks all that can be checked without a server, then runs the job and writes its files."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        for path in (args.content, *args.styles, args.start_image, args.resume):
            if path and not path.is_file():
                raise UsageError(f"{path}: {'is not a file' if path.exists() else 'there is no such file'}")
        self.styles = _styles(args)
        self.overrides = recipe_overrides(args)
        if args.resume:
            self._check_resumable()
        else:
            recipes.preset(args.preset or "fast", **self.overrides)  # raises, before the server would refuse it
        self.make_frames_folder()

    async def run(self, shown: Display | None) -> None:
        """Runs the job until its files are written."""
        args = self.args
        # Without a file, light checkpoints are enough to continue from after the server is lost.
        checkpoints = (
            CheckpointOptions(every_s=CHECKPOINT_EVERY_S, light=False) if args.checkpoint else CheckpointOptions()
        )
        async with AsyncGramophoneClient(args.server, timeout=args.timeout) as client:
            if args.wait:
                await client.wait_until_ready(args.wait)
            updates = client.stream(
                args.content,
                self.styles,
                frames=self.frame_options(),
                checkpoints=checkpoints,
                resume=args.resume,
                preset=args.preset,
                seed=args.seed,
                start_image=args.start_image,
                result_format=format_of(self.out),
                result_quality=args.result_quality,
                detach_grace=args.detach or None,
                **self.overrides,
            )
            await self.follow(updates, shown)

    def _check_resumable(self) -> None:
        args = self.args
        options = {"--preset": args.preset, "--seed": args.seed, "--start-image": args.start_image}
        flags = [name for name, value in options.items() if value is not None] + [flag(name) for name in self.overrides]
        if flags:
            raise UsageError(
                f"{', '.join(flags)}: cannot be given with --resume, which continues with the checkpoint's"
            )


def _styles(args: argparse.Namespace) -> list[Style]:
    weights = args.style_weights or [1.0] * len(args.styles)
    if len(weights) != len(args.styles):
        raise UsageError(f"--style-weights: expected one for each of {len(args.styles)} styles, got {len(weights)}")
    return [Style(path, weight) for path, weight in zip(args.styles, weights, strict=True)]
