"""A server without file descriptors, and without memory: no image is blamed for it, and it recovers."""

import io
import os
import random
import resource
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import gramophone_client
from tests.support.processes import PAINTING, Process

ARGUMENTS = ("-m", "gramophone_server.main", "--engine", "fake", "--iter-ms", "0", "--port", "0")
RECIPE = {"size": 64, "smallest_size": 0, "iterations": 1}


def noise(side, format, mode="RGB", **options):
    pixels = Image.frombytes("L", (256, 256), random.Random(1).randbytes(2**16)).resize((side, side)).convert(mode)
    out = io.BytesIO()
    pixels.save(out, format, **options)
    return out.getvalue()


SMALL = [
    noise(900, "JPEG"), noise(900, "JPEG", progressive=True), noise(900, "JPEG", "CMYK"), noise(500, "PNG"),
    noise(900, "PNG", "P"), noise(900, "WEBP"), noise(100, "WEBP", "RGBA", lossless=True),
]  # fmt: skip
LARGE = [noise(1500, "JPEG"), noise(1200, "PNG", "P"), noise(1500, "WEBP")]


@pytest.fixture
def server(tmp_path):
    if not Path("/proc/self/fd").exists():
        pytest.skip("sets limits of another process, on Linux")
    with Process(*ARGUMENTS, cwd=tmp_path) as process:
        address = process.line("listening on ")
        process.line("ready in ")
        with gramophone_client.GramophoneClient(address, max_retries=0) as client:
            client.stylize(SMALL[0], PAINTING, **RECIPE)  # connected
            client.stylize(LARGE[0], PAINTING, **RECIPE)  # its decoders have started
            yield process, client


def outcome(client, image, **options):
    """The reason of the error that a job with this image ends in, and whether a retry may help; "OK" without one."""
    try:
        client.stylize(image, PAINTING, **RECIPE | options)
    except gramophone_client.GramophoneError as error:
        return str(error.reason), getattr(error, "retry_after_s", None) is not None
    return "OK"


def limited(process, limit, most):
    soft, hard = resource.prlimit(process.pid, limit)
    resource.prlimit(process.pid, limit, (most, hard))
    return lambda: resource.prlimit(process.pid, limit, (soft, hard))


def decoders(process):
    command = ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(process.pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in listed if "decoder_process" in line]


def test_without_file_descriptors_small_images_are_decoded_and_large_ones_wait(server):
    process, client = server
    for child in decoders(process):
        os.kill(child, signal.SIGKILL)
    lift = limited(process, resource.RLIMIT_NOFILE, 3)
    assert [outcome(client, image) for image in SMALL] == ["OK"] * len(SMALL)
    for format in ("jpeg", "png", "webp"):
        assert outcome(client, SMALL[0], result_format=format) == "OK"
    assert [outcome(client, image) for image in LARGE] == [("SERVER_BUSY", True)] * len(LARGE)
    lift()
    assert [outcome(client, image) for image in LARGE] == ["OK"] * len(LARGE)


@pytest.mark.parametrize("room", [2, 4, 8, 16])
def test_without_memory_no_image_is_blamed(server, room):
    process, client = server
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    lift = limited(process, resource.RLIMIT_AS, pages * resource.getpagesize() + (room << 20))
    got = [outcome(client, image) for image in (*SMALL, *LARGE)]
    assert set(got) <= {"OK", ("OUT_OF_MEMORY", True), ("SERVER_BUSY", True)}
    lift()
    assert [outcome(client, image) for image in (*SMALL, *LARGE)] == ["OK"] * len(got)
