"""Control of a running job: commands and their answers, together with its updates."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack

from gramophone.recipe import Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.values import shown
from gramophone_client.errors import (
    CallCancelledError,
    ClientUsageError,
    GramophoneError,
    InvalidRequestError,
    JobEndedError,
    ServerFailedError,
)
from gramophone_client.streams.job_commands import Command
from gramophone_client.streams.recovery import Recovery, ResendableJob
from gramophone_client.streams.recovery_states import is_connection_loss
from gramophone_client.transport.connection import Connection
from gramophone_client.transport.job_spec import update_command, watch_request
from gramophone_client.types.options import Changes, CheckpointOptions, FrameOptions
from gramophone_client.types.signatures import shows_options
from gramophone_client.types.updates import Accepted, Checkpoint, Frame, Paused, Result, Resumed, Update, UploadProgress

__all__ = ["AsyncJobControl"]


OUTPUTS = {"frame": Frame, "checkpoint": Checkpoint}  # by the command that asks for it


class AsyncJobControl:
    """A job under control, from `AsyncGramophoneClient.control` or `control_job`.

    It is an asynchronous context manager and an asynchronous iterator of the job's updates:

    async with client.control("photo.jpg", "painting.jpg") as job:
        async for update in job:
            ...

    Commands can be given with and without a running iteration. Each returns the first iteration for which it holds
    (`finish`: the iteration of the result), or what it asked for. It raises `InvalidRequestError` with the fields that
    are wrong, after which the job continues unchanged, and `JobEndedError`, or the error that ended the job, if it came
    too late.

    An unread update is replaced by a newer one of its kind; the result is never lost. Up to
    `FrameOptions.max_in_flight` frames are in flight at a time. Leaving the context gives up control, and for the job
    it counts as the loss of a watcher.

    The client recovers from lost connections and lost servers as in `stream`. Commands that have no answer by then, or
    that are given during the recovery, are sent when the job is found or accepted again. Sending one twice is harmless,
    because a command sets a state and is not relative to one. A job that continues from a checkpoint receives all
    earlier commands that still apply again: changes of `update`, a pause, `finish`. If the recovery fails, the error
    has the newest `frame` and `checkpoint`.
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
        self._connection = connection
        self._frames = frames
        self._checkpoints = checkpoints
        self._prepare = prepare
        self._recovery = Recovery(connection, timeout_s=timeout_s, grace_s=grace_s, job_id=job_id)
        self._outgoing: asyncio.Queue[pb.StylizeInteractiveRequest | None] = asyncio.Queue()
        self._takes_commands = False  # the current call does
        self._reader: asyncio.Task[None] | None = None  # since the context was entered
        self._is_given_up = False  # closed before the end of the job
        self._command_ids = itertools.count(1)
        self._unanswered: dict[int, Command] = {}  # by id, oldest first
        # Of answered commands, with the iteration of the output.
        self._awaited_outputs: dict[type, tuple[int, Command]] = {}
        # The combined effect of answered commands, by kind.
        self._in_force: dict[str, pb.StylizeInteractiveRequest] = {}
        self._unread: dict[type, Update] = {}  # the newest of each kind, oldest first
        self._has_entered, self._has_news, self._has_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._error: GramophoneError | None = None

    async def __aenter__(self) -> Self:
        self._connection.check()
        if self._reader is not None or self._is_given_up:
            raise ClientUsageError("the context of a controlled job can be entered once; call `control_job` to return")
        self._recovery.start(None if self._prepare is None else await self._prepare())
        self._reader = asyncio.create_task(self._read_updates())
        try:
            await self._has_entered.wait()
        except asyncio.CancelledError:
            self._reader.cancel()
            raise
        if self._error is not None and self.accepted is None:
            raise self._error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        self._check_entered()
        while not self._unread:
            if self._has_ended.is_set():
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        return self._unread.pop(next(iter(self._unread)))

    @property
    def job_id(self) -> str | None:
        """The job's id; None until the job was accepted. A job that was lost and sent again has a new one."""
        return self._recovery.job_id or None

    @property
    def accepted(self) -> Accepted | None:
        """The newest `Accepted`, of which there is another one after the job was sent again; None before the first."""
        return self._recovery.accepted

    @property
    def upload_progress(self) -> UploadProgress | None:
        """How much of the job's large images and checkpoint has been uploaded; None unless that happens now."""
        return self._recovery.upload_progress

    @property
    def loss(self) -> GramophoneError | None:
        """What the job is recovered from now: the loss of its connection or server, or why no server takes it yet. None
        unless it is being recovered."""
        return self._recovery.loss

    async def close(self) -> None:
        """Gives up control, which for the job counts as the loss of a watcher. A second call does nothing, nor does the
        first after the end of the job."""
        if self._connection.is_forked:  # the job is the parent's
            return
        self._connection.check_loop()
        if self._reader is None:
            self._is_given_up = True
        else:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def result(self) -> Result:
        """Waits for the end of the job and returns its result. Iterating yields the result as well."""
        self._check_entered()
        await self._has_ended.wait()
        if self._error is not None:
            raise self._error
        assert self._recovery.result is not None  # a call that ends without a result has an error
        return self._recovery.result

    async def pause(self) -> int:
        """Pauses the job until `resume`, at most for the server's limit `max_paused_s`."""
        return await self._command(pause=pb.PauseCommand()).answer

    async def resume(self) -> int:
        """Continues a paused job."""
        return await self._command(resume=pb.ResumeCommand()).answer

    @shows_options
    async def update(self, **changes: Unpack[Changes]) -> int:
        """Changes the job from its next iteration on; what is not given stays as it is."""
        return await self._command(update=update_command(changes)).answer

    async def picture(self) -> Frame:
        """The current picture, in its full size and without loss."""
        command = self._command(frame=pb.FrameCommand())
        await command.answer
        frame: Frame = await command.output
        return frame

    async def checkpoint(self, *, light: bool = False) -> Checkpoint:
        """The job's current state; see `CheckpointOptions.light`."""
        if not isinstance(light, bool):
            rule = f"must be True or False, got {shown(light)}"
            raise InvalidRequestError(f"light: {rule}", violations=(Violation("checkpoint.light", rule),))
        command = self._command(checkpoint=pb.CheckpointCommand(light=light))
        await command.answer
        checkpoint: Checkpoint = await command.output
        return checkpoint

    async def finish(self) -> int:
        """Ends the job with the current picture as its result, which `result` and iterating then return. Returns the
        iteration of that picture."""
        return await self._command(finish=pb.FinishCommand()).answer

    async def _read_updates(self) -> None:
        """Reads the job's events until it has ended or is given up."""
        recovery, reader = self._recovery, asyncio.current_task()
        try:
            sends = recovery.job is not None
            while recovery.result is None:
                try:
                    await self._read_call(sends)
                    if recovery.result is None:
                        raise ServerFailedError("the server ended the stream without a result")
                except GramophoneError as error:
                    if recovery.result is not None and is_connection_loss(error):
                        break
                    if reader is not None and reader.cancelling():
                        # gRPC raises the status of a call that has just ended in place of the cancellation.
                        raise asyncio.CancelledError from error
                    sends = await recovery.next_attempt(error)
        except GramophoneError as error:
            self._error = recovery.with_partial_result(error)
        except asyncio.CancelledError:
            self._is_given_up, self._error = True, CallCancelledError("control of the job was given up")
            raise
        finally:
            if recovery.result is not None and self._error is None:
                self._unread[Result] = recovery.result  # after the end of the stream, as in `AsyncJobStream`
            for command in (*self._unanswered.values(), *(command for _, command in self._awaited_outputs.values())):
                self._fail_as_ended(command)
            self._has_entered.set()
            self._has_news.set()
            self._has_ended.set()

    async def _read_call(self, sends: bool) -> None:
        """Reads one call to its end. It sends the job, or takes control of it where it was."""
        recovery, is_resend = self._recovery, sends and self.accepted is not None
        recovery.start_call()
        # Not `call.write`: a caller that gives up waiting for one would cancel the whole call.
        outgoing = self._outgoing = asyncio.Queue()
        outgoing.put_nowait(self._first_request(sends))
        call: Any = None
        try:
            with self._connection.errors_rebuilt(recovery.timeout_s):
                requests = _until_none(outgoing)
                call = self._connection.start_with_stream("StylizeInteractive", requests, recovery.left_s)
                if not sends and self.accepted is not None:  # a paused job may send no event before the next command
                    self._send_pending(is_resend)
                async for response in call:
                    if response.HasField("command_result"):
                        self._answer(response.command_result)
                    elif (arrived := recovery.receive(response.event, time.monotonic())) is not None:
                        self._receive(arrived)
                    # A job takes commands from its first event on; while its images are decoded it takes none.
                    if not self._takes_commands:
                        self._send_pending(is_resend)
                    self._has_entered.set()
        finally:
            self._takes_commands = False
            outgoing.put_nowait(None)
            if call is not None:
                call.cancel()

    def _first_request(self, sends: bool) -> pb.StylizeInteractiveRequest:
        recovery = self._recovery
        if sends and recovery.job is not None:
            start = pb.StartCommand(spec=recovery.job.spec, request_id=recovery.job.request_id)
            return pb.StylizeInteractiveRequest(start=start)
        watch = watch_request(recovery.job_id, recovery.sequence, self._frames, self._checkpoints)
        attach = pb.AttachCommand(job_id=watch.job_id, after_sequence=watch.after_sequence)
        for name in ("frames", "checkpoints"):
            if watch.HasField(name):
                getattr(attach, name).CopyFrom(getattr(watch, name))
        return pb.StylizeInteractiveRequest(attach=attach)

    def _send_pending(self, is_resend: bool) -> None:
        """Sends all commands whose answer or output has not arrived. A job that was sent again gets, before them, the
        commands that are in force."""
        pending = [*(command for _, command in self._awaited_outputs.values()), *self._unanswered.values()]
        if is_resend:
            pending = [command for command in pending if not command.is_replay]
            pending[:0] = [Command(request, is_replay=True) for request in self._in_force.values()]
        self._awaited_outputs.clear()
        self._unanswered.clear()
        self._takes_commands = True
        for command in pending:
            self._send(command)

    def _answer(self, result: pb.CommandResult) -> None:
        command = self._unanswered.pop(result.command_id, None)
        if command is None or command.answer.cancelled():  # its caller has given up
            return
        if result.field_errors:
            violations = tuple(Violation(wrong.field, wrong.description) for wrong in result.field_errors)
            text = "; ".join(f"{wrong.field}: {wrong.description}" for wrong in violations)
            if command.is_replay and command.kind == "update":  # a late pause or end does no harm
                raise InvalidRequestError(f"the job was sent again, and its earlier changes are refused there: {text}")
            return command.fail(InvalidRequestError(text, violations=violations))
        if not command.answer.done():
            command.answer.set_result(result.iteration)
        if command.kind in OUTPUTS:
            self._awaited_outputs[OUTPUTS[command.kind]] = result.iteration, command
        elif command.kind == "update":
            in_force = self._in_force.setdefault("update", pb.StylizeInteractiveRequest()).update
            for changed, _ in command.request.update.ListFields():
                in_force.ClearField(changed.name)  # merging lists would append
            in_force.MergeFrom(command.request.update)
        elif command.kind == "finish":
            self._in_force["finish"] = command.request

    def _receive(self, arrived: Update) -> None:
        kind = type(arrived)
        iteration, command = self._awaited_outputs.get(kind, (None, None))
        if command is not None and isinstance(arrived, Frame | Checkpoint) and arrived.iteration == iteration:
            del self._awaited_outputs[kind]
            if not command.output.done():
                command.output.set_result(arrived)
            return
        match arrived:
            case Paused():
                self._in_force["pause"] = pb.StylizeInteractiveRequest(pause=pb.PauseCommand())
            case Resumed():
                self._in_force.pop("pause", None)
            case Result():
                return
        older = self._unread.pop(kind, None)  # removed first, so that the newer one is last in the order
        if isinstance(arrived, Frame):
            if self._frames is not None and self._frames.max_in_flight:
                # On arrival, not when it is read: otherwise a caller that pauses for a second would first read the
                # frames that were sent at the start of the pause.
                self._outgoing.put_nowait(pb.StylizeInteractiveRequest(ack=pb.AckCommand(sequence=arrived.sequence)))
            if isinstance(older, Frame):
                arrived = replace(arrived, dropped=arrived.dropped + older.dropped + 1)
        self._unread[kind] = arrived
        self._has_news.set()

    def _command(self, **fields: Any) -> Command:
        """Sends a command; `fields` are those of its request."""
        self._check_entered()
        command = Command(pb.StylizeInteractiveRequest(**fields))
        if self._has_ended.is_set():
            self._fail_as_ended(command)
        else:
            self._send(command)
        return command

    def _check_entered(self) -> None:
        """Raises `ClientUsageError` where the job cannot be controlled: by another process or event loop, before the
        context was entered, and after it was closed before the job's end."""
        if self._connection.is_forked:
            self._connection.check()
        self._connection.check_loop()
        if self._is_given_up:
            raise ClientUsageError("control of the job was given up; call `control_job` to take it again")
        if self._reader is None:
            raise ClientUsageError("the job is not sent yet; enter its context first: `async with`, or `with`")

    def _send(self, command: Command) -> None:
        """Sends a command now, or when the job takes commands again."""
        number = next(self._command_ids)
        self._unanswered[number] = command
        if self._takes_commands:
            numbered = pb.StylizeInteractiveRequest(command_id=number)
            numbered.MergeFrom(command.request)
            self._outgoing.put_nowait(numbered)

    def _fail_as_ended(self, command: Command) -> None:
        command.fail(
            self._error or JobEndedError(f"the job ended with its result before it took the command {command.kind!r}")
        )


async def _until_none(
    outgoing: asyncio.Queue[pb.StylizeInteractiveRequest | None],
) -> AsyncGenerator[pb.StylizeInteractiveRequest, None]:
    while (request := await outgoing.get()) is not None:
        yield request
