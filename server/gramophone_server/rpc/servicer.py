"""The service's RPCs: check the request, find or create its job, send its events. See `validation` and `responses`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterator

from google.protobuf import duration_pb2

from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.errors import Cancelled, GramophoneError, ListingDisabled, RequestIdTaken, ShuttingDown
from gramophone_server.images.upload_store import Upload, UploadStore
from gramophone_server.jobs.job import Job
from gramophone_server.jobs.mailbox import CheckpointRule, FrameRule
from gramophone_server.jobs.registry import JobRegistry
from gramophone_server.rpc.admission import Admission
from gramophone_server.rpc.byte_budget import OF_ONE_CONNECTION, ByteBudget
from gramophone_server.rpc.calls import ActiveCalls, Context, RpcCall, as_domain_error
from gramophone_server.rpc.encoders import Encoders
from gramophone_server.rpc.event_stream import JobEventStream
from gramophone_server.rpc.interactive import Controller
from gramophone_server.rpc.outgoing import Outgoing
from gramophone_server.rpc.receiving import Receiver
from gramophone_server.rpc.responses import constant_info, job_message, result_encoding
from gramophone_server.rpc.send_timeout import READING_S
from gramophone_server.rpc.status import reason
from gramophone_server.rpc.validation import (
    check_first_message,
    check_no_max_in_flight,
    check_page_options,
    check_request_id,
    check_watch_options,
    raise_violations,
)
from gramophone_server.scheduling.reservation import Reservation
from gramophone_server.scheduling.scheduler import Scheduler
from gramophone_server.telemetry.access_log import AccessLog
from gramophone_server.telemetry.metrics import Metrics

__all__ = ["Servicer"]

log = logging.getLogger(__name__)

PAGE_SIZE, MAX_PAGE_SIZE = 50, 100  # jobs on a page of ListJobs


class Servicer(pb_grpc.StyleTransferServiceServicer):
    """StyleTransferService of one server."""

    def __init__(
        self,
        scheduler: Scheduler,
        limits: Limits,
        *,
        list_jobs: bool = False,
        metrics: Metrics | None = None,
        access_log: AccessLog | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self.jobs = JobRegistry(scheduler.withdraw, limits, self._count_ended_job)
        self.receiver = Receiver(limits)
        self.calls = ActiveCalls(self._metrics, access_log or AccessLog(""), limits, self.receiver)
        self._scheduler = scheduler
        self._limits = limits
        self._list_jobs = list_jobs
        self.admission = Admission(scheduler, limits)
        self._encoders = Encoders()
        what = f"clients have not read all that they were sent (server setting {env_variable('max_sending_bytes')})"
        self.sending = ByteBudget(
            limits.max_sending_bytes,
            what,
            of_one=OF_ONE_CONNECTION,
            replaceable_after_s=READING_S,
            max_wait_s=limits.max_blocked_s,
        )
        self._preparations: dict[Job, asyncio.Task[None]] = {}
        self._constant_info: pb.GetServerInfoResponse | None = None  # 0.2 ms to build

    @property
    def uploads(self) -> UploadStore:
        """The uploaded images that are kept for later jobs."""
        return self.admission.uploads

    @property
    def preparing(self) -> int:
        """The number of jobs whose requests are being checked and images decoded."""
        return len(self._preparations)

    async def idle(self) -> None:
        """Returns when no RPC is active."""
        await self.calls.idle()

    def start(self) -> None:
        """Starts what the first requests would wait for. Does not block."""
        self.admission.start()

    def close(self) -> None:
        """Stops the threads, and forgets all jobs."""
        for preparation in self._preparations.values():
            preparation.cancel()
        self.jobs.close()
        self.admission.close()
        self._encoders.close()
        self.receiver.close()

    # RPCs; the proto documents them -----------------------------------------------------------------------------------

    async def Stylize(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("Stylize", context) as call:
            with self._counting_rejections():
                request = await call.incoming.receive(pb.StylizeRequest)
                request.spec.ClearField("frames")
                request.spec.ClearField("checkpoints")
                events = await self._create_or_find(request, call)
            del request  # its images
            async with call.sending(await events.final_response()) as message:
                yield message

    async def StylizeStream(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("StylizeStream", context) as call:
            with self._counting_rejections():
                request = await call.incoming.receive(pb.StylizeStreamRequest)
                raise_violations(check_no_max_in_flight(request.spec.frames, "spec.frames"))
                events = await self._create_or_find(request, call)
            del request  # its images
            async for response in events.responses():
                async with call.sending(response) as message:
                    yield message

    async def StylizeInteractive(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("StylizeInteractive", context) as call:
            controller = Controller(await self._start_or_attach(call), self._scheduler, self._limits)
            async for response in controller.responses(call):
                async with call.sending(response) as message:
                    yield message

    async def WatchJob(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("WatchJob", context) as call:
            request = await call.incoming.receive(pb.WatchJobRequest)
            raise_violations((*check_watch_options(request), *check_no_max_in_flight(request.frames, "frames")))
            job = self.jobs.find(request.job_id)
            events = self._watch(job, call, request, after=request.after_sequence)
            async for response in events.responses():
                async with call.sending(response) as message:
                    yield message

    async def GetJob(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("GetJob", context) as call:
            request = await call.incoming.receive(pb.GetJobRequest)
            job = self.jobs.find(request.job_id)
            call.set_job(job)
            async with call.replying(pb.GetJobResponse(job=job_message(job))) as message:
                yield message

    async def ListJobs(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("ListJobs", context) as call:
            request = await call.incoming.receive(pb.ListJobsRequest)
            if not self._list_jobs:
                raise ListingDisabled
            raise_violations(check_page_options(request))
            size = min(request.page_size or PAGE_SIZE, MAX_PAGE_SIZE)
            before = int(request.page_token) if request.page_token else None
            page = list(itertools.islice(self.jobs.newest_first(before), size + 1))
            response = pb.ListJobsResponse(
                jobs=map(job_message, page[:size]),
                next_page_token=str(page[size - 1].ordinal) if len(page) > size else "",
            )
            async with call.replying(response) as message:
                yield message

    async def CancelJob(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("CancelJob", context) as call:
            request = await call.incoming.receive(pb.CancelJobRequest)
            job = self.jobs.find(request.job_id)
            call.set_job(job)
            job.cancel()
            async with call.replying(pb.CancelJobResponse(job=job_message(job))) as message:
                yield message

    async def UploadImage(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("UploadImage", context) as call:
            upload = Upload(self._limits)
            while (request := await call.incoming.receive_next(pb.UploadImageRequest)) is not None:
                upload.add(request.chunk)
            response = await self.admission.keep_upload(upload, call.connection)
            del upload
            call.incoming.release()
            async with call.replying(response) as message:
                yield message

    async def GetServerInfo(self, _: object, context: Context) -> AsyncIterator[Outgoing]:
        """See the proto."""
        async with self.calls.rpc("GetServerInfo", context) as call:
            await call.incoming.receive(pb.GetServerInfoRequest)
            engine = self._scheduler.engine
            if self._constant_info is None:
                self._constant_info = constant_info(engine, self._limits)
            response = pb.GetServerInfoResponse()
            response.CopyFrom(self._constant_info)
            response.running_jobs = self._scheduler.running
            response.queued_jobs = self._scheduler.queued
            response.paused_jobs = self._scheduler.paused
            response.style_cache.CopyFrom(_cache_stats(engine.style_cache))
            response.uploads.CopyFrom(_cache_stats(self.uploads.counts))
            wait_s = self._scheduler.estimated_wait_s()
            if wait_s is not None:
                response.estimated_wait.FromMilliseconds(round(wait_s * 1000))
            async with call.replying(response) as message:
                yield message

    # The job of a request ---------------------------------------------------------------------------------------------

    async def _start_or_attach(self, call: RpcCall) -> JobEventStream:
        """The events of the job that a controller's first message starts or attaches to."""
        with self._counting_rejections():
            first = await call.incoming.receive_next(pb.StylizeInteractiveRequest)
            raise_violations(check_first_message(first))
            assert first is not None, "its absence was refused"
            if first.HasField("start"):
                return await self._create_or_find(first.start, call, controls=True)
        raise_violations(check_watch_options(first.attach, "attach."))
        job = self.jobs.find(first.attach.job_id)
        if not job.ended:  # otherwise it takes no command
            await call.incoming.reserve_commands()
        call.incoming.release()
        return self._watch(job, call, first.attach, after=first.attach.after_sequence, controls=True)

    async def _create_or_find(
        self,
        request: pb.StylizeRequest | pb.StylizeStreamRequest | pb.StartCommand,
        call: RpcCall,
        *,
        controls: bool = False,
    ) -> JobEventStream:
        """The events of a new job, or of the job that an earlier request with the same id created."""
        spec, request_id = request.spec, request.request_id.lower()
        raise_violations(check_request_id(request_id))
        job = await self._find_by_request(request_id, spec, call)
        if controls and (job is None or not job.ended):
            await call.incoming.reserve_commands()
            job = await self._find_by_request(request_id, spec, call)  # again, because others came meanwhile
        attached = job is not None
        if job is None:
            job = self._create(spec, request_id, call)
        else:
            # The only fields that may differ from those of the request that created the job.
            raise_violations(check_watch_options(spec, "spec."))
        call.incoming.release()  # unless the preparation of the job has taken them
        return self._watch(job, call, spec, attached=attached, controls=controls)

    async def _find_by_request(self, request_id: str, spec: pb.JobSpec, call: RpcCall) -> Job | None:
        """The job that an earlier request with this id created. Raises `RequestIdTaken` if its spec was another one."""
        digest = None
        # Looked up again after each wait: if the job has failed in the meantime, the request is a new one.
        while (job := self.jobs.find_by_request(request_id)) is not None:
            if job in self._preparations:  # its digest is known when that has ended
                with call.incoming.giving_way():
                    await asyncio.wait([self._preparations[job]])
            elif digest is None:
                digest = await self.admission.digest(spec, call.connection, call.incoming.received_bytes)
            elif digest != job.digest:
                raise RequestIdTaken(request_id)
            else:
                return job
        return None

    def _create(self, spec: pb.JobSpec, request_id: str, call: RpcCall) -> Job:
        """Creates a job and starts to prepare it. The caller must watch it at once."""
        reservation = self._scheduler.reserve(call.connection)  # before anything is hashed or decoded
        # Clipped, because it is not checked yet, and GetJob may need the job's expire time before that.
        grace_s = min(max(0.0, _seconds(spec.detach_grace)), self._limits.max_detach_s)
        job = self.jobs.create(request_id, grace_s, result_encoding(spec), call.connection)
        # A task of its own, so that the job gets its images even if this call ends before they are decoded.
        deadline_at = None if grace_s else call.deadline_at
        size = call.incoming.received_bytes
        preparation = asyncio.create_task(self._prepare(job, reservation, spec, deadline_at, call.connection, size))
        self._preparations[job] = preparation
        preparation.add_done_callback(lambda _: self._preparations.pop(job))
        if (received := call.incoming.take_share()) is not None:
            preparation.add_done_callback(lambda _: received.give_back())
        return job

    async def _prepare(
        self, job: Job, reservation: Reservation, spec: pb.JobSpec, deadline_at: float | None, owner: str, size: int
    ) -> None:
        """Decodes a request of ``size`` bytes and queues its job. If that fails, so does the job, with the same error.
        If the job ends meanwhile, because its watchers leave, this task is cancelled, and gives back all that it has
        taken."""
        try:
            state = await self.admission.prepare(spec, reservation, deadline_at, owner, size)
            if job.request_id:
                job.digest = await self.admission.digest(spec, owner, size)
            if job.admit(state):
                self._scheduler.submit(reservation, state, job, deadline_at, owner)
        except GramophoneError as error:
            error.__cause__ = error.__context__ = None  # their frames would keep the images as long as the job
            job.fail(error.with_traceback(None))
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                job.fail(ShuttingDown())  # it has ended already, unless the server ends
                raise
            log.error("job=%s failed", job.id, exc_info=error)
            job.fail(as_domain_error(error))
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise
        finally:
            self._scheduler.release(reservation)

    def _watch(
        self,
        job: Job,
        call: RpcCall,
        options: pb.JobSpec | pb.WatchJobRequest | pb.AttachCommand,
        *,
        after: int = 0,
        attached: bool = False,
        controls: bool = False,
    ) -> JobEventStream:
        """The job's events after number `after`. Synchronous, so that no job is left without a watcher."""
        frames = _frame_rule(options.frames) if options.HasField("frames") else None
        checkpoints = _checkpoint_rule(options.checkpoints) if options.HasField("checkpoints") else None
        mailbox = job.watch(frames, checkpoints, after, controls=controls)
        call.attach(job, mailbox)
        weights = self._scheduler.engine.weights_source
        return JobEventStream(
            job,
            mailbox,
            self._encoders,
            self.sending,
            connection=call.connection,
            frames=options.frames,
            attached=attached,
            weights=weights,
            on_result=self._scheduler.record_delivery,
        )

    # Metrics of jobs --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _counting_rejections(self) -> Iterator[None]:
        """Counts an error of its body as a rejected job. Jobs with bad images are counted by `_count_ended_job`."""
        try:
            yield
        except GramophoneError as error:
            self._metrics.job_rejected(reason(error))
            raise

    def _count_ended_job(self, job: Job) -> None:
        assert job.duration_s is not None, "it has ended"
        if (preparation := self._preparations.get(job)) is not None:
            preparation.cancel()
        if job.summary is None:  # never accepted; if its client gave it up before that, it was not rejected either
            if job.error is not None and not isinstance(job.error, Cancelled):
                self._metrics.job_rejected(reason(job.error))
            return
        outcome = job.result.reason.name if job.result is not None else reason(job.error or Cancelled())
        self._metrics.job_ended(outcome, job.duration_s, job.waited_s, job.first_frame_s)


def _cache_stats(counts: CacheCounts) -> pb.CacheStats:
    return pb.CacheStats(hits=counts.hits, misses=counts.misses, bytes=counts.bytes, max_bytes=counts.max_bytes)


def _frame_rule(frames: pb.FrameOptions) -> FrameRule:
    return FrameRule(max(1, frames.every_iterations), _seconds(frames.min_interval), frames.max_in_flight)


def _checkpoint_rule(checkpoints: pb.CheckpointOptions) -> CheckpointRule:
    return CheckpointRule(_seconds(checkpoints.min_interval), checkpoints.light)


def _seconds(duration: duration_pb2.Duration) -> float:
    return float(duration.seconds + duration.nanos / 1e9)
