"""Runs a bench: sends jobs with each load profile in turn and records how they end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gramophone_client.async_client import AsyncGramophoneClient
from gramophone_client.bench.arrivals import ClosedLoop, LoadProfile, poisson
from gramophone_client.bench.measure import LEFT, Recorder, Sample, megapixel_iterations
from gramophone_client.bench.report import Step, Window
from gramophone_client.bench.workload import InvalidWorkload, JobKind, PlannedJob, planned_jobs
from gramophone_client.errors import DeadlineExceededError, GramophoneError, InvalidRequestError
from gramophone_client.types.options import FrameOptions
from gramophone_client.types.server_info import ServerInfo
from gramophone_client.types.updates import Accepted, Frame, Progress, Result

__all__ = ["Bench", "Pictures", "Plan"]

# Limits of a caller's pause after a refusal, in seconds; within them the pause is the one that the server asked for.
# Without a pause the bench would measure how fast a server refuses.
MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 1.0
SETTLE_TIMEOUT_S = 10.0  # how long a step waits for the server to end the jobs of the step before
SERVER_LOAD_TIMEOUT_S = 2.0  # for a request of the server's load; a server that hangs must not delay the bench


@dataclass(frozen=True)
class Pictures:
    """The images of a job, as encoded files."""

    content: bytes
    styles: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a bench. Durations are in seconds."""

    loads: Sequence[LoadProfile]
    workload: Sequence[JobKind]
    pictures: Callable[[JobKind], Pictures]
    seed: int = 0
    warm_up_s: float = 5.0  # 0: none
    window_s: float = 5.0
    duration_s: float = 60.0  # limit of a step, including its warm-up
    deadline_s: float = 120.0  # of a job, from the time it is sent


@dataclass
class Bench:
    """A bench and its progress. Its attributes may be read while it runs."""

    plan: Plan
    clock: Callable[[], float] = time.monotonic  # in seconds
    server: ServerInfo | None = None  # at the start of the bench
    steps: list[Step] = field(default_factory=list)  # the completed steps
    load: LoadProfile | None = None  # of the current step
    recorder: Recorder | None = None  # of the current step
    is_interrupted: bool = False
    _client: AsyncGramophoneClient = field(init=False)
    _start_s: float = field(init=False)
    _step_start_s: float = 0.0
    _jobs: int = 0

    def __post_init__(self) -> None:
        self._start_s = self.clock()

    async def run(self, client: AsyncGramophoneClient) -> None:
        """Runs all steps. If this task is cancelled, the current step becomes the last one; this is not an error.

        The client must have no retries, so that every refusal is counted.

        Raises `InvalidWorkload` if the server rejects a job as invalid, `GramophoneError` if the server is unreachable.
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
        """Seconds since the start of the current step."""
        return self.clock() - self._step_start_s

    async def _step(self, load: LoadProfile, before: tuple[int, int] | None) -> None:
        plan, stable = self.plan, asyncio.Event()
        recorder = Recorder(load, warm_up_s=plan.warm_up_s, window_s=plan.window_s, kinds=len(plan.workload))
        cpu_s, self._step_start_s = time.process_time(), self.clock()
        self.load, self.recorder = load, recorder
        sending = asyncio.create_task(self._send(load, recorder, stable))
        waiting = asyncio.create_task(stable.wait())
        ending = "time is up"
        try:
            await asyncio.wait({sending, waiting}, timeout=plan.duration_s, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._interrupt()
            ending = "interrupted"
        now_s, cpu_s = self.step_s, time.process_time() - cpu_s
        # Read everything before the jobs in flight are cancelled.
        tally = recorder.measured(now_s)
        ending = "stable" if recorder.is_stable else ending
        windows = tuple(Window(w.seconds, w.ok, w.result_s.quantile(0.5) or 0.0) for w in recorder.windows)
        timeline = tuple(map(Counter, recorder.timeline))
        unfinished, oldest_s = len(recorder.in_flight), now_s - min(recorder.in_flight.values(), default=now_s)
        after = None
        with suppress(GramophoneError):  # keep the measurement even if the server has become unreachable
            after = await self._server_load()
        waiting.cancel()
        sending.cancel()
        await asyncio.wait({sending})
        if not sending.cancelled() and (error := sending.exception()):
            # The first error is the cause; the others are from jobs of the same kind.
            raise error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        self.steps.append(
            Step(
                load=load,
                ending=ending,
                is_warm=recorder.is_warm,
                began_s=self._step_start_s - self._start_s,
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

    async def _send(self, load: LoadProfile, recorder: Recorder, stable: asyncio.Event) -> None:
        """Sends jobs until this task is cancelled."""
        jobs = planned_jobs(self.plan.workload, self.plan.seed)  # the same jobs in every step

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

    async def _job(self, job: PlannedJob, due_s: float, recorder: Recorder, stable: asyncio.Event) -> float:
        """Runs one job to its end. Returns the seconds that its caller should wait before its next job."""
        self._jobs += 1
        number, pause_s = self._jobs, 0.0
        sample = Sample(job.kind.name, due_s)
        recorder.record_start(number, due_s, self.step_s)
        try:
            if job.kind.frames or job.cancel_at is not None:
                await self._stream(job, number, sample)
            else:
                await self._stylize(job.kind, number, sample)
        except InvalidRequestError as error:
            # All jobs of this kind are invalid, so there is nothing to measure.
            raise InvalidWorkload(f"the server rejects the job {job.kind.name!r} as invalid: {error}") from error
        except GramophoneError as error:
            sample.status = error.reason or (error.code.name if error.code else type(error).__name__)
            pause_s = min(max(error.retry_after_s or 0.0, MIN_PAUSE_S), MAX_PAUSE_S)
        sample.ended_s = self.step_s
        recorder.record_end(number, sample)
        if recorder.is_stable:
            stable.set()
        return pause_s

    async def _stream(self, job: PlannedJob, number: int, sample: Sample) -> None:
        """Runs a job as a stream and cancels it where planned."""
        kind, pictures = job.kind, self.plan.pictures(job.kind)
        frames = FrameOptions(every_iterations=kind.frame_every, max_side=kind.frame_size) if kind.frames else None
        accepted, done = None, 0
        updates = self._client.stream(
            pictures.content,
            pictures.styles,
            frames=frames,
            checkpoints=None,
            patience=0,  # a job that loses its connection counts as failed
            timeout=kind.deadline_s or self.plan.deadline_s,
            preset=kind.preset,
            seed=number,
            **kind.overrides,
        )
        try:
            async with updates:
                async for update in updates:
                    match update:
                        case Accepted():
                            accepted = update
                        case Progress():
                            done = update.iteration
                            if job.cancel_at is not None and done >= job.cancel_at * update.iterations:
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

    async def _stylize(self, kind: JobKind, number: int, sample: Sample) -> None:
        """Runs a job as a unary call."""
        pictures = self.plan.pictures(kind)
        done = await self._client.stylize(
            pictures.content,
            pictures.styles,
            timeout=kind.deadline_s or self.plan.deadline_s,
            preset=kind.preset,
            seed=number,  # a different seed for each job, so that no result can come from a cache
            **kind.overrides,
        )
        sample.bytes_received += len(done.picture.data)
        size = done.picture.width, done.picture.height
        sample.megapixel_iterations = megapixel_iterations(done.recipe, *size, done.iterations, done.iterations)

    async def _server_load(self) -> tuple[int, int]:
        info = await self._client.server_info(timeout=SERVER_LOAD_TIMEOUT_S)
        return info.running_jobs, info.queued_jobs

    async def _settled(self, idle: tuple[int, int]) -> tuple[int, int] | None:
        """Waits until the server's load is back to `idle` or less; returns its load, or None if it does not answer."""
        end = self.clock() + SETTLE_TIMEOUT_S
        try:
            while (load := await self._server_load()) > idle and self.clock() < end:
                await asyncio.sleep(0.1)
        except DeadlineExceededError:  # the step will measure how jobs fare at such a server
            return None
        return load

    def _interrupt(self) -> None:
        """Turns the cancellation of this task into the end of the bench."""
        self.is_interrupted = True
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
