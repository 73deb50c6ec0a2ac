"""A hand on a job while it runs: commands and their answers beside its updates."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from gramophone.recipe import LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client import uploads
from gramophone_client.connection import Connection
from gramophone_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    GramophoneError,
    InvalidRequest,
    JobEnded,
    JobNotFound,
    ServerFailed,
    is_forgotten,
)
from gramophone_client.job_spec import FrameOptions, UploadedImage, said, watch_request
from gramophone_client.messages import update
from gramophone_client.recovery import is_lost
from gramophone_client.updates import Accepted, Checkpoint, Frame, Result, Update

__all__ = ["Changes", "JobControl"]

END_WITHIN_S = 5.0  # in which the end of a job is asked for that gRPC has forgotten


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
    """One that was sent. `taken` is what it asks for, which comes behind the answer."""

    kind: str
    answer: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    taken: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class JobControl:
    """A job under control, from `GramophoneClient.control` or `control_job`: an asynchronous context manager, and an
    asynchronous iterator of its updates.

    Commands can be given while somebody iterates and while nobody does. Each returns the first iteration for which it
    holds, the end the one that the result is of, or what it asked for; raises `InvalidRequest` with the fields that are wrong, after which everything goes on;
    and raises `JobEnded`, or the error that the job ended in, if it came too late.

    Updates that nobody takes make room for newer ones of their kind; the result is never lost. The next frames are on
    their way when one is taken, `FrameOptions.max_in_flight` of them. Leaving the context leaves the job as any watcher
    does, and gives up the control. A lost connection ends it too, with an error that has the newest `checkpoint`: with
    `detach_grace` the job is there for `control_job`, and `resume=error.checkpoint` goes on with it elsewhere.
    """

    def __init__(
        self,
        connection: Connection,
        first: Callable[[], Awaitable[pb.StylizeInteractiveRequest]],
        *,
        frames: FrameOptions | None,
        timeout_s: float,
        images: Sequence[UploadedImage] = (),
    ) -> None:
        self.accepted: Accepted | None = None  # set on entering
        self._connection = connection
        self._first = first
        self._acknowledges = frames is not None and frames.max_in_flight > 0
        self._timeout_s = timeout_s
        self._images = images
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._commands: dict[int, _Command] = {}  # not answered yet
        self._taking: dict[type, tuple[int, _Command]] = {}  # answered; what it asked for is of that iteration
        self._untaken: dict[type, Update] = {}  # the newest of each kind, oldest first
        self._sequence = 0  # of the newest event
        self._checkpoint: Checkpoint | None = None
        self._frame: Frame | None = None
        self._result: Result | None = None
        self._error: GramophoneError | None = None

    async def __aenter__(self) -> Self:
        request = await self._first()

        async def begin(left_s: float) -> None:
            await self._begin(request, left_s)

        await uploads.renewing(self._connection, self._images, begin, self._timeout_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._call.cancel()
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
        arrived = self._untaken.pop(next(iter(self._untaken)))
        if isinstance(arrived, Frame) and self._acknowledges:
            self._send(ack=pb.AckCommand(sequence=arrived.sequence))
        return arrived

    async def result(self) -> Result:
        """Waits for the end of the job and returns its result, which iterating tells all the same."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None  # a call that ends without has an error
        return self._result

    async def pause(self) -> int:
        """Lets the job stand still, until `resume` or the server's limit `max_paused_s`."""
        return await self._command(pause=pb.PauseCommand()).answer

    async def resume(self) -> int:
        """Lets a paused job go on."""
        return await self._command(resume=pb.ResumeCommand()).answer

    async def update(self, **changes: Unpack[Changes]) -> int:
        """Changes the job from its next iteration on; what is not given stays as it is."""
        command = pb.UpdateCommand()
        with said():
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

    async def _begin(self, request: pb.StylizeInteractiveRequest, left_s: float) -> None:
        """Makes the call and returns at its first event. Raises the error if it ends before."""
        self._begun, self._news, self._over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        # Not `call.write`: a caller who gives up waiting for one would cancel the whole call.
        self._outgoing: asyncio.Queue[pb.StylizeInteractiveRequest | None] = asyncio.Queue()
        self._outgoing.put_nowait(request)
        self._error = None
        with self._connection.errors_rebuilt(self._timeout_s):
            self._call = self._connection.service.StylizeInteractive(_until_none(self._outgoing), timeout=left_s)
        self._reader = asyncio.create_task(self._read())
        try:
            await self._begun.wait()
        except asyncio.CancelledError:
            self._call.cancel()
            raise
        if self._error is not None and self.accepted is None:
            raise self._error

    async def _read(self) -> None:
        try:
            with self._connection.errors_rebuilt(self._timeout_s):
                async for response in self._call:
                    if response.HasField("command_result"):
                        self._answer(response.command_result)
                    elif (arrived := update(response.event)) is not None:
                        self._take(arrived)
                    self._begun.set()
            if self._result is None:
                raise ServerFailed("the server ended the stream without a result")
        except GramophoneError as error:
            if self._result is None and self.accepted is not None and is_forgotten(error):
                self._error = await self._end_as_watched(self.accepted.job_id, error)
            elif self._result is None or not is_lost(error):
                self._error = error
            if self._error is not None:
                self._error.frame, self._error.checkpoint = self._frame, self._checkpoint
        finally:
            if self._result is not None and self._error is None:
                self._untaken[Result] = self._result  # told when the stream has ended, as `stream` does
            self._outgoing.put_nowait(None)
            for command in (*self._commands.values(), *(command for _, command in self._taking.values())):
                self._refuse(command)
            self._begun.set()
            self._news.set()
            self._over.set()

    async def _end_as_watched(self, job_id: str, error: GramophoneError) -> GramophoneError | None:
        """How the job ended, asked again because gRPC has forgotten it: its error, None if it has its result, or `error`
        if it cannot be had."""
        with self._connection.errors_rebuilt(END_WITHIN_S):
            request = watch_request(job_id, self._sequence, None, None)
            call = self._connection.service.WatchJob(request, timeout=END_WITHIN_S)
        try:
            with self._connection.errors_rebuilt(END_WITHIN_S):
                async for response in call:
                    arrived = update(response.event)
                    if arrived is not None and arrived.sequence > self._sequence:
                        self._take(arrived)
        except (ConnectionFailed, DeadlineExceeded, JobNotFound):
            pass
        except GramophoneError as end:
            return end
        finally:
            call.cancel()
        return error if self._result is None else None

    def _answer(self, answered: pb.CommandResult) -> None:
        command = self._commands.pop(answered.command_id, None)
        if command is None or command.answer.done():  # its caller has given up
            return
        if answered.field_errors:
            violations = tuple(Violation(wrong.field, wrong.description) for wrong in answered.field_errors)
            words = "; ".join(f"{wrong.field}: {wrong.description}" for wrong in violations)
            command.answer.set_exception(InvalidRequest(words, violations=violations))
            return
        command.answer.set_result(answered.iteration)
        if command.kind in TAKEN:
            self._taking[TAKEN[command.kind]] = answered.iteration, command

    def _take(self, arrived: Update) -> None:
        self._sequence = max(self._sequence, arrived.sequence)
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
            case Frame():
                self._frame = arrived
            case Checkpoint():
                self._checkpoint = arrived
            case Result():
                self._result = arrived
                return
        self._untaken.pop(kind, None)  # a newer one comes last again
        self._untaken[kind] = arrived
        self._news.set()

    def _command(self, **asked: Any) -> _Command:
        """Sends one; `asked` is its field of the request."""
        (kind,) = asked
        command, number = _Command(kind), next(self._numbers)
        if self._over.is_set():
            self._refuse(command)
        else:
            self._commands[number] = command
            self._send(command_id=number, **asked)
        return command

    def _send(self, **fields: Any) -> None:
        self._outgoing.put_nowait(pb.StylizeInteractiveRequest(**fields))

    def _refuse(self, command: _Command) -> None:
        """The job has ended."""
        error = self._error or JobEnded(f"the job ended with its result before it took the command {command.kind!r}")
        for waited in (command.answer, command.taken):
            if not waited.done():
                waited.set_exception(error)
                waited.exception()  # nobody waits for both, and one that nobody waits for is no news


TAKEN = {"frame": Frame, "checkpoint": Checkpoint}  # by the command that asks for it


async def _until_none(
    outgoing: asyncio.Queue[pb.StylizeInteractiveRequest | None],
) -> AsyncIterator[pb.StylizeInteractiveRequest]:
    while (request := await outgoing.get()) is not None:
        yield request
