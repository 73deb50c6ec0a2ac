"""Clients that control a job over StylizeInteractive."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone_client.transport import request_writer
from tests.support.clock import WITHIN_S
from tests.support.engines import FakeEngine
from tests.support.specs import detachable_spec

PAUSE, RESUME, FINISH, FRAME = pb.PauseCommand(), pb.ResumeCommand(), pb.FinishCommand(), pb.FrameCommand()


class Controller:
    """A StylizeInteractive stream. A test waits for single messages; all received ones are in `events` and
    `answers`."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.StylizeInteractive()
        self._requests: asyncio.Queue[pb.StylizeInteractiveRequest | None] = asyncio.Queue()
        # gRPC's own `write` replaces the status of a call that ends meanwhile: 1 in 30 commands to a job that ends.
        request_writer.send(self.call, self._written())
        self.sent = 0
        self.events: list[pb.JobEvent] = []
        self.answers: dict[int, pb.CommandResult] = {}
        self.order: list[str] = []  # the received messages: kinds of events, and "answer"

    async def send(self, **command: Any) -> int:
        """Sends a command. Returns its id."""
        self.sent += 1
        self._requests.put_nowait(pb.StylizeInteractiveRequest(command_id=self.sent, **command))
        await asyncio.sleep(0)  # it is being written
        return self.sent

    def end(self) -> None:
        """Sends no further command."""
        self._requests.put_nowait(None)

    async def _written(self) -> AsyncGenerator[pb.StylizeInteractiveRequest, None]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def read(self) -> bool:
        """Reads a message, within `WITHIN_S`. Returns False at the end of the stream."""
        async with asyncio.timeout(WITHIN_S):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            return False
        if response.HasField("event"):
            self.events.append(response.event)
            self.order.append(response.event.WhichOneof("event"))
        else:
            self.answers[response.command_result.command_id] = response.command_result
            self.order.append("answer")
        return True

    async def ask(self, **command: Any) -> pb.CommandResult:
        """The answer to a command."""
        number = await self.send(**command)
        while number not in self.answers:
            assert await self.read(), "the stream ended without the answer"
        return self.answers[number]

    async def errors(self, **command: Any) -> dict[str, str]:
        """The violations of a command: descriptions by field."""
        return {error.field: error.description for error in (await self.ask(**command)).field_errors}

    async def event(self, kind: str, **fields: Any) -> Any:
        """The next event of this kind with these fields."""
        while await self.read():
            if self.order[-1] == kind:
                event = getattr(self.events[-1], kind)
                if all(getattr(event, name) == value for name, value in fields.items()):
                    return event
        raise AssertionError(f"the stream ended without {kind}")

    async def rest(self) -> None:
        """Reads to the end of the stream."""
        while await self.read():
            pass

    def of(self, kind: str) -> list[Any]:
        """All received events of this kind."""
        return [getattr(event, kind) for event in self.events if event.HasField(kind)]

    @property
    def job_id(self) -> str:
        return str(self.of("accepted")[0].job_id)


async def start_controller(
    s: types.SimpleNamespace, job_spec: pb.JobSpec | None = None, stub: Any = None, **start: Any
) -> Controller:
    """A controller whose job has done its first iterations; keyword arguments are fields of StartCommand."""
    controller = Controller(stub or s.stub)
    await controller.send(start=pb.StartCommand(spec=job_spec or detachable_spec(5000), **start))
    await controller.event("progress")
    return controller


async def attach_controller(s: types.SimpleNamespace, job_id: str, **attach: Any) -> Controller:
    """A controller that attaches to a job; keyword arguments are fields of AttachCommand."""
    controller = Controller(s.stub)
    await controller.send(attach=pb.AttachCommand(job_id=job_id, **attach))
    return controller


def slow_engine() -> FakeEngine:
    """An engine whose jobs last long enough for commands."""
    return FakeEngine(iteration_s=0.002)
