"""The service's RPCs: check the request, find or make its job, send what happens to it. See `checks` and `messages`."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterator

from google.protobuf import duration_pb2

from gramophone.recipe import PRESETS
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from gramophone.wire import recipe_to_message
from gramophone_server.calls import Call, Context
from gramophone_server.checks import check_first, check_no_credit, check_page, check_request_id, check_watch
from gramophone_server.config import Limits
from gramophone_server.control import Controller
from gramophone_server.errors import EngineFailed, GramophoneError, ListingDisabled, RequestIdTaken
from gramophone_server.jobs import Job, Jobs
from gramophone_server.mailbox import CheckpointRule, FrameRule
from gramophone_server.messages import Encoders, View, job_message, result_encoding, version
from gramophone_server.requests import Admission, refuse, spec_digest
from gramophone_server.scheduler import Place, Scheduler
from gramophone_server.uploads import Upload
from gramophone_server.work import CacheCounts

__all__ = ["Servicer"]

log = logging.getLogger(__name__)

PAGE, LARGEST_PAGE = 50, 100  # jobs of a list


class Servicer(pb_grpc.StyleTransferServiceServicer):
    """StyleTransferService of one server."""

    def __init__(self, scheduler: Scheduler, limits: Limits, *, list_jobs: bool = False) -> None:
        self.jobs = Jobs(scheduler, limits)
        self._scheduler = scheduler
        self._limits = limits
        self._list_jobs = list_jobs
        self._admission = Admission(scheduler, limits)
        self._encoders = Encoders()
        self._preparations: set[asyncio.Task[None]] = set()  # asyncio itself does not hold its tasks
        self._calls: set[Call] = set()
        self._no_calls = asyncio.Event()
        self._no_calls.set()

    async def idle(self) -> None:
        """Returns when no RPC is under way."""
        await self._no_calls.wait()

    def close(self) -> None:
        """Gives the threads back, and forgets all jobs."""
        self.jobs.close()
        self._admission.close()
        self._encoders.close()

    async def Stylize(self, request: pb.StylizeRequest, context: Context) -> pb.StylizeResponse:
        """See the proto."""
        call = self._call("Stylize", context)
        response = pb.StylizeResponse()
        request.spec.ClearField("frames")
        request.spec.ClearField("checkpoints")
        try:
            async for told in self._made(request, call).responses(pb.StylizeStreamResponse):
                if told.event.HasField("accepted"):
                    response.accepted.CopyFrom(told.event.accepted)
                elif told.event.HasField("result"):
                    response.result.CopyFrom(told.event.result)
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    async def StylizeStream(
        self, request: pb.StylizeStreamRequest, context: Context
    ) -> AsyncIterator[pb.StylizeStreamResponse]:
        """See the proto."""
        call = self._call("StylizeStream", context)
        try:
            refuse(check_no_credit(request.spec.frames, "spec.frames"))
            async for response in self._made(request, call).responses(pb.StylizeStreamResponse):
                with call.writing:
                    yield response
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()

    async def StylizeInteractive(
        self, request_iterator: AsyncIterator[pb.StylizeInteractiveRequest], context: Context
    ) -> AsyncIterator[pb.StylizeInteractiveResponse]:
        """See the proto."""
        call = self._call("StylizeInteractive", context)
        try:
            requests = aiter(request_iterator)
            first = await anext(requests, None)
            controller = Controller(self._controlled(first, call), self._scheduler, self._limits)
            async for response in controller.responses(requests, call):
                with call.writing:
                    yield response
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()

    async def WatchJob(self, request: pb.WatchJobRequest, context: Context) -> AsyncIterator[pb.WatchJobResponse]:
        """See the proto."""
        call = self._call("WatchJob", context)
        try:
            refuse((*check_watch(request), *check_no_credit(request.frames, "frames")))
            job = self.jobs.find(request.job_id)
            view = self._watched(job, call, request, after=request.after_sequence)
            async for response in view.responses(pb.WatchJobResponse):
                with call.writing:
                    yield response
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        """See the proto."""
        call = self._call("GetJob", context)
        try:
            response = pb.GetJobResponse(job=job_message(self.jobs.find(request.job_id)))
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        """See the proto."""
        call = self._call("ListJobs", context)
        try:
            if not self._list_jobs:
                raise ListingDisabled
            refuse(check_page(request))
            size = min(request.page_size or PAGE, LARGEST_PAGE)
            before = int(request.page_token) if request.page_token else None
            page = list(itertools.islice(self.jobs.newest_first(before), size + 1))
            response = pb.ListJobsResponse(
                jobs=map(job_message, page[:size]),
                next_page_token=str(page[size - 1].ordinal) if len(page) > size else "",
            )
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        """See the proto."""
        call = self._call("CancelJob", context)
        try:
            job = self.jobs.find(request.job_id)
            job.cancel()
            response = pb.CancelJobResponse(job=job_message(job))
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    async def UploadImage(
        self, request_iterator: AsyncIterator[pb.UploadImageRequest], context: Context
    ) -> pb.UploadImageResponse:
        """See the proto."""
        call = self._call("UploadImage", context)
        try:
            upload = Upload(self._limits)
            async for request in request_iterator:
                upload.add(request.chunk)
            response = await self._admission.kept(upload)
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """See the proto."""
        call = self._call("GetServerInfo", context)
        try:
            engine = self._scheduler.engine
            response = pb.GetServerInfoResponse(
                version=version(),
                device=engine.device_name,
                precision=engine.precision,
                backbone=engine.backbone,
                weights=engine.weights_source,
                layers=engine.layers,
                limits=pb.Limits(**{f.name: getattr(self._limits, f.name) for f in dataclasses.fields(Limits)}),
                presets=(pb.PresetRecipe(name=n, recipe=recipe_to_message(r)) for n, r in PRESETS.items()),
                running_jobs=self._scheduler.running,
                queued_jobs=self._scheduler.queued,
                paused_jobs=self._scheduler.paused,
                style_cache=_cache_stats(engine.style_cache),
                uploads=_cache_stats(self._admission.uploads.counts),
            )
            wait_s = self._scheduler.estimated_wait_s()
            if wait_s is not None:
                response.estimated_wait.FromMilliseconds(round(wait_s * 1000))
        except BaseException as error:  # noqa: BLE001 - `fail` passes on what is not ours
            await call.fail(error)
        call.succeeded()
        return response

    def _call(self, method: str, context: Context) -> Call:
        call = Call(method, context, self._over, self._limits.max_blocked_s)
        self._calls.add(call)
        self._no_calls.clear()
        return call

    def _over(self, call: Call) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._no_calls.set()

    def _controlled(self, first: pb.StylizeInteractiveRequest | None, call: Call) -> View:
        """The job of a controller's first message."""
        refuse(check_first(first))
        assert first is not None, "its absence was refused"
        if first.HasField("start"):
            return self._made(first.start, call, controls=True)
        refuse(check_watch(first.attach, "attach."))
        job = self.jobs.find(first.attach.job_id)
        return self._watched(job, call, first.attach, after=first.attach.after_sequence, controls=True)

    def _made(
        self,
        request: pb.StylizeRequest | pb.StylizeStreamRequest | pb.StartCommand,
        call: Call,
        *,
        controls: bool = False,
    ) -> View:
        """The job that the request makes, or that an earlier one with its id made, for all of their RPCs."""
        spec, request_id = request.spec, request.request_id.lower()
        refuse(check_request_id(request_id))
        job = self.jobs.of_request(request_id)
        attached = job is not None
        if job is None:
            place = self._scheduler.reserve()  # before anything is hashed or decoded
            grace_s = _seconds(spec.detach_grace)
            job = self.jobs.create(request_id, spec_digest(spec) if request_id else b"", grace_s, result_encoding(spec))
            # A task of its own, so that the job has its images even if this call does not live to see them.
            deadline_at = None if grace_s else call.deadline_at
            preparation = asyncio.create_task(self._prepare(job, place, spec, deadline_at))
            self._preparations.add(preparation)
            preparation.add_done_callback(self._preparations.discard)
        elif job.digest != spec_digest(spec):
            raise RequestIdTaken(request_id)
        else:
            refuse(check_watch(spec, "spec."))  # what may differ from the request that made the job
        return self._watched(job, call, spec, attached=attached, controls=controls)

    def _watched(
        self,
        job: Job,
        call: Call,
        wanted: pb.JobSpec | pb.WatchJobRequest | pb.AttachCommand,
        *,
        after: int = 0,
        attached: bool = False,
        controls: bool = False,
    ) -> View:
        """The rest of the job, for one watcher. Nothing is awaited before it watches: a job must not be left alone."""
        frames = _frame_rule(wanted.frames) if wanted.HasField("frames") else None
        checkpoints = _checkpoint_rule(wanted.checkpoints) if wanted.HasField("checkpoints") else None
        mailbox = job.watch(frames, checkpoints, after, controls=controls)
        call.watches(job, mailbox)
        weights = self._scheduler.engine.weights_source
        return View(job, mailbox, self._encoders, wanted.frames, attached=attached, weights=weights)

    async def _prepare(self, job: Job, place: Place, spec: pb.JobSpec, deadline_at: float | None) -> None:
        """Makes work of the request and queues it; the job's watchers hear of it when that fails."""
        try:
            with place:
                job.submit(place, await self._admission.work(spec, place, deadline_at), deadline_at)
        except GramophoneError as error:
            error.__cause__ = error.__context__ = None  # their frames would keep the images as long as the job
            job.fail(error.with_traceback(None))
        except BaseException as error:
            log.error("job=%s failed", job.id, exc_info=error)
            job.fail(EngineFailed())
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise


def _cache_stats(counts: CacheCounts) -> pb.CacheStats:
    return pb.CacheStats(hits=counts.hits, misses=counts.misses, bytes=counts.bytes, max_bytes=counts.most_bytes)


def _frame_rule(frames: pb.FrameOptions) -> FrameRule:
    return FrameRule(max(1, frames.every_iterations), _seconds(frames.min_interval), frames.max_in_flight)


def _checkpoint_rule(checkpoints: pb.CheckpointOptions) -> CheckpointRule:
    return CheckpointRule(_seconds(checkpoints.min_interval), checkpoints.light)


def _seconds(duration: duration_pb2.Duration) -> float:
    return float(duration.seconds + duration.nanos / 1e9)
