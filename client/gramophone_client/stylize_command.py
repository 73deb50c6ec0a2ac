"""`gramophone stylize`: one job from files to files."""

from __future__ import annotations

import argparse
import asyncio

from gramophone import recipe as recipes
from gramophone_client.client import GramophoneClient
from gramophone_client.errors import GramophoneError
from gramophone_client.flags import recipe_overrides
from gramophone_client.job_spec import Style
from gramophone_client.outputs import Display, Outputs, Unusable, display
from gramophone_client.picture import format_of

__all__ = ["stylize"]


def stylize(args: argparse.Namespace) -> None:
    """Runs the command. Raises `Unusable`, `InvalidRecipe`, `GramophoneError`, OSError and KeyboardInterrupt."""
    job = _Job(args)
    try:
        with display(args) as shown:
            asyncio.run(job.run(shown))
    except (KeyboardInterrupt, GramophoneError):
        job.keep_unfinished()
        raise
    print(args.out)


class _Job(Outputs):
    """One run of `stylize`: checks everything that can be checked before a server is asked, then keeps what comes."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        for path in (args.content, *args.styles, args.start_image):
            if path and not path.is_file():
                raise Unusable(f"{path}: {'is not a file' if path.exists() else 'there is no such file'}")
        self.styles = _styles(args)
        self.overrides = recipe_overrides(args)
        recipes.preset(args.preset, **self.overrides)  # raises; the server would say the same, but later
        self.make_frames_folder()

    async def run(self, shown: Display | None) -> None:
        """The job, from the server's first answer to the files on disk."""
        args = self.args
        async with GramophoneClient(args.server, timeout_s=args.timeout) as client:
            if args.wait:
                await client.wait_until_ready(args.wait)
            updates = client.stream(
                args.content,
                self.styles,
                frames=self.frame_options(),
                preset=args.preset,
                seed=args.seed,
                start_image=args.start_image,
                result_format=format_of(self.out),
                result_quality=args.result_quality,
                detach_grace=args.detach or None,
                **self.overrides,
            )
            await self.follow(updates, shown)


def _styles(args: argparse.Namespace) -> list[Style]:
    weights = args.style_weights or [1.0] * len(args.styles)
    if len(weights) != len(args.styles):
        raise Unusable(f"--style-weights: expected one for each of {len(args.styles)} styles, got {len(weights)}")
    return [Style(path, weight) for path, weight in zip(args.styles, weights, strict=True)]
