"""A hand on a job while it runs: commands and their answers beside its updates."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from gramophone.recipe import LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.errors import (
    Cancelled,
    GramophoneError,
    InvalidRequest,
    JobEnded,
    ServerFailed,
)
from gramophone_client.streams.recovery import Recovery, ResendableJob, is_lost
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import as_invalid_request, watch_request
from gramophone_client.types.options import CheckpointOptions, FrameOptions
from gramophone_client.types.updates import Accepted, Checkpoint, Frame, Paused, Result, Resumed, Update

__all__ = ["Changes", "JobControl"]


class Changes(TypedDict, total=False):
    """What `update` can change; ranges are those of a recipe."""

    alpha: float
    beta: float
    tv_weight: float
    step: float
    content_layers: Sequence[LayerWeight]  # the job's own layers, all of them, in the order of its recipe
    style_layers: Sequence[LayerWeight]
    iterations: int  # at the final size, those done there included


@dataclass
class _Command:
    """One that is sent until it is answered. `taken` is what it asks for, which comes behind the answer."""

    request: pb.StylizeInteractiveRequest
    is_replay: bool = False  # it holds already, and is told to a server that knows an older state of the job
    answer: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    taken: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def kind(self) -> str:
        return self.request.WhichOneof("command") or ""

    def fail(self, error: GramophoneError) -> None:
        """Raises the error for who waits."""
        for waited in (self.answer, self.taken):
            if not waited.done():
                waited.set_exception(error)
                waited.exception()  # nobody waits for both, and one that nobody waits for is no news


class JobControl:
    """A job under control, from `GramophoneClient.control` or `control_job`: an asynchronous context manager, and an
    asynchronous iterator of its updates.

    Commands can be given while somebody iterates and while nobody does. Each returns the first iteration for which it
    holds, the end the one that the result is of, or what it asked for; raises `InvalidRequest` with the fields that are
    wrong, after which everything goes on; and raises `JobEnded`, or the error that the job ended in, if it came too late.

    Updates that nobody takes make room for newer ones of their kind; the result is never lost. Up to
    `FrameOptions.max_in_flight` frames are on their way at a time. Leaving the context leaves the job as any watcher
    does, and gives up the control.

    A lost connection and a lost server are survived as `stream` does it. Commands that were not answered by then, or that
    are given meanwhile, are sent when the job is there again, which is harmless, since each says how things shall be and not
    by how much they shall change. A job that went on from a checkpoint is told all that had held once more: what
    `update` had changed, that it stands still, that it shall end. What is raised if it is given up has the newest `frame`
    and `checkpoint`.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        frames: FrameOptions | None,
        checkpoints: CheckpointOptions | None,
        timeout_s: float,
        grace_s: float,
        job_id: str = "",
        prepare: Callable[[], Awaitable[ResendableJob]] | None = None,
    ) -> None:
        self.accepted: Accepted | None = None  # set on entering, and again when the job was sent again
        self._connection = connection
        self._frames = frames
        self._checkpoints = checkpoints
        self._prepare = prepare
        self._job = Recovery(connection, timeout_s=timeout_s, grace_s=grace_s, job_id=job_id)
        self._outgoing: asyncio.Queue[pb.StylizeInteractiveRequest | None] = asyncio.Queue()
        self._obeyed = False  # the present call takes commands
        self._reader: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._commands: dict[int, _Command] = {}  # not answered yet, oldest first
        self._taking: dict[type, tuple[int, _Command]] = {}  # answered; what it asked for is of that iteration
        self._holds: dict[str, pb.StylizeInteractiveRequest] = {}  # what the answered commands come to, by kind
        self._untaken: dict[type, Update] = {}  # the newest of each kind, oldest first
        self._begun, self._news, self._over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._error: GramophoneError | None = None

    async def __aenter__(self) -> Self:
        self._job.begin(None if self._prepare is None else await self._prepare())
        self._reader = asyncio.create_task(self._follow())
        try:
            await self._begun.wait()
        except asyncio.CancelledError:
            self._reader.cancel()
            raise
        if self._error is not None and self.accepted is None:
            raise self._error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        while not self._untaken:
            if self._over.is_set():
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._untaken.pop(next(iter(self._untaken)))

    async def result(self) -> Result:
        """Waits for the end of the job and returns its result, which iterating tells all the same."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        assert self._job.result is not None  # a call that ends without has an error
        return self._job.result

    async def pause(self) -> int:
        """Lets the job stand still, until `resume` or the server's limit `max_paused_s`."""
        return await self._command(pause=pb.PauseCommand()).answer

    async def resume(self) -> int:
        """Lets a paused job go on."""
        return await self._command(resume=pb.ResumeCommand()).answer

    async def update(self, **changes: Unpack[Changes]) -> int:
        """Changes the job from its next iteration on; what is not given stays as it is."""
        command = pb.UpdateCommand()
        with as_invalid_request():
            for name, value in changes.items():
                if name not in Changes.__annotations__:
                    raise InvalidRequest(
                        f"{name} cannot be changed while a job runs; {', '.join(Changes.__annotations__)} can",
                        violations=(Violation(f"update.{name}", "cannot be changed while a job runs"),),
                    )
                if isinstance(value, Sequence):
                    layers = [pb.LayerWeight(layer=layer, weight=weight) for layer, weight in value]
                    getattr(command, name).CopyFrom(pb.LayerWeights(layers=layers))
                else:
                    setattr(command, name, value)
        return await self._command(update=command).answer

    async def picture(self) -> Frame:
        """The present picture, in its full size and without loss."""
        command = self._command(frame=pb.FrameCommand())
        await command.answer
        frame: Frame = await command.taken
        return frame

    async def checkpoint(self, *, light: bool = False) -> Checkpoint:
        """The job's present state; see `CheckpointOptions.light`."""
        command = self._command(checkpoint=pb.CheckpointCommand(light=light))
        await command.answer
        checkpoint: Checkpoint = await command.taken
        return checkpoint

    async def finish(self) -> int:
        """Ends the job with the present picture as its result, which `result` or iterating then tells. Returns the iteration
        that it is of."""
        return await self._command(finish=pb.FinishCommand()).answer

    async def _follow(self) -> None:
        """Reads what comes until the job has ended or is given up."""
        job = self._job
        try:
            sends = job.submission is not None
            while job.result is None:
                try:
                    await self._read(sends)
                    if job.result is None:
                        raise ServerFailed("the server ended the stream without a result")
                except GramophoneError as error:
                    if job.result is not None and is_lost(error):
                        break
                    sends = await job.next_attempt(error)
        except GramophoneError as error:
            self._error = job.with_partial_result(error)
        except asyncio.CancelledError:
            self._error = Cancelled("the control of the job was given up")
            raise
        finally:
            if job.result is not None and self._error is None:
                self._untaken[Result] = job.result  # told when the stream has ended, as `stream` does
            for command in (*self._commands.values(), *(command for _, command in self._taking.values())):
                self._refuse(command)
            self._begun.set()
            self._news.set()
            self._over.set()

    async def _read(self, sends: bool) -> None:
        """One call, to its end. It sends the job, or takes control of it where it was."""
        job, anew = self._job, sends and self.accepted is not None
        job.start_call()
        # Not `call.write`: a caller who gives up waiting for one would cancel the whole call.
        outgoing = self._outgoing = asyncio.Queue()
        outgoing.put_nowait(self._first(sends))
        call: Any = None
        try:
            with self._connection.errors_rebuilt(job.timeout_s):
                stylize = self._connection.service.StylizeInteractive
                call = self._connection.sending(stylize, _until_none(outgoing), job.left_s)
                if not sends and self.accepted is not None:  # a job that stands still has nothing else to tell
                    self._obey(anew)
                async for response in call:
                    if response.HasField("command_result"):
                        self._answer(response.command_result)
                    elif (arrived := job.take(response.event)) is not None:
                        self._take(arrived)
                    if not self._obeyed:  # the job's images are decoded, before that it takes no commands
                        self._obey(anew)
                    self._begun.set()
        finally:
            self._obeyed = False
            outgoing.put_nowait(None)
            if call is not None:
                call.cancel()

    def _first(self, sends: bool) -> pb.StylizeInteractiveRequest:
        job = self._job
        if sends and job.submission is not None:
            start = pb.StartCommand(spec=job.submission.spec, request_id=job.submission.request_id)
            return pb.StylizeInteractiveRequest(start=start)
        asked = watch_request(job.job_id, job.sequence, self._frames, self._checkpoints)
        attach = pb.AttachCommand(job_id=asked.job_id, after_sequence=asked.after_sequence)
        for name in ("frames", "checkpoints"):
            if asked.HasField(name):
                getattr(attach, name).CopyFrom(getattr(asked, name))
        return pb.StylizeInteractiveRequest(attach=attach)

    def _obey(self, anew: bool) -> None:
        """Sends all commands that were not answered, or whose pictures and states have not come; to a job that was sent
        anew, before them, those that hold."""
        waiting = [*(command for _, command in self._taking.values()), *self._commands.values()]
        if anew:
            waiting = [command for command in waiting if not command.is_replay]
            waiting[:0] = [_Command(request, is_replay=True) for request in self._holds.values()]
        self._taking.clear()
        self._commands.clear()
        self._obeyed = True
        for command in waiting:
            self._send(command)

    def _answer(self, answered: pb.CommandResult) -> None:
        command = self._commands.pop(answered.command_id, None)
        if command is None or command.answer.cancelled():  # its caller has given up
            return
        if answered.field_errors:
            violations = tuple(Violation(wrong.field, wrong.description) for wrong in answered.field_errors)
            words = "; ".join(f"{wrong.field}: {wrong.description}" for wrong in violations)
            if command.is_replay and command.kind == "update":  # pauses and ends may come too late without harm
                raise InvalidRequest(f"the job was sent again, and what had been changed is refused there: {words}")
            return command.fail(InvalidRequest(words, violations=violations))
        if not command.answer.done():
            command.answer.set_result(answered.iteration)
        if command.kind in TAKEN:
            self._taking[TAKEN[command.kind]] = answered.iteration, command
        elif command.kind == "update":
            held = self._holds.setdefault("update", pb.StylizeInteractiveRequest()).update
            for changed, _ in command.request.update.ListFields():
                held.ClearField(changed.name)  # merging lists would append
            held.MergeFrom(command.request.update)
        elif command.kind == "finish":
            self._holds["finish"] = command.request

    def _take(self, arrived: Update) -> None:
        kind = type(arrived)
        iteration, command = self._taking.get(kind, (None, None))
        if command is not None and isinstance(arrived, Frame | Checkpoint) and arrived.iteration == iteration:
            del self._taking[kind]
            if not command.taken.done():
                command.taken.set_result(arrived)
            return
        match arrived:
            case Accepted():
                self.accepted = arrived
            case Paused():
                self._holds["pause"] = pb.StylizeInteractiveRequest(pause=pb.PauseCommand())
            case Resumed():
                self._holds.pop("pause", None)
            case Result():
                return
        older = self._untaken.pop(kind, None)  # a newer one comes last again
        if isinstance(arrived, Frame):
            if self._frames is not None and self._frames.max_in_flight:
                # Now, not when it is taken: a caller who comes back after a second would find those that were sent at once.
                self._outgoing.put_nowait(pb.StylizeInteractiveRequest(ack=pb.AckCommand(sequence=arrived.sequence)))
            if isinstance(older, Frame):
                arrived = replace(arrived, dropped=arrived.dropped + older.dropped + 1)
        self._untaken[kind] = arrived
        self._news.set()

    def _command(self, **asked: Any) -> _Command:
        """Sends one; `asked` is its field of the request."""
        command = _Command(pb.StylizeInteractiveRequest(**asked))
        if self._over.is_set():
            self._refuse(command)
        else:
            self._send(command)
        return command

    def _send(self, command: _Command) -> None:
        """Now, or when the job is there again."""
        number = next(self._numbers)
        self._commands[number] = command
        if self._obeyed:
            numbered = pb.StylizeInteractiveRequest(command_id=number)
            numbered.MergeFrom(command.request)
            self._outgoing.put_nowait(numbered)

    def _refuse(self, command: _Command) -> None:
        """The job has ended."""
        command.fail(
            self._error or JobEnded(f"the job ended with its result before it took the command {command.kind!r}")
        )


TAKEN = {"frame": Frame, "checkpoint": Checkpoint}  # by the command that asks for it


async def _until_none(
    outgoing: asyncio.Queue[pb.StylizeInteractiveRequest | None],
) -> AsyncGenerator[pb.StylizeInteractiveRequest, None]:
    while (request := await outgoing.get()) is not None:
        yield request
