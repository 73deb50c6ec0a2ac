"""`gramophone stylize`: runs one job, from files to files."""

from __future__ import annotations

import argparse
import asyncio
import sys

from gramophone import recipe as recipes
from gramophone_client.commands.clients import async_client
from gramophone_client.commands.local_server import LocalServerError, local_server, server_is_installed
from gramophone_client.console.display import print_errors
from gramophone_client.console.outputs import Display, Outputs, UsageError, display, showing_waits
from gramophone_client.console.recipe_flags import flag, recipe_overrides
from gramophone_client.console.targets import LOCAL, Target, chosen_target
from gramophone_client.errors import ConnectionFailedError, GramophoneError, NotReadyError
from gramophone_client.streams.recovery import PATIENCE_S
from gramophone_client.streams.recovery_states import is_job_loss
from gramophone_client.types.options import CheckpointOptions, Style
from gramophone_client.types.picture import format_of

__all__ = ["CHECKPOINT_EVERY_S", "stylize"]

CHECKPOINT_EVERY_S = 10.0  # a checkpoint with the optimiser's state can have tens of megabytes


def stylize(args: argparse.Namespace) -> None:
    """Runs the command. Raises `UsageError`, `InvalidRecipeError`, `GramophoneError`, `LocalServerError`, OSError and
    KeyboardInterrupt."""
    job = _Job(args)
    target = None if args.local else chosen_target(args)
    try:
        try:
            job.run(target)
        except ConnectionFailedError as error:
            if target is None or not job.may_run_locally(target, error):
                raise
            if not _agrees(target, args):
                error.add_note("or let the command start one for this job: add --local")
                raise
            job.run(None)
    except (KeyboardInterrupt, GramophoneError, LocalServerError, OSError) as error:
        job.keep_unfinished()
        if isinstance(error, GramophoneError):
            job.keep_checkpoint(error)
        if isinstance(error, KeyboardInterrupt) and args.detach and job.accepted is not None:
            job_id = job.accepted.job_id
            print_errors(
                f"job {job_id} continues for {args.detach:g} s; to follow it: gramophone watch {job_id} -o {args.out}"
            )
        raise
    print(args.out)


def _agrees(target: Target, args: argparse.Namespace) -> bool:
    """Asks in a terminal whether to start a server for this job. False elsewhere."""
    if args.quiet or not sys.stdin.isatty() or not sys.stderr.isatty():
        return False
    question = f"There is no server at {target.address}. Start one for this job? [Y/n] "
    print(question, end="", file=sys.stderr, flush=True)
    try:
        answer = sys.stdin.readline()  # not `input`, whose prompt would go to standard output
    except KeyboardInterrupt:
        print(file=sys.stderr)  # what follows is on a line of its own
        raise
    return bool(answer) and answer.strip().lower() in ("", "y", "yes")


class _Job(Outputs):
    """One run of `stylize`: checks all that can be checked without a server, then runs the job and writes its files."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        for path in (args.content, *args.styles, args.start_image, args.resume):
            if path and not path.is_file():
                raise UsageError(f"{path}: {'is not a file' if path.exists() else 'there is no such file'}")
        self.styles = _styles(args)
        self.overrides = recipe_overrides(args)
        if args.local:
            self._check_local()
        if args.resume:
            self._check_resumable()
        else:
            recipes.preset(args.preset or "fast", **self.overrides)  # raises, before the server would refuse it
        self.make_frames_folder()

    def run(self, target: Target | None) -> None:
        """Runs the job until its files are written; None: on a server that is started for it."""
        with display(self.args) as shown:
            if target is not None:
                asyncio.run(self._run(target, shown, patience=PATIENCE_S))
                return
            with local_server(shown.set_status if shown is not None else lambda _: None) as address:
                # A server that ends does not come back, so there is nothing to be patient for.
                asyncio.run(self._run(Target(address, LOCAL), shown, patience=0.0))

    def keep_checkpoint(self, error: GramophoneError) -> None:
        """Writes the newest state of a lost job, unless --checkpoint has it, and prints how to continue."""
        state, path = error.checkpoint, self.checkpoint
        if state is None or not is_job_loss(error):
            return
        if path is None:
            path = self.out.with_name(f"{self.out.stem}-unfinished.checkpoint")
            try:
                state.save(path)
            except OSError as failed:
                print_errors(f"the checkpoint is lost: {path}: {failed.strerror}")
                return
        print_errors(
            f"the checkpoint of iteration {state.iteration} is kept as {path}; to go on from it, run the command with "
            f"--resume {path} in place of its recipe"
        )

    def may_run_locally(self, target: Target, error: ConnectionFailedError) -> bool:
        """Whether the job, which ended with `error` at `target`, could be run on a server that is started for it."""
        is_missing = self.accepted is None and error.reason is None and not isinstance(error, NotReadyError)
        return is_missing and target.is_built_in and not self._not_for_local() and server_is_installed()

    async def _run(self, target: Target, shown: Display | None, *, patience: float) -> None:
        args = self.args
        # Without a file, light checkpoints are enough to continue from after the server is lost.
        checkpoints = (
            CheckpointOptions(every_s=CHECKPOINT_EVERY_S, light=False) if args.checkpoint else CheckpointOptions()
        )
        async with async_client(target, args) as client:
            updates = client.stream(
                args.content,
                self.styles,
                frames=self.frame_options(),
                checkpoints=checkpoints,
                patience=patience,
                resume=args.resume,
                preset=args.preset,
                seed=args.seed,
                start_image=args.start_image,
                result_format=format_of(self.out),
                result_quality=args.result_quality,
                detach_grace=args.detach or None,
                **self.overrides,
            )
            async with showing_waits(updates, shown), updates:
                await self.follow(updates, shown)

    def _not_for_local(self) -> list[str]:
        args = self.args
        options = {"--target": args.target, "--metadata": args.metadata, "--wait": args.wait, "--detach": args.detach}
        return [name for name, value in options.items() if value]

    def _check_local(self) -> None:
        if flags := self._not_for_local():
            raise UsageError(
                f"{', '.join(flags)}: cannot be given with --local, which starts a server for this job alone, waits "
                "until it is ready, and stops it at the end"
            )

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
