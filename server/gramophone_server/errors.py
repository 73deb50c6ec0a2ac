"""All errors of the server, in terms of the domain. `rpc.status` has their gRPC codes and details.

GramophoneError
├── InvalidRequest        the request violates rules; lists every field
├── NotReady              the server is still starting; retry later
├── QueueFull             the queue has no room; retry later
├── DeadlineUnattainable  the job would not end before its deadline
├── ShuttingDown          the server takes no new jobs
├── JobNotFound           no job has this id, or it is no longer kept
├── RequestIdTaken        the request's id belongs to a job with another spec
├── ImageNotFound         no upload has this digest, or it is no longer kept
├── JobControlled         the job already has a controller
├── TooManyWatchers       the job has as many watchers as allowed
├── ServerBusy            other calls use up what this call needs; retry later
├── SlowSender            a client did not send a message that the server waited for
├── ListingDisabled       this server does not list its jobs
├── Cancelled             the job was cancelled by a client, or its last watcher left
├── SlowReader            a client did not read its messages; the job has only lost this watcher
├── Diverged              the loss became NaN or infinite
├── OutOfDeviceMemory     the job does not fit into device memory
├── OutOfHostMemory       host memory ran out while an image was decoded, encoded or copied
├── EngineFailed          a defect: the engine raised an error that is none of the above
└── StartupError          the server cannot start as configured; never reaches a client
"""

from collections.abc import Iterable

from gramophone.recipe import Violation

__all__ = [
    "Cancelled",
    "DeadlineUnattainable",
    "DeviceLost",
    "Diverged",
    "EngineFailed",
    "GramophoneError",
    "ImageNotFound",
    "InvalidRequest",
    "JobControlled",
    "JobNotFound",
    "ListingDisabled",
    "NotReady",
    "OutOfDeviceMemory",
    "OutOfHostMemory",
    "QueueFull",
    "RequestIdTaken",
    "ServerBusy",
    "ShuttingDown",
    "SlowReader",
    "SlowSender",
    "StartupError",
    "TooManyWatchers",
]


class GramophoneError(Exception):
    """Base class of all errors of the server except `DeviceLost`."""


class InvalidRequest(GramophoneError):
    """The request violates at least one rule; `violations` has a field path, or "", and a sentence for each."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(": ".join(filter(None, v)) for v in self.violations))


class NotReady(GramophoneError):
    """The server has started but has not loaded its network yet."""

    def __init__(self, retry_after_s: float = 2.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"the server is still loading its network; retry after about {retry_after_s:.0f} s")


class QueueFull(GramophoneError):
    """The queue has as many jobs as allowed, or as one connection may have: ``own``."""

    def __init__(self, waiting: int, limit: int, retry_after_s: float, paused: int = 0, own: int = 0) -> None:
        self.retry_after_s = retry_after_s
        jobs = f"{waiting} waiting" + (f" and {paused} paused, which keep their places" if paused else "")
        full = f"this connection has {own} jobs, and the rest of the queue is for others" if own else "queue is full"
        super().__init__(f"{full}: {jobs}, limit {limit}; retry after about {retry_after_s:.0f} s")


class DeadlineUnattainable(GramophoneError):
    """By what was measured, the job would not end before its client's deadline, or would break that of another one.

    The least seconds, as estimated: ``decoding_s`` of its largest image, ``wait_s`` until it starts, ``run_s`` of the
    device, ``others_s`` that other jobs have it meanwhile, ``delivery_s`` of its result. They are ``spread`` more or
    less (relative), and rest on pictures of ``measured`` pixels. ``promised_s``: device seconds that are promised to
    jobs with deadlines, if that is the reason; ``wait_s`` is then by how much it or one of these would be late.
    """

    def __init__(
        self,
        wait_s: float,
        run_s: float,
        left_s: float,
        *,
        decoding_s: float = 0.0,
        others_s: float = 0.0,
        delivery_s: float = 0.0,
        spread: float = 0.0,
        measured: int = 0,
        promised_s: float | None = None,
    ) -> None:
        alone_s = decoding_s + run_s + delivery_s
        needed_s = wait_s + others_s + alone_s
        # A retry helps only if the others are the problem: a job that takes too long alone must not be sent again.
        self.retry_after_s = max(wait_s, needed_s - left_s) if alone_s <= left_s else None
        uncertain = f", less the uncertainty of {100 * spread:.0f} %"
        basis = f" (iterations as measured at about {measured} pixels{uncertain})" if measured else ""
        if promised_s is None:
            parts = {
                "to decode its images": decoding_s,
                "until its turn": wait_s,
                "for its iterations": run_s,
                "for the jobs beside it": others_s,
                "to encode and send its result": delivery_s,
            }
            named = ", ".join(f"{_duration(seconds)} {what}" for what, seconds in parts.items() if seconds >= 0.0005)
            reason = f"the job would need at least {_duration(needed_s)}: {named}{basis}"
        else:
            reason = (
                f"the job would take at least {_duration(run_s)} of the device{basis}; {_duration(promised_s)} of it "
                f"are promised to jobs with deadlines, and this job or one of these would be {_duration(wait_s)} late"
            )
        super().__init__(
            f"{reason}; the call ends in {_duration(left_s)}; "
            "allow more time, set a time_budget, or ask for fewer iterations or a smaller size"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


class ShuttingDown(GramophoneError):
    """The server drains: running jobs may end, new ones are refused."""

    def __init__(self, retry_after_s: float = 5.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "the server is shutting down and takes no new jobs; send the job to another server or retry later"
        )


class JobNotFound(GramophoneError):
    """The registry has no such job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id[:36]!a}; it never existed, or it has ended and is no longer kept")


class RequestIdTaken(GramophoneError):
    """The same request_id was sent with another spec."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {request_id} belongs to a job with another spec; make a new id for a new job")


class ListingDisabled(GramophoneError):
    """Ids of jobs are secrets, and the operator has not allowed listing them."""

    def __init__(self) -> None:
        super().__init__(
            "this server does not list its jobs, because any client that knows a job's id can watch and cancel it; "
            "the server's operator can allow it with --list-jobs"
        )


class Cancelled(GramophoneError):
    """A client cancelled the job, or its last watcher left."""

    def __init__(self) -> None:
        super().__init__("the job was cancelled, by CancelJob or because its last watcher left")


class JobControlled(GramophoneError):
    """A job has one controller at a time."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"job {job_id[:36]!a} already has a controller; WatchJob can still watch it")


class TooManyWatchers(GramophoneError):
    """The job has as many watchers as allowed."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the job already has {limit} watchers, and more are not allowed")


class ServerBusy(GramophoneError):
    """Other calls use up something that this call needs."""

    def __init__(self, what: str, retry_after_s: float) -> None:
        """``what``: the clause that says what is used up, and the setting of its limit."""
        self.retry_after_s = retry_after_s
        super().__init__(f"the server is busy: {what}; retry after about {max(1.0, retry_after_s):.0f} s")


class SlowSender(GramophoneError):
    """A client did not send a message in time."""

    def __init__(self, idle_s: float) -> None:
        super().__init__(
            f"the client did not send a message for {idle_s:g} s, although the server waited for it, "
            "so its call was ended"
        )


class ImageNotFound(GramophoneError):
    """The server keeps no upload with these digests."""

    def __init__(self, *images: str, checkpoint: str = "", keeps_none: bool = False) -> None:
        """``images``: the digests of images. ``checkpoint``: that of a checkpoint; empty if none is missing.
        ``keeps_none``: the server keeps no uploads at all."""
        self.digests = (*images, *filter(None, [checkpoint]))
        missing = []
        if images:
            others = f" and {len(images) - 1} more" if len(images) > 1 else ""
            missing.append(f"no image {images[0][:80]!a}{others}")
        if checkpoint:
            missing.append(f"no checkpoint {checkpoint[:80]!a}")
        them = "it" if len(self.digests) == 1 else "them"
        advice = f"upload {them} with UploadImage, and send the job again"
        if keeps_none:
            advice = f"it keeps no uploads, so send {them} with the job, as `data` or `resume`"
        super().__init__(f"this server keeps {' and '.join(missing)}; {advice}")


class SlowReader(GramophoneError):
    """A client did not read in time."""

    def __init__(self, blocked_s: float) -> None:
        super().__init__(
            f"the client has kept a message waiting for {blocked_s:g} s, so its call was ended; "
            "a job with detach_grace continues, and WatchJob can watch it again"
        )


class Diverged(GramophoneError):
    """The loss became NaN or infinite; the job's last frame is its last good picture."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        super().__init__(
            f"the loss became NaN or infinite at iteration {iteration}; "
            "a smaller step, or smaller alpha, beta and tv_weight, may help"
        )


class OutOfDeviceMemory(GramophoneError):
    """The job does not fit into device memory."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"the device has too little memory for a {width}x{height} picture; ask for a smaller size")


class OutOfHostMemory(GramophoneError):
    """The server ran out of host memory."""

    def __init__(self, retry_after_s: float = 5.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "the server ran out of memory while it worked on this; ask for a smaller size, or retry after about "
            f"{retry_after_s:.0f} s"
        )


class EngineFailed(GramophoneError):
    """A defect; the log has the traceback."""

    def __init__(self) -> None:
        super().__init__("the server failed while working on this job; its log has the details")


class StartupError(GramophoneError):
    """One sentence for the operator: what is wrong and what to do."""


class DeviceLost(Exception):
    """The device no longer works, for example a GPU after an illegal memory access, until the process ends. It concerns
    all jobs, so it is never reported as the error of one."""
