"""The store of uploads: what is kept, and what is evicted."""

import contextlib
import gc
import hashlib
import random
import weakref

import pytest

from gramophone_server.config import Limits
from gramophone_server.domain.checkpoint import CHECKPOINT_START
from gramophone_server.errors import InvalidRequest, ServerBusy
from gramophone_server.images import upload_store
from gramophone_server.images.decoding import Header
from gramophone_server.images.upload_store import STALE_S, Upload, UploadStore
from tests.support.clock import ManualClock

A, B, ELSEWHERE = "ipv4:10.0.0.1:40001", "ipv4:10.0.0.1:40002", "ipv4:10.0.0.2:40001"


def store(max_bytes):
    clock = ManualClock(reading_s=1e-6)  # no two files are used at the same time
    return UploadStore(max_bytes, clock), clock


def keep(uploads, names, owner=A, size=3):
    """Uploads one file for each letter, with that letter as its digest."""
    for name in names:
        uploads.keep(name, name.encode() * size, owner)


def kept(uploads, names):
    """Those of the letters whose files are kept. They count as used."""
    with uploads.hold("ipv4:10.0.0.3:40001") as held:
        return "".join(name for name in names if held.find(name) is not None)


def test_the_least_recently_used_file_of_a_client_is_evicted():
    uploads, _ = store(10)
    keep(uploads, "abc")
    with uploads.hold(A) as held:
        assert held.find("a").data == b"aaa"
    keep(uploads, "b")  # uploaded again, which counts as a use
    keep(uploads, "d", size=4)
    assert kept(uploads, "abcd") == "abd"
    assert uploads.counts == (4, 1, 10, 10)


def test_the_header_of_an_image_is_kept_with_it():
    uploads, _ = store(10)
    header = Header("PNG", 64, 32, 5)
    uploads.keep("a", b"image", A, header)
    uploads.keep("b", b"state", A)
    with uploads.hold(A) as held:
        assert (held.find("a").header, held.find("b").header) == (header, None)


def test_a_client_that_uploads_a_lot_evicts_its_own_files():
    uploads, _ = store(100)
    keep(uploads, "abc", A, 10)
    for name in range(50):
        uploads.keep(f"file {name}", bytes(9), B)
    assert kept(uploads, "abc") == "abc"
    assert [name for name in range(50) if kept(uploads, [f"file {name}"])] == list(range(43, 50))


def test_hosts_share_the_store_however_many_connections_they_have():
    uploads, _ = store(100)
    keep(uploads, "a", ELSEWHERE, 20)
    for number in range(40):  # each has less than the other host's connection
        uploads.keep(f"file {number}", bytes(10), f"ipv4:10.0.0.1:{number}")
    assert kept(uploads, "a") == "a"
    assert [number for number in range(40) if kept(uploads, [f"file {number}"])] == list(range(32, 40))


def test_an_upload_by_another_client_as_well_is_kept_as_long_as_one_of_them_deserves_it():
    uploads, _ = store(30)
    keep(uploads, "a", A, 5)
    keep(uploads, "a", B, 5)
    for name in range(20):  # which would evict a file of B alone
        uploads.keep(f"file {name}", bytes(9), B)
    assert kept(uploads, "a") == "a"


def test_a_file_with_many_owners_keeps_the_claims_of_those_with_the_fewest_bytes(monkeypatch):
    monkeypatch.setattr(upload_store, "MAX_CLAIMS", 2)
    uploads, _ = store(100)
    for number, owner in enumerate((A, B, ELSEWHERE)):
        uploads.keep(f"own {number}", bytes(10 * (3 - number)), owner)
        keep(uploads, "a", owner, 10)
    uploads.keep("more of A", bytes(35), A)
    assert kept(uploads, "a") == "a"
    assert kept(uploads, ["own 0", "own 1", "own 2"]) == "own 1own 2"


def test_files_that_nobody_uses_are_evicted_first():
    uploads, clock = store(30)
    keep(uploads, "a", A, 5)
    keep(uploads, "b", A, 5)
    clock.advance(STALE_S - 1)
    kept(uploads, "b")
    keep(uploads, "c", B, 10)
    clock.advance(2)
    keep(uploads, "d", B, 15)  # B has more, but it uses its files
    assert kept(uploads, "abcd") == "bcd"


def test_a_file_that_a_job_holds_is_not_evicted():
    uploads, _ = store(10)
    keep(uploads, "ab", size=5)
    with uploads.hold(A) as first, uploads.hold(B) as second:
        assert first.find("a") is second.find("a") is first.find("a")
        assert first.find("a").data == b"aaaaa"
        keep(uploads, "cd", size=5)
        assert kept(uploads, "abcd") == "ad"
        second.find("d")
        with pytest.raises(ServerBusy, match=r"jobs that are about to start use .* 10 bytes .*_MAX_UPLOADS_BYTES\)"):
            keep(uploads, "e", size=1)
        keep(uploads, "a")  # is kept already
        assert uploads.counts.bytes == 10
    keep(uploads, "e", size=1)
    assert kept(uploads, "ade") == "ae"  # was held until later


def test_a_file_that_no_job_holds_any_more_is_freed_with_its_eviction():
    """Otherwise a connection with one job that waits could keep any number of evicted files."""
    uploads, _ = store(20)
    keep(uploads, "ab", size=5)
    with uploads.hold(A) as lasting:
        lasting.find("a")
        with uploads.hold(A) as short:
            file = weakref.ref(short.find("b"))
        keep(uploads, "cdef", size=5)
        assert kept(uploads, "ab") == "a"
        gc.collect()
        assert file() is None


def test_the_jobs_of_one_connection_hold_three_quarters_of_what_others_leave():
    uploads, _ = store(100)
    keep(uploads, "abcdefghij", size=10)
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(uploads.hold(A)) for _ in range(4)]
        for job, names in zip(jobs, ("abc", "abc", "defg"), strict=False):  # files that both hold count once
            assert all(job.find(name) for name in names)
        with pytest.raises(
            ServerBusy, match=r"jobs of this connection .* use 70 of the 100 bytes .*_MAX_UPLOADS_BYTES\)"
        ):
            jobs[3].find("h")
        assert jobs[3].find("a")
        other = stack.enter_context(uploads.hold(B))
        assert other.find("h") and other.find("i") and other.find("j")  # one job may hold what is left
        jobs[2].__exit__(None, None, None)
        second, third = stack.enter_context(uploads.hold(B)), stack.enter_context(uploads.hold(B))
        assert second.find("d") and second.find("e")  # B holds 50 of the 70 that A leaves, and may hold 52
        with pytest.raises(ServerBusy):
            third.find("f")
    with uploads.hold(A) as job:
        assert all(job.find(name) for name in "abcdefghij")  # nothing is held any more, and this job is alone


def test_who_has_most_and_lets_jobs_hold_all_of_it_does_not_evict_those_of_others():
    uploads, _ = store(100)
    keep(uploads, "abcdef", A, 12)
    keep(uploads, "xy", B, 12)
    with uploads.hold(A) as job:
        for name in "abcdef":
            job.find(name)
        with pytest.raises(ServerBusy, match="use all 72 that this connection has of the 100 bytes"):
            keep(uploads, "g", A, 10)
        assert kept(uploads, "abcdefxyg") == "abcdefxy"
        keep(uploads, "z", B, 10)
        keep(uploads, "!", ELSEWHERE, 10)
        assert kept(uploads, "abcdefxyz!") == "abcdefz!"
    keep(uploads, "g", A, 10)
    assert kept(uploads, "g") == "g"


def test_small_files_are_counted_too(monkeypatch):
    monkeypatch.setattr(upload_store, "MAX_FILES", 3)
    uploads, _ = store(10**6)
    keep(uploads, "abcd")
    assert kept(uploads, "abcd") == "bcd"
    with uploads.hold(A) as held:
        for name in "bcd":
            held.find(name)
        with pytest.raises(ServerBusy):
            keep(uploads, "e")


def test_the_bytes_are_those_of_the_kept_files_whatever_happens():
    """Random operations, checked against the sum over all files; and no claim of an evicted file is left."""
    rng = random.Random(5)
    uploads, clock = store(60)
    sizes = {name: rng.randint(1, 25) for name in "abcdefghijkl"}
    holds = []
    for _ in range(3000):
        match rng.randrange(4):
            case 0:
                name = rng.choice(list(sizes))
                try:
                    uploads.keep(name, bytes(sizes[name]), rng.choice((A, B, ELSEWHERE)))
                except ServerBusy:
                    assert holds
            case 1:
                holds.append(uploads.hold(rng.choice((A, B))))
                with contextlib.suppress(ServerBusy):
                    holds[-1].find(rng.choice(list(sizes)))
            case 2 if holds:
                holds.pop(rng.randrange(len(holds))).__exit__(None, None, None)
            case 3:
                clock.advance(rng.choice((1, STALE_S / 5)))
        before = uploads.counts
        assert sum(size for name, size in sizes.items() if kept(uploads, name)) == before.bytes <= 60
    for held in holds:
        held.__exit__(None, None, None)
    uploads.keep("all", bytes(60), A)
    assert kept(uploads, sizes) == "" and uploads.counts.bytes == 60


def test_an_upload_consists_of_its_chunks():
    upload = Upload(Limits())
    for piece in (b"abc", b"", b"def"):
        upload.add(piece)
    assert (upload.digest, upload.data) == (f"sha256:{hashlib.sha256(b'abcdef').hexdigest()}", b"abcdef")
    assert not upload.is_checkpoint


def test_a_checkpoint_is_known_by_its_first_bytes_however_they_arrive():
    for pieces in ([CHECKPOINT_START + b"\x01"], [bytes([byte]) for byte in CHECKPOINT_START], [b"", CHECKPOINT_START]):
        upload = Upload(Limits())
        for piece in pieces:
            assert not upload.is_checkpoint
            upload.add(piece)
        assert upload.is_checkpoint
    upload = Upload(Limits())
    upload.add(b"not " + CHECKPOINT_START)
    assert not upload.is_checkpoint


@pytest.mark.parametrize(
    ("limits", "pieces", "words"),
    [
        (
            Limits(),
            [bytes(2**20 + 1)],
            "has 1048577 bytes, at most 1048576 are allowed; send the file in smaller chunks",
        ),
        (
            Limits(max_image_bytes=1024),
            [bytes(1000), bytes(25)],
            (
                "makes an image of 1025 bytes or more; at most 1024 are allowed "
                "(server setting GRAMOPHONE_MAX_IMAGE_BYTES)"
            ),
        ),
        (
            Limits(max_uploads_bytes=1024),
            [bytes(1000), bytes(25)],
            "at most 1024 are allowed (server setting GRAMOPHONE_MAX_UPLOADS_BYTES); send a smaller or more compressed",
        ),
        (
            Limits(max_image_bytes=1024, max_checkpoint_bytes=65536),
            [CHECKPOINT_START, bytes(65000), bytes(530)],
            (
                "makes a checkpoint of 65537 bytes or more; at most 65536 are allowed "
                "(server setting GRAMOPHONE_MAX_CHECKPOINT_BYTES); send a light one"
            ),
        ),
    ],
)
def test_an_upload_that_becomes_too_large_is_refused(limits, pieces, words):
    upload = Upload(limits)
    for piece in pieces[:-1]:
        upload.add(piece)
    with pytest.raises(InvalidRequest) as caught:
        upload.add(pieces[-1])
    (violation,) = caught.value.violations
    assert violation.field == "chunk" and words in violation.description


def test_a_server_that_keeps_no_uploads_refuses_them():
    with pytest.raises(InvalidRequest, match=r"GRAMOPHONE_MAX_UPLOADS_BYTES is 0\); send the images and"):
        Upload(Limits(max_uploads_bytes=0))
