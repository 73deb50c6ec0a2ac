"""The two directions of StylizeInteractive: commands to a job, and events and answers to its controller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace

from gramophone.recipe import InvalidRecipeError, LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.commands import (
    Command,
    Done,
    Finish,
    Pause,
    Resume,
    TakeCheckpoint,
    TakePicture,
    UpdateRecipe,
)
from gramophone_server.domain.events import Answer, Finished
from gramophone_server.domain.job_state import RecipeUpdate
from gramophone_server.errors import GramophoneError, InvalidRequest
from gramophone_server.jobs.job import JobSummary
from gramophone_server.rpc.calls import RpcCall, as_domain_error
from gramophone_server.rpc.event_stream import JobEventStream
from gramophone_server.rpc.outgoing import Outgoing
from gramophone_server.scheduling.scheduler import Scheduler

__all__ = ["Controller"]

log = logging.getLogger(__name__)

ENDED_MESSAGE = "came too late: the job has ended"


class Controller:
    """The client that controls a job.

    Commands are executed one after another. The next command is read only after the answer to the previous one was
    written, with the frame or checkpoint that it requested. So a client that sends commands and does not read delays
    only itself. In the meantime no acknowledgements are read either; such a client does not need them.
    """

    def __init__(self, events: JobEventStream, scheduler: Scheduler, limits: Limits) -> None:
        self._events = events
        self._job, self._mailbox = events.job, events.mailbox
        self._scheduler = scheduler
        self._limits = limits
        self._executing = asyncio.Lock()  # held from the arrival of a command until its answer is in the mailbox
        self._written_answers = asyncio.Semaphore(0)

    async def responses(self, call: RpcCall) -> AsyncIterator[Outgoing]:
        """Yields all events and answers, and reads commands in the meantime. The result is last, after the answer to a
        command that was being executed. Raises the error that the job ended with."""
        events = self._events
        with self._reading_commands(call):
            result: tuple[int, Finished] | None = None
            while (item := await events.read()) is not None:
                number, event = item
                if isinstance(event, Finished):
                    result = number, event
                    await self._executing.acquire()  # never released, so no further command is executed
                    continue
                is_answer = isinstance(event, Answer)
                message = None
                if isinstance(event, Answer):
                    yield Outgoing(_command_result(event).SerializeToString())
                    if event.output is not None:
                        message = events.outgoing(number, event.output, requested=True)
                else:
                    message = events.outgoing(number, event)
                del item, event  # which would keep the picture or the state while the message is sent
                if message is not None and (outgoing := await message) is not None:
                    yield outgoing
                if is_answer:
                    self._written_answers.release()
            if result is not None:
                outgoing = await events.outgoing(*result)
                assert outgoing is not None, "a result is not put back"
                yield outgoing

    @contextlib.contextmanager
    def _reading_commands(self, call: RpcCall) -> Iterator[None]:
        """Reads and executes commands while its body runs, or until the client leaves. None are read, and so no memory
        is reserved for them, if the job had ended before the client came."""
        if call.incoming.commands is None:
            yield
            return
        task = asyncio.create_task(self._read_commands(call))
        task.add_done_callback(self._reader_done)
        call.set_reader(task)
        try:
            yield
        finally:
            task.cancel()  # before the status is sent, because reading raises after that

    async def _read_commands(self, call: RpcCall) -> None:
        """Executes commands until the client closes its side of the stream, which gives up control of the job."""
        while (request := await call.incoming.receive_command(pb.StylizeInteractiveRequest)) is not None:
            if request.WhichOneof("command") == "ack":
                self._mailbox.acknowledge(request.ack.sequence)
                continue
            async with self._executing:
                answer = await self._execute(request)
                if not self._job.answer(self._mailbox, answer):
                    self._job.answer(self._mailbox, _refused(request, [Violation("", ENDED_MESSAGE)]))
            await self._written_answers.acquire()
        self._job.give_up_control(self._mailbox)

    def _reader_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, GramophoneError):  # otherwise the bytes could not be parsed as a command
            log.error("the commands of job=%s failed", self._job.id, exc_info=error)
            error = as_domain_error(error)
        self._mailbox.end(error)

    async def _execute(self, request: pb.StylizeInteractiveRequest) -> Answer:
        try:
            if self._job.summary is None:
                raise InvalidRequest([Violation("", "came too early: the job's images are still being decoded")])
            command = _command(request, self._job.summary, self._limits)
            done: Done = await self._scheduler.command(self._job, command)
        except (InvalidRequest, InvalidRecipeError) as error:
            return _refused(request, error.violations)
        except GramophoneError as error:  # the stream ends with it, too, if the job does
            return _refused(request, [Violation("", str(error))])
        return Answer(request.command_id, done.iteration, output=done.output)


def _command(request: pb.StylizeInteractiveRequest, summary: JobSummary, limits: Limits) -> Command:
    """Raises `InvalidRequest` and `InvalidRecipeError` with fields of the command."""
    match request.WhichOneof("command"):
        case "pause":
            return Pause()
        case "resume":
            return Resume()
        case "update":
            return UpdateRecipe(_changes(request.update, summary, limits))
        case "frame":
            return TakePicture()
        case "checkpoint":
            return TakeCheckpoint(request.checkpoint.light)
        case "finish":
            return Finish()
        case "start" | "attach":
            raise InvalidRequest([Violation("", "can only be the first message; open another stream for another job")])
        case _:
            raise InvalidRequest([Violation("", "is not known to this server; GetServerInfo reports its version")])


def _changes(update: pb.UpdateCommand, summary: JobSummary, limits: Limits) -> RecipeUpdate:
    """The fields that an update sets. `JobState.update` checks them against the current state of the job."""
    changes = RecipeUpdate()
    for name in RecipeUpdate.__optional_keys__:
        if update.HasField(name):
            value = getattr(update, name)
            if name.endswith("_layers"):
                value = tuple(LayerWeight(layer.layer, layer.weight) for layer in value.layers)
            changes[name] = value  # type: ignore[literal-required]
    if not changes:
        raise InvalidRequest([Violation("", "changes nothing; set one of its fields")])
    recipe = replace(summary.recipe, **changes)
    iterations = summary.iterations - summary.recipe.iterations + recipe.iterations
    if iterations > limits.max_iterations:
        violation = Violation(
            "iterations",
            f"would make {iterations} over all scales; at most {limits.max_iterations} are allowed "
            f"(server setting {env_variable('max_iterations')})",
        )
        raise InvalidRequest([violation])
    return changes


def _refused(request: pb.StylizeInteractiveRequest, violations: Iterable[Violation]) -> Answer:
    """An answer with field paths from the request on: "update.alpha", or "update" for the whole command."""
    name = request.WhichOneof("command") or "command"
    paths = (Violation(name if field in ("", name) else f"{name}.{field}", text) for field, text in violations)
    return Answer(request.command_id, violations=tuple(paths))


def _command_result(answer: Answer) -> pb.StylizeInteractiveResponse:
    errors = (pb.FieldError(field=field, description=description) for field, description in answer.violations)
    result = pb.CommandResult(command_id=answer.command_id, iteration=answer.iteration, field_errors=errors)
    return pb.StylizeInteractiveResponse(command_result=result)
