"""Images and checkpoints that are uploaded before the jobs that name them by digest. Used only on the event loop."""

from __future__ import annotations

import hashlib
import heapq
import io
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from gramophone.recipe import Violation
from gramophone_server.config import Limits, env_variable
from gramophone_server.domain.checkpoint import CHECKPOINT_START
from gramophone_server.domain.engine_api import CacheCounts
from gramophone_server.errors import InvalidRequest, ServerBusy
from gramophone_server.images.decoding import Header

__all__ = ["MAX_CHUNK_BYTES", "Hold", "StoredFile", "Upload", "UploadStore"]

MAX_CHUNK_BYTES = 2**20  # bytes; hashing it takes 0.7 ms of the event loop
# Kept at a time: files of 70 bytes would take ten times their size. To evict all of them for one large file takes 13 ms
# of the event loop, and 550 ms with twice as many files and claims.
MAX_FILES = 1024
MAX_CLAIMS = 4  # of one file
# A file that was neither uploaded nor named for so long is evicted first, whichever connection uploaded it: that may
# have ended, and would never become the one with the most bytes.
STALE_S = 600.0
BUSY_S = 1.0  # before a retry: decoding an image, for which it is held, takes less
# Most that the jobs of one connection hold of what others leave, so that uploads still find room. A single job may hold
# more.
HELD_OF_ONE = 0.75


class Upload:
    """A file that is being uploaded in chunks. It is refused with the first chunk that makes it too large to keep."""

    def __init__(self, limits: Limits) -> None:
        """Raises `InvalidRequest` if the server keeps no uploads."""
        if not limits.max_uploads_bytes:
            raise _refusal(
                f"cannot be kept: this server keeps no uploads (server setting {env_variable('max_uploads_bytes')} is "
                "0); send the images and the checkpoint with the job, as `data` and `resume`"
            )
        self._limits = limits
        self._chunks = io.BytesIO()
        self._hash = hashlib.sha256()
        self._start = b""

    def add(self, chunk: bytes) -> None:
        """Adds the next chunk. Raises `InvalidRequest`."""
        if len(chunk) > MAX_CHUNK_BYTES:
            raise _refusal(
                f"has {len(chunk)} bytes, at most {MAX_CHUNK_BYTES} are allowed; send the file in smaller chunks"
            )
        self._start += chunk[: len(CHECKPOINT_START) - len(self._start)]
        if self.is_checkpoint:
            what, setting, advice = "a checkpoint", "max_checkpoint_bytes", "send a light one"
        else:
            what, setting, advice = "an image", "max_image_bytes", "send a smaller or more compressed image"
        # The error names the lower of two limits.
        setting = min(setting, "max_uploads_bytes", key=lambda name: int(getattr(self._limits, name)))
        received, allowed = self._chunks.tell() + len(chunk), int(getattr(self._limits, setting))
        if received > allowed:
            raise _refusal(
                f"makes {what} of {received} bytes or more; at most {allowed} are allowed "
                f"(server setting {env_variable(setting)}); {advice}"
            )
        self._chunks.write(chunk)
        self._hash.update(chunk)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the chunks so far begin as a checkpoint does."""
        return self._start == CHECKPOINT_START

    @property
    def digest(self) -> str:
        """The digest of the chunks so far, in the form of `ImageSource.digest`."""
        return f"sha256:{self._hash.hexdigest()}"

    @property
    def data(self) -> bytes:
        """The chunks so far."""
        return self._chunks.getvalue()


@dataclass(eq=False)
class StoredFile:
    """A file of the store."""

    digest: str
    data: bytes
    header: Header | None  # None for a checkpoint
    used_s: float  # on the store's clock, when it was last uploaded or found
    owners: list[Owner] = field(default_factory=list)  # that have a claim on it
    holds: int = 0


@dataclass(eq=False)
class Owner:
    """A connection that has uploaded files of the store."""

    name: str
    host: Host
    bytes: int = 0  # of the files that it has a claim on
    idle: OrderedDict[str, StoredFile] = field(default_factory=OrderedDict)  # those that no job holds, oldest use first


@dataclass(eq=False)
class Host:
    """All connections of one host."""

    name: str
    bytes: int = 0  # of its owners
    owners: dict[str, Owner] = field(default_factory=dict)


class UploadStore:
    """Files by digest, up to a number of bytes.

    The connection of an upload has a claim on the file. If there is too little room, the store drops the oldest claim
    of the connection that claims the most bytes, of the host whose connections claim the most. A file without a claim
    is evicted. So a client that uploads a lot evicts its own files first, and is told to wait if jobs hold all of them.
    A file that was not used for `STALE_S` is evicted before all others, and one that a job holds is not evicted.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._clock = max_bytes, clock
        self._files: dict[str, StoredFile] = {}
        self._idle: OrderedDict[str, StoredFile] = OrderedDict()  # those that no job holds, oldest use first
        self._hosts: dict[str, Host] = {}
        self._holders: dict[str, _Holder] = {}  # by the connection of their jobs
        self._hits = self._misses = self._bytes = self._held_bytes = 0

    @property
    def counts(self) -> CacheCounts:
        """Hits and misses of `Hold.find`, and the bytes that are kept."""
        return CacheCounts(self._hits, self._misses, self._bytes, self._max_bytes)

    def keep(self, digest: str, data: bytes, owner: str, header: Header | None = None) -> None:
        """Keeps a file, or marks it as used if it is kept already. ``owner``: the address of the connection, whose part
        before the last colon is that of its host. ``header``: of an image, so that the jobs that name it do not read it
        again. Raises `ServerBusy` if jobs hold too many other files, or all those of the owner, which claims the most.
        """
        file = self._files.get(digest)
        if file is None:
            if self._held_bytes + len(data) > self._max_bytes or len(self._files) - len(self._idle) >= MAX_FILES:
                raise self._busy("jobs that are about to start use most")
            self._make_room(len(data), owner)
            file = self._files[digest] = self._idle[digest] = StoredFile(digest, data, header, self._clock())
            self._bytes += len(data)
        self._claim(file, owner)
        self._use(file)

    def hold(self, owner: str) -> Hold:
        """For the files of one job of this connection, in a `with` block."""
        return Hold(self, owner)

    def find(self, digest: str) -> StoredFile | None:
        """A file, marked as used, and counted as a hit or a miss."""
        file = self._files.get(digest)
        if file is None:
            self._misses += 1
        else:
            self._hits += 1
            self._use(file)
        return file

    def take(self, file: StoredFile, owner: str, *, is_first: bool) -> None:
        """Counts a job of this connection that holds the file. ``is_first``: it holds no other one yet. Raises
        `ServerBusy` if the other jobs of this connection hold too much beside it."""
        holder = self._holders.setdefault(owner, _Holder())
        others = holder.jobs - (not is_first)
        allowed = HELD_OF_ONE * (self._max_bytes - (self._held_bytes - holder.bytes))
        if others and not holder.counts[file] and holder.bytes + len(file.data) > allowed:
            raise self._busy(f"jobs of this connection that are about to start use {holder.bytes}")
        holder.jobs += is_first
        holder.bytes += 0 if holder.counts[file] else len(file.data)
        holder.counts[file] += 1
        self._set_held(file, 1)

    def give_back(self, files: Iterable[StoredFile], owner: str) -> None:
        """A job of this connection holds these files no more, and no other ones."""
        holder = self._holders[owner]
        holder.jobs -= 1
        for file in files:
            holder.counts[file] -= 1
            if not holder.counts[file]:
                del holder.counts[file]  # it may be evicted now, and would stay here until all others are given back
                holder.bytes -= len(file.data)
            self._set_held(file, -1)
        if not holder.jobs:
            del self._holders[owner]

    def _set_held(self, file: StoredFile, change: int) -> None:
        was_held = file.holds > 0
        file.holds += change
        if (file.holds > 0) == was_held:
            return
        self._held_bytes += change * len(file.data)
        file.used_s = self._clock()
        for idle in (self._idle, *(owner.idle for owner in file.owners)):
            if file.holds:
                del idle[file.digest]
            else:
                idle[file.digest] = file

    def _use(self, file: StoredFile) -> None:
        file.used_s = self._clock()
        if not file.holds:
            for idle in (self._idle, *(owner.idle for owner in file.owners)):
                idle.move_to_end(file.digest)

    def _claim(self, file: StoredFile, name: str) -> None:
        """Adds a claim. Of more than `MAX_CLAIMS` on one file, the one that would be dropped first is dropped."""
        host_name = name.rpartition(":")[0]
        host = self._hosts.setdefault(host_name, Host(host_name))
        owner = host.owners.setdefault(name, Owner(name, host))
        if owner in file.owners:
            return
        file.owners.append(owner)
        owner.bytes += len(file.data)
        host.bytes += len(file.data)
        if not file.holds:
            owner.idle[file.digest] = file
        if len(file.owners) > MAX_CLAIMS:
            self._drop_claim(file, max(file.owners, key=lambda owner: (owner.host.bytes, owner.bytes)))

    def _drop_claim(self, file: StoredFile, owner: Owner) -> None:
        """Drops a claim, the owner and the host if they have no other, and the file if there is no other on it."""
        file.owners.remove(owner)
        owner.idle.pop(file.digest, None)
        host = owner.host
        owner.bytes -= len(file.data)
        host.bytes -= len(file.data)
        if not owner.bytes:
            del host.owners[owner.name]
        if not host.owners:
            del self._hosts[host.name]
        if not file.owners:
            del self._files[file.digest], self._idle[file.digest]
            self._bytes -= len(file.data)

    def _make_room(self, size: int, uploader: str) -> None:
        """Evicts files until one of ``size`` bytes fits. It fits beside those that jobs hold. Raises `ServerBusy` if it
        is the turn of the uploader itself, and jobs hold all of its files."""
        stale_s = self._clock() - STALE_S
        while self._lacks_room(size) and (oldest := next(iter(self._idle.values()))).used_s < stale_s:
            for owner in tuple(oldest.owners):
                self._drop_claim(oldest, owner)
        # Heaps, because the scan of all owners for each of thousands of small files would take seconds.
        hosts = [(-host.bytes, host.name) for host in self._hosts.values()]
        owners = {
            host.name: [_rank(owner) for owner in host.owners.values() if owner.idle or owner.name == uploader]
            for host in self._hosts.values()
        }
        heapq.heapify(hosts)
        for heap in owners.values():
            heapq.heapify(heap)
        while self._lacks_room(size):
            host = self._hosts[heapq.heappop(hosts)[1]]
            if not owners[host.name]:  # jobs hold all of its files
                continue
            owner = host.owners[heapq.heappop(owners[host.name])[2]]
            if not owner.idle:
                raise self._busy(f"jobs that are about to start use all {owner.bytes} that this connection has")
            self._drop_claim(next(iter(owner.idle.values())), owner)
            if owner.idle or (owner.name == uploader and owner.bytes):
                heapq.heappush(owners[host.name], _rank(owner))
            if host.bytes:
                heapq.heappush(hosts, (-host.bytes, host.name))

    def _busy(self, who: str) -> ServerBusy:
        of = f"of the {self._max_bytes} bytes of uploads that are kept"
        return ServerBusy(f"{who} {of} (server setting {env_variable('max_uploads_bytes')})", BUSY_S)

    def _lacks_room(self, size: int) -> bool:
        return self._bytes + size > self._max_bytes or len(self._files) >= MAX_FILES


@dataclass(eq=False)
class _Holder:
    """A connection whose jobs hold files, each counted once."""

    jobs: int = 0
    bytes: int = 0
    counts: Counter[StoredFile] = field(default_factory=Counter)  # the jobs that hold a file


class Hold:
    """The files that one job uses until its images are decoded. They are not evicted during the `with` block."""

    def __init__(self, store: UploadStore, owner: str) -> None:
        self._store, self._owner = store, owner
        self._files: dict[str, StoredFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._files:
            self._store.give_back(self._files.values(), self._owner)
            self._files = {}

    def find(self, digest: str) -> StoredFile | None:
        """The file with this digest; None if it is not kept. Raises `ServerBusy` if other jobs of the connection hold
        too many others."""
        file = self._store.find(digest)
        if file is None:
            return None
        if digest not in self._files:
            self._store.take(file, self._owner, is_first=not self._files)
            self._files[digest] = file
        return file


def _rank(owner: Owner) -> tuple[int, float, str]:
    """The lowest is the owner that loses a file first."""
    used_s = next(iter(owner.idle.values())).used_s if owner.idle else math.inf
    return -owner.bytes, used_s, owner.name


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([Violation("chunk", description)])
