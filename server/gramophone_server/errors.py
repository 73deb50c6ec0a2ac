"""What can go wrong, in the domain's own words. Codes and wire details are the servicer's business.

GramophoneError
├── InvalidRequest     the caller asked for something that cannot be done; lists every field
├── NotReady           the server is still starting; try again after a while
├── QueueFull          no room to wait; try again after a while
├── DeadlineUnattainable  it would not be done in time
├── ShuttingDown       the server takes no new jobs
├── JobNotFound        no job of this id, or no longer
├── RequestIdTaken     the request's id belongs to a job with another spec
├── ImageNotFound      no image of this digest, or no longer
├── JobControlled      somebody else controls the job
├── TooManyWatchers    no room for another watcher of the job
├── ListingDisabled    this server does not say which jobs it has
├── Cancelled          the job was stopped from outside
├── SlowReader         a watcher did not take its messages; its job has only lost that watcher
├── Diverged           the loss stopped being finite
├── OutOfDeviceMemory  the job does not fit
├── OutOfHostMemory    memory ended while an image was decoded, encoded or copied
├── EngineFailed       a defect: the engine raised something that none of the above describes
└── StartupError       the server cannot start as configured; never reaches a caller
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
    "ShuttingDown",
    "SlowReader",
    "StartupError",
    "TooManyWatchers",
]


class GramophoneError(Exception):
    """Everything below."""


class InvalidRequest(GramophoneError):
    """The request breaks at least one rule; `violations` has a field path and a sentence for each."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


class NotReady(GramophoneError):
    """The server has started but has not loaded its network yet."""

    def __init__(self, retry_after_s: float = 2.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(f"the server is still loading its network; retry after about {retry_after_s:.0f} s")


class QueueFull(GramophoneError):
    """As many jobs wait as may wait."""

    def __init__(self, waiting: int, limit: int, retry_after_s: float, paused: int = 0) -> None:
        self.retry_after_s = retry_after_s
        there = f"{waiting} waiting" + (f" and {paused} paused, which keep their places" if paused else "")
        super().__init__(f"queue is full: {there}, limit {limit}; retry after about {retry_after_s:.0f} s")


class DeadlineUnattainable(GramophoneError):
    """By the speed measured so far the job would not be done by its caller's deadline."""

    def __init__(self, wait_s: float, run_s: float, left_s: float) -> None:
        # Only the waiting can pass: a job that takes too long by itself is not to be sent again.
        self.retry_after_s = wait_s if run_s <= left_s else None
        super().__init__(
            f"the job would wait for about {wait_s:.1f} s and then take about {run_s:.1f} s, and the call ends in "
            f"{left_s:.1f} s; allow more time, set a time_budget, or ask for fewer iterations or a smaller size"
        )


class ShuttingDown(GramophoneError):
    """The server drains: running jobs end, new ones are refused."""

    def __init__(self, retry_after_s: float = 5.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "the server is shutting down and takes no new jobs; send the job to another one or retry later"
        )


class JobNotFound(GramophoneError):
    """The registry has no such job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id[:36]!a}; it never was, or it ended and was forgotten")


class RequestIdTaken(GramophoneError):
    """The same request_id came with another spec."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {request_id} belongs to a job with another spec; make a new id for a new job")


class ListingDisabled(GramophoneError):
    """Ids of jobs are secrets, and whoever runs the server has not allowed to list them."""

    def __init__(self) -> None:
        super().__init__(
            "this server does not list its jobs, because whoever knows the id of one can watch and cancel it; "
            "whoever runs the server can allow it with --list-jobs"
        )


class Cancelled(GramophoneError):
    """Somebody stopped the job, or nobody watched it."""

    def __init__(self) -> None:
        super().__init__("the job was stopped, by CancelJob or because nobody watched it")


class JobControlled(GramophoneError):
    """A job has one controller at a time."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"somebody controls job {job_id[:36]!a} already; WatchJob can watch it all the same")


class TooManyWatchers(GramophoneError):
    """As many watch a job as may."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the job has {limit} watchers already, and more are not allowed")


class ImageNotFound(GramophoneError):
    """A digest of no image that the server keeps."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"no image {digest[:80]!a} is kept here; upload it with UploadImage, and send the job again")


class SlowReader(GramophoneError):
    """A message was not taken in time."""

    def __init__(self, blocked_s: float) -> None:
        super().__init__(
            f"the reader left a message untaken for {blocked_s:g} s and was dropped; "
            "a job with detach_grace goes on meanwhile, and WatchJob finds it"
        )


class Diverged(GramophoneError):
    """A loss became NaN or infinite; the job's last frame is its last good picture."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        super().__init__(
            f"the loss stopped being finite at iteration {iteration}; "
            "a smaller step, or smaller alpha, beta and tv_weight, may help"
        )


class OutOfDeviceMemory(GramophoneError):
    """The device could not hold the job."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"the device has too little memory for a {width}x{height} picture; ask for a smaller size")


class OutOfHostMemory(GramophoneError):
    """The server itself could not hold what was asked of it, away from the device."""

    def __init__(self) -> None:
        super().__init__(
            "the server's memory ended while it worked on this; ask for a smaller size, or try again later"
        )


class EngineFailed(GramophoneError):
    """Something broke that should not; the log has the traceback."""

    def __init__(self) -> None:
        super().__init__("the server failed while working on this job; its log has the details")


class StartupError(GramophoneError):
    """One sentence for whoever runs the server: what is wrong and what to do."""


class DeviceLost(Exception):
    """The device answers nothing any more, as a GPU does after an illegal access until its process has ended. Not of one job,
    so no caller hears of it."""
