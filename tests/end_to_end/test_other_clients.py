"""Clients that share no code with the Python client, against a real server: Node.js, Go, Java, C++ and k6.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from PIL import Image

from gramophone.options import MESSAGE_BYTES
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc
from tests.support.processes import PHOTO, ROOT, WITHIN_S, Server

NODE_CLIENT = ROOT / "examples" / "node" / "stylize.mjs"
K6_SCRIPT = ROOT / "benchmarks" / "k6" / "stylize_stream.js"
K6 = shutil.which("k6") or shutil.which("k6", path=str(Path(sys.executable).parent))
PAINTING = ROOT / "examples" / "styles" / "brushwork.jpg"
COMPILED = {language: ROOT / "build" / "clients" / language / "stylize" for language in ("go", "java", "cpp")}
KEEPALIVE_S = 10  # the shortest interval that gRPC for Go and Java allow, and the shortest that the server promises
# Without permission, gRPC's server ends a call at its fourth ping.
SILENT_S = 4.5 * KEEPALIVE_S

HAVE_NODE = bool(shutil.which("node")) and (NODE_CLIENT.parent / "node_modules").exists()
needs_node = pytest.mark.skipif(not HAVE_NODE, reason="Node.js or its packages are not installed: make other-clients")
each_compiled = pytest.mark.parametrize(
    "client",
    [
        pytest.param(
            path,
            id=language,
            marks=pytest.mark.skipif(not path.exists(), reason=f"no client in {language} is built: make other-clients"),
        )
        for language, path in COMPILED.items()
    ],
)
needs_k6 = pytest.mark.skipif(K6 is None, reason="k6 is not installed: make other-clients")


class SilentCalls(NamedTuple):
    """Clients that ping during a call without messages: their jobs wait for another one to end."""

    stub: Any
    job_before: str
    clients: Mapping[str, subprocess.Popen[bytes]]
    folder: Path
    began: float

    def output(self, language: str) -> str:
        """What a client has printed."""
        return (self.folder / f"{language}.txt").read_text()


@pytest.fixture(scope="module", autouse=True)
def silent_calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SilentCalls]:
    """Started before all tests of this module, so that the others run during the silence."""
    folder = tmp_path_factory.mktemp("silent")
    with (
        # Without room for states the first job keeps its place, so that the others are silent.
        Server(
            *("--engine", "fake", "--iter-ms", "50", "--max-running", "1", "--max-parked-bytes", "0"), cwd=folder
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        server.line("ready in ")
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        job = pb.JobSpec(recipe=pb.Recipe(size=32, iterations=5000))
        job.content.data = PHOTO.read_bytes()
        job.styles.add().image.data = PAINTING.read_bytes()
        job.detach_grace.FromSeconds(300)
        stream = stub.StylizeStream(pb.StylizeStreamRequest(spec=job))
        job_before = next(stream).event.accepted.job_id
        stream.cancel()
        arguments = [server.address, PHOTO, PAINTING, "32"]
        commands = {
            language: [path, *arguments, folder / f"{language}.png", str(KEEPALIVE_S)]
            for language, path in COMPILED.items()
            if path.exists()
        }
        if HAVE_NODE:
            node_arguments = ["--keepalive", str(KEEPALIVE_S), "--size", "32", "--target", server.address]
            commands["node"] = ["node", NODE_CLIENT, PHOTO, PAINTING, "-o", folder / "node.png", *node_arguments]
        clients = {}
        for language, command in commands.items():
            with (folder / f"{language}.txt").open("w") as printed:
                clients[language] = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            until(lambda: stub.GetServerInfo(pb.GetServerInfoRequest()).queued_jobs == len(clients))
            yield SilentCalls(stub, job_before, clients, folder, time.monotonic())
        finally:
            for client in clients.values():
                client.kill()
                client.wait()


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


def large(image: Path, folder: Path) -> Path:
    """The same picture in a file that is too large for a request: bytes behind its end are ignored."""
    path = folder / image.name
    path.write_bytes(image.read_bytes() + bytes(6 * 2**20))
    return path


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--engine", "fake", "--iter-ms", "1", "--max-message-bytes", str(int(MESSAGE_BYTES.low)))
    with Server(*flags, cwd=tmp_path_factory.mktemp("small")) as server:
        server.line("ready in ")
        yield server


@needs_node
def test_node_uploads_large_images(small_server: Server, tmp_path: Path) -> None:
    images = [large(PHOTO, tmp_path), large(PAINTING, tmp_path)]
    out, target = tmp_path / "out.png", small_server.address
    code, printed, errors = node(*images, "-o", out, "--size", 64, "--target", target)
    assert code == 0 and printed.startswith(f"{out}: 64 x 43 px"), errors
    too_large = tmp_path / "large.jpg"
    too_large.write_bytes(PHOTO.read_bytes() + bytes(11 * 2**20))
    code, _, errors = node(too_large, PAINTING, "-o", out, "--target", target)
    assert code == 2 and "chunk: makes an image of " in errors and "(INVALID_ARGUMENT, INVALID_REQUEST)" in errors


@needs_node
def test_node_prints_the_error_of_each_field(server: Server, tmp_path: Path) -> None:
    code, _, errors = node(
        PHOTO, NODE_CLIENT, "-o", tmp_path / "out.png", "--iterations", 0, "--target", server.address
    )
    assert code == 2 and "(INVALID_ARGUMENT, INVALID_REQUEST)" in errors
    assert "  spec.recipe.iterations must be between 1 and 100000, got 0" in errors.splitlines()
    assert any(line.startswith("  spec.styles[0].image.data must be a JPEG") for line in errors.splitlines())


def wait_for_running_jobs(server: Server, expected: int) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        until(lambda: stub.GetServerInfo(pb.GetServerInfoRequest()).running_jobs == expected)


def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds, for at most `WITHIN_S`."""
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end, f"the condition did not become true within {WITHIN_S:g} s"
        time.sleep(0.05)


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


@needs_node
def test_node_explains_its_options() -> None:
    code, printed, errors = node("--help")
    assert (code, errors) == (0, "")
    source = NODE_CLIENT.read_text()
    for option in re.findall(r"^ {6}(\w+): \{ type: 'string'", source, re.MULTILINE):
        assert f"--{option} " in printed or f"-{option[0]} " in printed, option


def run(client: Path, *arguments: object) -> tuple[int, str, str]:
    command = [client, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@each_compiled
def test_a_compiled_client_paints_a_picture(client: Path, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    code, printed, errors = run(client, server.address, PHOTO, PAINTING, 64, out)
    assert code == 0, errors
    *progress, last = printed.splitlines()
    assert last == f"{out}: 64 x 43 px"
    assert progress and all(re.fullmatch(r"iteration \d+ of \d+", line) for line in progress)
    with Image.open(out) as picture:
        assert picture.size == (64, 43) and "gramophone" in picture.info


@each_compiled
def test_a_compiled_client_uploads_large_images(client: Path, small_server: Server, tmp_path: Path) -> None:
    images = [large(PHOTO, tmp_path), large(PAINTING, tmp_path)]
    out = tmp_path / "out.png"
    code, printed, errors = run(client, small_server.address, *images, 64, out)
    assert code == 0, errors
    assert printed.splitlines()[-1] == f"{out}: 64 x 43 px"
    too_large = tmp_path / "large.jpg"
    too_large.write_bytes(PHOTO.read_bytes() + bytes(11 * 2**20))
    code, _, errors = run(client, small_server.address, too_large, PAINTING, 64, out)
    assert code == 1 and errors.startswith("stylize: chunk: makes an image of ") and "INVALID_REQUEST)" in errors


@each_compiled
def test_a_compiled_client_prints_the_code_and_the_reason_of_an_error(
    client: Path, server: Server, tmp_path: Path
) -> None:
    code, _, errors = run(client, server.address, PHOTO, PAINTING, 1, tmp_path / "out.png")
    (line,) = errors.splitlines()
    assert code == 1 and line.startswith("stylize: spec.recipe.size") and "got 1" in line
    assert re.search(r"\((code 3|InvalidArgument|INVALID_ARGUMENT), INVALID_REQUEST\)$", line)


@each_compiled
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage: "),
        (["127.0.0.1:1", PHOTO, PAINTING, 64, "out.png"], 1, "onnection refused"),
        (["127.0.0.1:1", "none.jpg", PAINTING, 64, "out.png"], 1, "none.jpg"),
        (["127.0.0.1:1", PHOTO, PAINTING, "large", "out.png"], 1, "large"),
    ],
)
def test_a_compiled_client_prints_errors_in_one_line(
    client: Path, arguments: list[object], code: int, words: str
) -> None:
    got, _, errors = run(client, *arguments)
    assert got == code and words in errors and len(errors.splitlines()) == 1


@each_compiled
def test_ctrl_c_cancels_the_job_of_a_compiled_client(client: Path, server: Server, tmp_path: Path) -> None:
    wait_for_running_jobs(server, 0)
    out = tmp_path / "out.png"
    command = [client, server.address, PHOTO, PAINTING, "512", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().startswith("iteration ")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert "cancel" in process.stderr.read().lower()
        finally:
            process.kill()
    wait_for_running_jobs(server, 0)
    assert not out.exists()


def test_without_apt_and_compilers_the_missing_packages_are_listed(tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    for name in ("id", "ls"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    command = [make, "-C", ROOT / "examples", "packages", "clients", f"OUT={tmp_path}"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    listed = done.stderr
    assert "not installed; the clients in Go, Java and C++ need these packages of Debian: protobuf-compiler" in listed
    for language, package in {"go": "golang-go", "java": "libgrpc-java", "cpp": r"libgrpc\+\+-dev"}.items():
        assert re.search(rf"^no client in {language}: packages are missing \(.*{package}", listed, re.MULTILINE)


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
    assert metrics["jobs_refused"]["values"]["count"] >= 1  # two clients, but only one place
    assert metrics["frames"]["values"]["count"] >= 1
    assert metrics["time_to_accepted"]["values"]["max"] <= metrics["time_to_result"]["values"]["max"]
    assert "jobs done in" in done.stdout and "to the first frame" in done.stdout


@needs_k6
def test_k6_refuses_images_that_are_too_large_for_a_request(server: Server, tmp_path: Path) -> None:
    settings = {"TARGET": server.address, "PHOTO": large(PHOTO, tmp_path), "DURATION": "1s"}
    flags = [flag for name, value in settings.items() for flag in ("-e", f"{name}={value}")]
    assert K6 is not None
    command = [K6, "run", "--quiet", "--no-usage-report", *flags, str(K6_SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "must have at most 4 MiB together, got" in done.stdout + done.stderr


FIELDS = {
    NODE_CLIENT: {
        pb.JobSpec: "content styles recipe frames",
        pb.UploadImageRequest: "chunk",
        pb.UploadImageResponse: "digest",
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


def test_clients_may_ping_during_silence(silent_calls: SilentCalls) -> None:
    if not silent_calls.clients:
        pytest.skip("no other client is installed: make other-clients")
    time.sleep(max(0.0, silent_calls.began + SILENT_S - time.monotonic()))
    ended = [language for language, client in silent_calls.clients.items() if client.poll() is not None]
    assert not ended, silent_calls.output(ended[0])
    silent_calls.stub.CancelJob(pb.CancelJobRequest(job_id=silent_calls.job_before))
    for language, client in silent_calls.clients.items():
        assert client.wait(20) == 0, silent_calls.output(language)
        assert f"{language}.png: 32 x " in silent_calls.output(language)
