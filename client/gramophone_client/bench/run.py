"""The bench itself: sends the jobs of each load in turn and records what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from gramophone_client.bench.arrivals import ClosedLoop, Load, poisson
from gramophone_client.bench.measure import LEFT, Recorder, Sample, megapixel_iterations
from gramophone_client.bench.report import Step, Window
from gramophone_client.bench.workload import BadMix, Draw, Kind, draws
from gramophone_client.client import GramophoneClient
from gramophone_client.errors import DeadlineExceeded, GramophoneError, InvalidRequest
from gramophone_client.types.options import FrameOptions
from gramophone_client.types.server_info import ServerInfo
from gramophone_client.types.updates import Accepted, Frame, Progress, Result

__all__ = ["Bench", "Pictures", "Plan"]

# Pause of a caller that was refused, in seconds: what the server asked for, within these. Callers who came back at once
# would measure how fast a server refuses.
LEAST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0
SETTLE_S = 10.0  # for the server to have ended what the step before has left
LOAD_S = 2.0  # for the server to say its load; one that stands still must not hold up the bench


@dataclass(frozen=True)
class Pictures:
    """What is painted, as encoded files."""

    content: bytes
    styles: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a bench is to do. Durations are in seconds."""

    loads: Sequence[Load]
    mix: Sequence[Kind]
    pictures: Callable[[Kind], Pictures]
    seed: int = 0
    warm_up_s: float = 5.0  # 0: none
    window_s: float = 5.0
    duration_s: float = 60.0  # longest of a step, with its warm-up
    deadline_s: float = 120.0  # of a job, from when it is sent


@dataclass
class Bench:
    """A bench on its way, for whoever shows it."""

    plan: Plan
    server: ServerInfo | None = None  # as it was in the beginning
    steps: list[Step] = field(default_factory=list)  # that have ended
    load: Load | None = None  # of the present step
    recorder: Recorder | None = None  # of the present step
    is_interrupted: bool = False
    _client: GramophoneClient = field(init=False)
    _began_s: float = field(default_factory=time.monotonic)
    _step_began_s: float = 0.0
    _jobs: int = 0

    async def run(self, client: GramophoneClient) -> None:
        """All steps, or as many as there are before this task is cancelled, which ends the bench but is no error.

        The client is one without retries, so that each refusal is counted.

        Raises `BadMix` if the server finds a job of it invalid, `GramophoneError` if there is no server any more.
        """
        self._client = client
        self.server = await client.server_info()
        idle = self.server.running_jobs, self.server.queued_jobs
        for load in self.plan.loads:
            if self.is_interrupted:
                break
            before = await self._settled(idle)
            await self._step(load, before)
        self.load = self.recorder = None

    @property
    def step_s(self) -> float:
        """Seconds since the present step began."""
        return time.monotonic() - self._step_began_s

    async def _step(self, load: Load, before: tuple[int, int] | None) -> None:
        plan, stable = self.plan, asyncio.Event()
        recorder = Recorder(load, warm_up_s=plan.warm_up_s, window_s=plan.window_s, kinds=len(plan.mix))
        cpu_s, self._step_began_s = time.process_time(), time.monotonic()
        self.load, self.recorder = load, recorder
        sending = asyncio.create_task(self._send(load, recorder, stable))
        over = asyncio.create_task(stable.wait())
        ending = "time is up"
        try:
            await asyncio.wait({sending, over}, timeout=plan.duration_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._interrupt()
            ending = "interrupted"
        now_s, cpu_s = self.step_s, time.process_time() - cpu_s
        # All of it before the jobs that are on their way are left.
        tally = recorder.measured(now_s)
        ending = "stable" if recorder.is_stable else ending
        windows = tuple(Window(w.seconds, w.ok, w.result_s.quantile(0.5) or 0.0) for w in recorder.windows)
        timeline = tuple(map(Counter, recorder.timeline))
        unfinished, oldest_s = len(recorder.in_flight), now_s - min(recorder.in_flight.values(), default=now_s)
        after = None
        with suppress(GramophoneError):  # what was measured until the server went away is worth having
            after = await self._server_load()
        over.cancel()
        sending.cancel()
        await asyncio.wait({sending})
        if not sending.cancelled() and (error := sending.exception()):
            # The first is the cause; the others are jobs of the same kind.
            raise error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        self.steps.append(
            Step(
                load=load,
                ending=ending,
                is_warm=recorder.is_warm,
                began_s=self._step_began_s - self._began_s,
                windows=windows,
                tally=tally,
                unfinished=unfinished,
                oldest_unfinished_s=oldest_s,
                late_s=recorder.late_s,
                client_cpu=cpu_s / now_s,
                server_before=before,
                server_after=after,
                timeline=timeline,
            )
        )

    async def _send(self, load: Load, recorder: Recorder, stable: asyncio.Event) -> None:
        """Sends jobs for as long as it is let."""
        jobs = draws(self.plan.mix, self.plan.seed)  # the same for every step

        async def caller() -> None:
            while True:
                await asyncio.sleep(await self._job(next(jobs), self.step_s, recorder, stable))

        async with asyncio.TaskGroup() as group:
            if isinstance(load, ClosedLoop):
                for _ in range(load.concurrency):
                    group.create_task(caller())
            else:
                for due_s in poisson(load.rate, self.plan.seed):
                    await asyncio.sleep(due_s - self.step_s)
                    group.create_task(self._job(next(jobs), due_s, recorder, stable))

    async def _job(self, draw: Draw, due_s: float, recorder: Recorder, stable: asyncio.Event) -> float:
        """One job to its end; seconds for which its caller should then wait."""
        self._jobs += 1
        number, pause_s = self._jobs, 0.0
        sample = Sample(draw.kind.name, due_s)
        recorder.send(number, due_s, self.step_s)
        try:
            if draw.kind.frames or draw.leave_at is not None:
                await self._stream(draw, number, sample)
            else:
                await self._ask(draw.kind, number, sample)
        except InvalidRequest as error:
            # All of its kind are invalid, so there is nothing to measure.
            raise BadMix(f"the server takes no job like {draw.kind.name!r}: {error}") from error
        except GramophoneError as error:
            sample.status = error.reason or (error.code.name if error.code else type(error).__name__)
            pause_s = min(max(error.retry_after_s or 0.0, LEAST_PAUSE_S), LONGEST_PAUSE_S)
        sample.ended_s = self.step_s
        recorder.add(number, sample)
        if recorder.is_stable:
            stable.set()
        return pause_s

    async def _stream(self, draw: Draw, number: int, sample: Sample) -> None:
        kind, pictures = draw.kind, self.plan.pictures(draw.kind)
        frames = FrameOptions(every_iterations=kind.frame_every, max_side=kind.frame_size) if kind.frames else None
        accepted, done = None, 0
        updates = self._client.stream(
            pictures.content,
            pictures.styles,
            frames=frames,
            checkpoints=None,
            patience_s=0,  # a job that is lost counts as lost
            timeout_s=kind.deadline_s or self.plan.deadline_s,
            preset=kind.preset,
            seed=number,
            **kind.overrides,
        )
        try:
            async with aclosing(updates):
                async for update in updates:
                    match update:
                        case Accepted():
                            accepted = update
                        case Progress():
                            done = update.iteration
                            if draw.leave_at is not None and done >= draw.leave_at * update.iterations:
                                sample.status = LEFT
                                return
                        case Frame():
                            sample.frame(self.step_s, len(update.picture.data), update.dropped)
                        case Result():
                            done = update.iterations
                            sample.bytes_received += len(update.picture.data)
        finally:
            if accepted is not None:
                size = accepted.width, accepted.height
                sample.megapixel_iterations = megapixel_iterations(accepted.recipe, *size, accepted.iterations, done)

    async def _ask(self, kind: Kind, number: int, sample: Sample) -> None:
        pictures = self.plan.pictures(kind)
        done = await self._client.stylize(
            pictures.content,
            pictures.styles,
            timeout_s=kind.deadline_s or self.plan.deadline_s,
            preset=kind.preset,
            seed=number,  # each its own, so that no answer can be another job's
            **kind.overrides,
        )
        sample.bytes_received += len(done.picture.data)
        size = done.picture.width, done.picture.height
        sample.megapixel_iterations = megapixel_iterations(done.recipe, *size, done.iterations, done.iterations)

    async def _server_load(self) -> tuple[int, int]:
        info = await self._client.server_info(timeout_s=LOAD_S)
        return info.running_jobs, info.queued_jobs

    async def _settled(self, idle: tuple[int, int]) -> tuple[int, int] | None:
        """The server's load, when it is no more than it was in the beginning; None if it does not say in time."""
        end = time.monotonic() + SETTLE_S
        try:
            while (load := await self._server_load()) > idle and time.monotonic() < end:
                await asyncio.sleep(0.1)
        except DeadlineExceeded:  # what becomes of jobs at such a server is for the step to measure
            return None
        return load

    def _interrupt(self) -> None:
        """Makes the end of this task the end of the bench."""
        self.is_interrupted = True
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
