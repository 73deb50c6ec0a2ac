"""Clients that share no code with ours, against a real server: Node.js, and k6. They need `make other-clients`."""

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
from tests.support.processes import Server

ROOT = Path(__file__).parent.parent.parent
NODE_CLIENT = ROOT / "examples" / "node" / "stylize.mjs"
K6_SCRIPT = ROOT / "benchmarks" / "k6" / "stylize_stream.js"
K6 = shutil.which("k6") or shutil.which("k6", path=str(Path(sys.executable).parent))
PHOTO, PAINTING = ROOT / "examples" / "photos" / "cat.jpg", ROOT / "examples" / "styles" / "brushwork.jpg"

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
    code, told, _ = node(
        *(PHOTO, PAINTING, "-o", out, "--size", 64, "--iterations", 8, "--frames", frames, "--target", server.address)
    )
    assert code == 0 and told.startswith(f"{out}: 64 x 43 px") and "STOP_REASON_ITERATIONS_DONE" in told
    with Image.open(out) as picture:
        assert picture.size == (64, 43) and "gramophone" in picture.info
    assert list(frames.glob("*.jpg"))


@needs_node
def test_node_reads_what_is_wrong_with_each_field(server: Server, tmp_path: Path) -> None:
    code, _, said = node(PHOTO, NODE_CLIENT, "-o", tmp_path / "out.png", "--iterations", 0, "--target", server.address)
    assert code == 2 and "(INVALID_ARGUMENT, INVALID_REQUEST)" in said
    assert "  spec.recipe.iterations must be between 1 and 100000, got 0" in said.splitlines()
    assert any(line.startswith("  spec.styles[0].image.data must be a JPEG") for line in said.splitlines())


def wait_for_running_jobs(server: Server, wanted: int) -> None:
    for _ in range(100):
        seen = json.loads(node("--info", "--target", server.address)[1])["runningJobs"]
        if seen == wanted:
            return
        time.sleep(0.1)
    raise AssertionError(f"{seen} jobs run, and not {wanted}")


@needs_node
def test_node_is_told_to_come_back_and_interrupts_its_job(server: Server, tmp_path: Path) -> None:
    job = [PHOTO, PAINTING, "-o", tmp_path / "out.png", "--size", 128, "--iterations", 2000, "--target", server.address]
    long = subprocess.Popen(["node", NODE_CLIENT, *map(str, job)], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_running_jobs(server, 1)  # or the next one takes its place, and it is the one that is refused
        code, _, said = node(*job[:4], "--size", 32, "--iterations", 1, "--target", server.address)
        assert code == 4 and "(RESOURCE_EXHAUSTED, QUEUE_FULL)" in said and "come back in" in said
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
def test_node_says_what_is_wrong_in_one_line(arguments: list[object], code: int, words: str) -> None:
    got, _, said = node(*arguments)
    assert got == code and words in said and len(said.splitlines()) == 1


@needs_k6
def test_k6_counts_jobs_frames_and_refusals(server: Server, tmp_path: Path) -> None:
    settings = {"TARGET": server.address, "VUS": 2, "DURATION": "3s", "SIZE": 32, "ITERATIONS": 20}
    settings["JSON"] = tmp_path / "summary.json"
    flags = [flag for name, value in settings.items() for flag in ("-e", f"{name}={value}")]
    assert K6 is not None
    command = [K6, "run", "--quiet", "--no-usage-report", *flags, str(K6_SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    assert told["jobs_done"]["values"]["count"] >= 1
    assert told["jobs_refused"]["values"]["count"] >= 1  # two callers, and room for one
    assert told["frames"]["values"]["count"] >= 1
    assert told["time_to_accepted"]["values"]["max"] <= told["time_to_result"]["values"]["max"]
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
def test_the_scripts_use_the_protos_names(script: Path) -> None:
    """A name that the proto does not have is ignored by both loaders, so a change of it must not pass unseen."""
    text = script.read_text()
    for message, names in FIELDS[script].items():
        for name in names.split():
            assert re.search(rf"\b{name}\b", text), f"{script.name} uses {name} no more; leave it out here"
            assert name in {field.json_name for field in message.DESCRIPTOR.fields}, (message.DESCRIPTOR.name, name)
