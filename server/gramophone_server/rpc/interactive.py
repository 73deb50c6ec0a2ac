"""The two directions of StylizeInteractive: commands on their way to a job, and what is sent back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace

from gramophone.recipe import InvalidRecipe, LayerWeight, Violation
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_server.config import Limits, variable
from gramophone_server.domain.commands import Command, Done, Finish, Pause, Resume, Retune, TakeCheckpoint, TakePicture
from gramophone_server.domain.events import Answer, Finished, Saved
from gramophone_server.domain.job_state import RecipeUpdate
from gramophone_server.errors import GramophoneError, InvalidRequest
from gramophone_server.images.codec import Encoding, Format
from gramophone_server.jobs.job import JobSummary
from gramophone_server.rpc.calls import RpcCall, as_domain_error
from gramophone_server.rpc.responses import JobEventStream
from gramophone_server.scheduling.scheduler import Scheduler

__all__ = ["Controller"]

log = logging.getLogger(__name__)

RESPONSE = pb.StylizeInteractiveResponse
LOSSLESS = Encoding(Format.PNG, 100)
ENDED = "comes too late, the job has ended"


class Controller:
    """The client that controls a job.

    Its commands are carried out one after another, and the next one is not read before the answer to the last one, with
    what it asked for, was written: a client that gives commands and does not read holds up nothing but itself. While it
    waits for that it takes no acknowledgements either, which such a client has no use for.
    """

    def __init__(self, view: JobEventStream, scheduler: Scheduler, limits: Limits) -> None:
        self._view = view
        self._job, self._mailbox = view.job, view.mailbox
        self._scheduler = scheduler
        self._limits = limits
        self._answering = asyncio.Lock()  # held from when a command has come until its answer is in the mailbox
        self._written = asyncio.Semaphore(0)  # answers

    async def responses(
        self, requests: AsyncIterator[pb.StylizeInteractiveRequest], call: RpcCall
    ) -> AsyncIterator[pb.StylizeInteractiveResponse]:
        """Everything that is sent, while the commands are read. The result is last, behind the answer to a command that
        was under way. Raises the error that the job ended in."""
        with self._obeying(requests, call):
            result = None
            async for number, event in self._mailbox.events():
                match event:
                    case Finished():
                        result = number, event
                        await self._answering.acquire()  # for good: no command is begun any more
                    case Answer():
                        yield pb.StylizeInteractiveResponse(command_result=_command_result(event))
                        if event.taken is not None:
                            yield await self._view.response(RESPONSE, number, event.taken, LOSSLESS)
                        self._written.release()
                    case _:
                        yield await self._view.response(RESPONSE, number, event)
            if result is not None:
                yield await self._view.response(RESPONSE, *result)

    @contextlib.contextmanager
    def _obeying(self, requests: AsyncIterator[pb.StylizeInteractiveRequest], call: RpcCall) -> Iterator[None]:
        """While commands are read and carried out; a client that leaves ends that at once."""
        task = asyncio.create_task(self._obey(requests, call))
        task.add_done_callback(self._obeyed)
        call.reads(task)
        try:
            yield
        finally:
            task.cancel()  # before the status is sent, behind which reading raises

    async def _obey(self, requests: AsyncIterator[pb.StylizeInteractiveRequest], call: RpcCall) -> None:
        """Returns when the client has closed its side, which gives the control up."""
        async for request in requests:
            call.received(request)
            if request.WhichOneof("command") == "ack":
                self._mailbox.acknowledge(request.ack.sequence)
                continue
            async with self._answering:
                answer = await self._carried_out(request)
                if not self._job.answer(self._mailbox, answer):
                    self._job.answer(self._mailbox, _refused(request, [Violation("", ENDED)]))
            await self._written.acquire()
        self._job.give_up_control(self._mailbox)

    def _obeyed(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, GramophoneError):  # else: bytes that are no command, so nobody knows what it was to do
            log.error("the commands of job=%s failed", self._job.id, exc_info=error)
            error = as_domain_error(error)
        self._mailbox.end(error)

    async def _carried_out(self, request: pb.StylizeInteractiveRequest) -> Answer:
        try:
            if self._job.plan is None:
                raise InvalidRequest([Violation("", "comes too early, the job's images are being decoded")])
            command = _command(request, self._job.plan, self._limits)
            done: Done = await self._scheduler.command(self._job, command)
            if isinstance(done.taken, Saved):
                await self._view.encoders.written(done.taken.state)  # whether it is too large shows here
        except (InvalidRequest, InvalidRecipe) as error:
            return _refused(request, error.violations)
        except GramophoneError as error:  # if the job ends in it, so will the stream
            return _refused(request, [Violation("", str(error))])
        return Answer(request.command_id, done.iteration, taken=done.taken)


def _command(request: pb.StylizeInteractiveRequest, plan: JobSummary, limits: Limits) -> Command:
    """Raises `InvalidRequest` and `InvalidRecipe` with fields of the command."""
    match request.WhichOneof("command"):
        case "pause":
            return Pause()
        case "resume":
            return Resume()
        case "update":
            return Retune(_changes(request.update, plan, limits))
        case "frame":
            return TakePicture()
        case "checkpoint":
            return TakeCheckpoint(request.checkpoint.light)
        case "finish":
            return Finish()
        case "start" | "attach":
            raise InvalidRequest([Violation("", "can only be the first message; open another stream for another job")])
        case _:
            raise InvalidRequest([Violation("", "is none that this server knows; GetServerInfo tells its version")])


def _changes(update: pb.UpdateCommand, plan: JobSummary, limits: Limits) -> RecipeUpdate:
    """What an update sets. What it means to the job where it stands, `JobState.update` checks."""
    changes = RecipeUpdate()
    for name in RecipeUpdate.__optional_keys__:
        if update.HasField(name):
            value = getattr(update, name)
            if name.endswith("_layers"):
                value = tuple(LayerWeight(layer.layer, layer.weight) for layer in value.layers)
            changes[name] = value  # type: ignore[literal-required]
    if not changes:
        raise InvalidRequest([Violation("", "changes nothing; set one of its fields")])
    recipe = replace(plan.recipe, **changes)
    iterations = plan.iterations - plan.recipe.iterations + recipe.iterations
    if iterations > limits.max_iterations:
        violation = Violation(
            "iterations",
            f"would make {iterations} over all scales; at most {limits.max_iterations} are allowed "
            f"(server setting {variable('max_iterations')})",
        )
        raise InvalidRequest([violation])
    return changes


def _refused(request: pb.StylizeInteractiveRequest, violations: Iterable[Violation]) -> Answer:
    """With the fields' paths from the request on: "update.alpha", and "update" for what is wrong with it as a whole."""
    name = request.WhichOneof("command") or "command"
    paths = (Violation(name if field in ("", name) else f"{name}.{field}", text) for field, text in violations)
    return Answer(request.command_id, violations=tuple(paths))


def _command_result(answer: Answer) -> pb.CommandResult:
    errors = (pb.FieldError(field=field, description=description) for field, description in answer.violations)
    return pb.CommandResult(command_id=answer.command_id, iteration=answer.iteration, field_errors=errors)
