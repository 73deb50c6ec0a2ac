"""Small images on threads, large ones in processes that end when nobody waits for them."""

import asyncio
import io
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest
import torch
from PIL import Image

from gramophone_server.config import DECODER_THREADS, Limits
from gramophone_server.domain import job
from gramophone_server.errors import EngineFailed
from gramophone_server.images import codec, decoder_client
from gramophone_server.images.containers import UnusableImage
from gramophone_server.images.decoder_client import DecoderProcess
from gramophone_server.images.decoder_process import REPLY
from gramophone_server.images.decoders import QUICK_PLACES, SMALL_PIXELS, Decoders, EncodedImage
from gramophone_server.images.decoding import read_header
from gramophone_server.images.shortages import Shortage
from tests.support.bad_pictures import in_jpeg, many_codes, segment
from tests.support.clock import until

LIMITS = Limits()
WITHIN_S = 30.0


def image_file(side, format="PNG", **options):
    out = io.BytesIO()
    Image.new("RGB", (side, side), (250, 100, 3)).save(out, format, **options)
    return out.getvalue()


SMALL, LARGE = image_file(64), image_file(1100)


def children():
    """The ids of the processes that decode for this one."""
    command = ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(os.getpid())]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return {int(line.split()[0]) for line in listed.stdout.splitlines() if "decoder_process" in line}


@pytest.fixture
def pool():
    made = Decoders(LIMITS)
    yield made
    made.close()


def encoded(data, needed=64):
    return EncodedImage(lambda: data, read_header(data, LIMITS), needed)


async def stop_processes(pool):
    """Starts the pool's processes, and lets none of them go on: what they decode then never ends by itself."""
    await asyncio.gather(*[decoded(pool, LARGE) for _ in range(LIMITS.max_decoders)])
    stopped = children()
    assert len(stopped) == LIMITS.max_decoders
    for child in stopped:
        os.kill(child, signal.SIGSTOP)
    return stopped


async def decoded(pool, data, owner="a", needed=64):
    [outcome] = await pool.decode([encoded(data, needed)], owner)
    if isinstance(outcome, UnusableImage):
        raise outcome
    assert outcome.digest == job.digest(outcome.picture)
    return outcome.picture


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
async def test_a_process_decodes_as_a_thread_does(pool, format):
    data = image_file(1100, format)
    for needed in (64, 500, 1100):
        assert torch.equal(await decoded(pool, data, needed=needed), codec.decode(data, LIMITS, needed))
    assert len(children()) == 1


async def test_small_images_need_no_process(pool):
    assert (await decoded(pool, SMALL)).shape == (3, 64, 64)
    assert not children()


async def test_a_small_image_whose_file_needs_much_memory_is_decoded_in_a_process(pool):
    """350 MiB of tables for one megapixel."""
    data = many_codes()
    assert read_header(data, LIMITS).pixels <= SMALL_PIXELS
    assert (await decoded(pool, data)).shape == (3, 64, 64)
    assert len(children()) == 1


async def test_an_image_that_cannot_be_used_is_refused_and_the_process_goes_on(pool):
    damaged = LARGE[: len(LARGE) // 2]
    with pytest.raises(UnusableImage, match="is a PNG image that is truncated or damaged; send the whole file again"):
        await decoded(pool, damaged)
    before = children()
    assert (await decoded(pool, LARGE)).shape[0] == 3 and children() == before


async def test_the_images_of_a_job_come_in_their_order_and_each_with_its_own_fault(pool):
    damaged = SMALL[: len(SMALL) // 2]
    files = [LARGE, SMALL, damaged, many_codes(), image_file(1024), SMALL]
    outcomes = await pool.decode([encoded(file) for file in files], "a")
    assert isinstance(outcomes.pop(2), UnusableImage)
    for outcome, file in zip(outcomes, [file for file in files if file != damaged], strict=True):
        assert torch.equal(outcome.picture, codec.decode(file, LIMITS, 64))


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["threads", "processes"])
async def test_the_time_of_an_image_is_that_of_its_decoding_and_not_of_its_wait(pool, data):
    """All images together take no longer than the decoders have. With their waits they would take eight times that."""
    pool.start()
    await decoded(pool, data)  # the processes have started
    decoders = max(DECODER_THREADS, LIMITS.max_decoders)
    started_at = time.monotonic()
    images = await pool.decode([encoded(data) for _ in range(16 * decoders)], "a")
    took_s = time.monotonic() - started_at
    assert all(image.seconds > 0 for image in images)
    assert sum(image.seconds for image in images) <= decoders * took_s


async def test_small_images_of_one_job_are_read_on_one_thread(pool):
    threads = []

    def read():
        threads.append(threading.get_ident())
        return SMALL

    await pool.decode([EncodedImage(read, read_header(SMALL, LIMITS), 64) for _ in range(5)], "a")
    assert len(threads) == 5 and len(set(threads)) == 1


async def test_a_cancelled_caller_ends_what_runs_and_what_waits(pool):
    working, read = await stop_processes(pool), []

    def reading(number):
        read.append(number)
        return LARGE

    header = read_header(LARGE, LIMITS)
    calls = [
        asyncio.create_task(pool.decode([EncodedImage(lambda number=number: reading(number), header, 64)], "a"))
        for number in range(6)
    ]
    await until(lambda: len(read) == LIMITS.max_decoders)
    assert pool.waiting == 6 - LIMITS.max_decoders
    for call in calls:
        call.cancel()
    await asyncio.wait(calls, timeout=WITHIN_S)  # they do not wait for the decoder
    assert all(call.cancelled() for call in calls) and pool.waiting == 0
    await until(lambda: not working & children())
    assert len(read) == LIMITS.max_decoders  # the others never started
    assert (await decoded(pool, LARGE)).shape == (3, 65, 65)


async def test_a_small_image_does_not_wait_for_large_ones(pool):
    await stop_processes(pool)
    large = [asyncio.create_task(pool.decode([encoded(LARGE)], "a")) for _ in range(5)]
    await until(lambda: pool.busy == LIMITS.max_decoders)
    assert (await decoded(pool, SMALL, "b")).shape == (3, 64, 64)
    assert await pool.quickly(lambda: 1, "b", 0) == await pool.run(lambda: 1, "b", 0) == 1
    assert not any(call.done() for call in large)
    for call in large:
        call.cancel()
    await asyncio.wait(large)


@pytest.mark.parametrize("kind", ["large files", "many codes"])
async def test_images_that_take_long_for_their_pixels_do_not_precede_a_photo(pool, kind):
    """By pixels alone, an owner with small pictures in files of 10 MB would be served before one with a photo, and one
    with pictures of a megapixel that take half a second before one with a photo of 16 that takes 0.2 s."""
    if kind == "large files":
        slow, photo = in_jpeg(*[segment(0xFE, bytes(65_000))] * 30), LARGE
    else:
        slow, photo = many_codes(), image_file(4000, "JPEG")
    order, go = [], threading.Event()

    def image(name, data):
        def read():
            order.append(name)
            assert go.wait(WITHIN_S), "the test never set it"
            return data

        return EncodedImage(read, read_header(data, LIMITS), 64)

    many = [asyncio.create_task(pool.decode([image("slow", slow)], "a")) for _ in range(8)]
    await until(lambda: len(order) == LIMITS.max_decoders)
    one = asyncio.create_task(pool.decode([image("photo", photo)], "b"))
    await until(lambda: pool.waiting == 8 + 1 - LIMITS.max_decoders)
    go.set()
    await asyncio.gather(one, *many)
    assert order.index("photo") <= LIMITS.max_decoders + 1


@pytest.mark.parametrize("kind", ["quickly", "run"])
async def test_an_owner_with_much_to_read_does_not_delay_others(pool, kind):
    run, go, order = getattr(pool, kind), threading.Event(), []

    def work(name):
        assert go.wait(WITHIN_S), "the test never set it"
        order.append(name)

    many = [asyncio.create_task(run(partial(work, "large"), "a", 2**20)) for _ in range(40)]
    await asyncio.sleep(0)  # it is before them
    few = [asyncio.create_task(run(partial(work, "small"), "b", 1000)) for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*many, *few)
    last = max(i for i, name in enumerate(order) if name == "small")
    assert last < QUICK_PLACES + 5 + DECODER_THREADS  # after those that have begun


async def test_closing_ends_all_processes():
    pool = Decoders(LIMITS)
    await stop_processes(pool)
    call = asyncio.create_task(decoded(pool, LARGE))
    await until(lambda: pool.busy == 1)
    pool.close()
    with pytest.raises(Shortage):
        await call
    await until(lambda: not children())


def test_a_process_ends_when_its_server_is_gone():
    program = f"""
        import os
        from gramophone_server.config import DECODER_THREADS, Limits
        from gramophone_server.images.decoder_client import DecoderProcess
        process = DecoderProcess(Limits())
        process.start()
        print(process.id, flush=True)
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    server = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    child = int(server.stdout)
    for _ in range(1000):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        threading.Event().wait(0.01)
    pytest.fail("it still runs")


@pytest.fixture
def process():
    made = DecoderProcess(LIMITS)
    yield made
    made.close()


def test_a_process_that_has_ended_is_started_again(process):
    process.decode(LARGE, 64)
    first = process.id
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert process.decode(LARGE, 64).shape == (3, 65, 65) and process.id != first


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGKILL, Shortage), (signal.SIGSEGV, EngineFailed)], ids=["no memory", "crash"]
)
def test_the_end_of_a_process_at_work_is_not_the_fault_of_the_image(process, number, error, caplog, monkeypatch):
    class EndAtReply(struct.Struct):
        @property
        def size(self):  # asked for when the request is sent; the picture does not fit into a pipe
            os.kill(process.id, number)
            return super().size

    monkeypatch.setattr(decoder_client, "REPLY", EndAtReply(REPLY.format))
    with pytest.raises(error) as caught:
        process.decode(LARGE, 1100)
    monkeypatch.undo()
    if error is Shortage:
        assert str(caught.value) == "memory"  # the system ends a process with SIGKILL if memory runs out
    else:
        assert "has crashed: exit code -11" in caplog.text
    assert process.decode(LARGE, 64).shape == (3, 65, 65)


def test_processes_that_cannot_be_started_are_reported_when_the_server_starts(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")

    async def main():
        decoders = Decoders(LIMITS)
        decoders.start()
        await until(lambda: len(caplog.messages) == LIMITS.max_decoders)
        decoders.close()

    asyncio.run(main())
    expected = "large images cannot be decoded: no process could be started (No such file or directory)"
    assert caplog.messages == [expected] * LIMITS.max_decoders


def test_a_process_that_is_killed_does_not_start_again(process):
    process.start()
    process.kill()
    with pytest.raises(Shortage):
        process.decode(LARGE, 64)
    assert not children()


def test_a_process_that_takes_too_long_is_ended(process, monkeypatch):
    process.start()
    os.kill(process.id, signal.SIGSTOP)
    monkeypatch.setattr("gramophone_server.images.decoder_client.DECODE_S", 0.05)
    with pytest.raises(Shortage, match=r"an image was not decoded within 0\.05 s"):
        process.decode(LARGE, 64)
    assert not children()


def test_a_process_that_is_stopped_while_it_is_sent_a_file_is_ended(process, monkeypatch):
    file = image_file(64) + bytes(3 * 2**20)  # more than a pipe holds
    process.start()
    os.kill(process.id, signal.SIGSTOP)
    monkeypatch.setattr("gramophone_server.images.decoder_client.DECODE_S", 0.05)
    with pytest.raises(Shortage, match=r"an image was not decoded within 0\.05 s"):
        process.decode(file, 64)
    assert not children()
    monkeypatch.undo()
    assert process.decode(file, 64).shape == (3, 64, 64)


def test_without_file_descriptors_it_is_a_shortage(process):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(Shortage, match="too many open files"):
            process.decode(LARGE, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert process.decode(LARGE, 64).shape == (3, 65, 65)


# What a machine with little memory does is tried in a program of its own, whose memory is limited.
WITHOUT_MEMORY = """
    import resource, sys
    from gramophone_server.config import Limits
    from gramophone_server.images.decoding import decode
    from gramophone_server.images.containers import UnusableImage
    from gramophone_server.images.shortages import Shortage
    import mmap
    used = int(open("/proc/self/statm").read().split()[0]) * mmap.PAGESIZE
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    data = sys.stdin.buffer.read()
    for room in range(0, 24, 1):
        resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), hard))
        try:
            # At full size: at an eighth, a JPEG takes less than what the process may have free already.
            outcome = decode(data, Limits(), 700) and "decoded"
        except (UnusableImage, Shortage) as error:
            outcome = f"{type(error).__name__}: {error}"
        except MemoryError:
            outcome = "Shortage: memory"  # of the test's own steps
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        print(outcome)
"""


def outcomes(data):
    """What becomes of an image with 0 to 23 MiB of memory for it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_MEMORY)],
        input=data, env=environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout.decode().splitlines()


def noise(mode, format, **options):
    out = io.BytesIO()
    pixels = Image.frombytes("L", (700, 700), random.Random(1).randbytes(490_000)).convert(mode)
    pixels.save(out, format, **options)
    return out.getvalue()


FILES = {
    "jpeg": lambda: noise("RGB", "JPEG"),
    "progressive jpeg": lambda: noise("RGB", "JPEG", progressive=True),
    "cmyk jpeg": lambda: noise("CMYK", "JPEG"),
    "png": lambda: noise("RGB", "PNG"),
    "palette png": lambda: noise("P", "PNG"),
    "webp": lambda: noise("RGB", "WEBP"),
    "lossless webp": lambda: noise("RGBA", "WEBP", lossless=True, method=0, quality=0),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_image_is_not_blamed_for_memory_that_is_missing(kind):
    """libjpeg and libwebp report a lack of memory as they report damaged data."""
    got = outcomes(FILES[kind]())
    assert set(got) <= {"decoded", "Shortage: memory"}
    assert got[0] == "Shortage: memory" and got[-1] == "decoded"


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_image_is_blamed_if_there_is_memory(kind):
    data = FILES[kind]()
    with pytest.raises(UnusableImage, match="truncated or damaged"):
        codec.decode(data[: len(data) // 2], LIMITS, 64)
