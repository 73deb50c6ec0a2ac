"""The whole system: real processes, the real network, small pictures.

There are no sleeps of a guessed duration: each wait is for a line of output or for the end of a process.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageSequence

from gramophone.recipe import PRESETS, RecipeOverrides
from gramophone_client import Accepted, GramophoneClient, Result
from tests.support.processes import PAINTING, PHOTO, ROOT, WITHIN_S, Process, Server

SMALL = ("--size", "96", "--iterations", "4", "--coarse-iterations", "2", "--smallest-size", "64")
LONG = ("--size", "512", "--iterations", "5000", "--smallest-size", "0", "--timeout", "86400")  # minutes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(cwd=tmp_path_factory.mktemp("server")) as server:
        server.line("ready in ")
        yield server


def stylize(server: Server, out: str, *flags: str, cwd: Path) -> str:
    return server.run_client("stylize", PHOTO, PAINTING, "-o", out, *flags, cwd=cwd)


def recipe_flags(out: str, *, cwd: Path) -> Sequence[str]:
    """The output of `gramophone recipe`, which needs no server."""
    with Process("-m", "gramophone_client.cli", "recipe", out, cwd=cwd) as client:
        assert client.code() == 0, client.output
    return client.output.split()


def info(server: Server, *, cwd: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(server.run_client("info", "--json", cwd=cwd))
    return parsed


# One job --------------------------------------------------------------------------------------------------------------


def test_a_photo_becomes_a_painting_and_can_be_made_again(server: Server, tmp_path: Path) -> None:
    watched = ("--frames", "frames", "--frame-every", "1", "--timelapse", "film.gif")
    lines = stylize(server, "out.png", *SMALL, "--seed", "7", *watched, cwd=tmp_path).splitlines()
    assert re.fullmatch(r"job [\w-]+: 96x64 px, 6 iterations, seed 7", lines[0])  # 2 at 68 px and 4 at 96
    assert re.match(r"96x64 px, 6 iterations in .* s, loss ", lines[-2])
    assert lines[-1] == "out.png"
    with Image.open(tmp_path / "out.png") as out:
        out.load()
        assert (out.format, out.mode, out.size) == ("PNG", "RGB", (96, 64))
        metadata = json.loads(out.info["gramophone"])
    assert (metadata["seed"], metadata["recipe"]["size"], metadata["gramophone"]) == (7, 96, version("gramophone"))
    assert "Oxford" in metadata["weights"]

    frames = sorted((tmp_path / "frames").iterdir())
    assert [frame.name for frame in frames] == [f"frame-{i + 1:04d}.jpg" for i in range(len(frames))]
    assert frames  # at most ten per second; their number depends on the machine
    for frame in frames:
        with Image.open(frame) as picture:
            assert (picture.format, picture.size in ((68, 45), (96, 64))) == ("JPEG", True)
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.format, film.size) == ("GIF", (96, 64))
        assert len(list(ImageSequence.Iterator(film))) == len(frames) + 1  # the result is the last

    stylize(server, "again.png", "--preset", "quality", *recipe_flags("out.png", cwd=tmp_path), cwd=tmp_path)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert not list(tmp_path.glob(".*"))  # no temporary files


def test_the_seed_determines_the_noise(server: Server, tmp_path: Path) -> None:
    # Every format contains its recipe, and the same seed makes the same noise.
    noisy = (*SMALL, "--start", "noise", "--quiet", "--result-quality", "100")
    pictures = {}
    for out, seed in (("seven.png", "7"), ("seven.jpg", "7"), ("eight.webp", "8")):
        assert stylize(server, out, *noisy, "--seed", seed, cwd=tmp_path) == f"{out}\n"
        flags = recipe_flags(out, cwd=tmp_path)
        assert flags[flags.index("--seed") + 1] == seed
        assert flags[flags.index("--start") + 1] == "noise"
        with Image.open(tmp_path / out) as picture:
            pictures[out] = picture.convert("L").resize((12, 8), Image.Resampling.BOX).tobytes()

    def difference(one: str, other: str) -> float:
        return sum(abs(a - b) for a, b in zip(pictures[one], pictures[other], strict=True)) / len(pictures[one])

    assert difference("seven.png", "seven.jpg") < 1 < difference("seven.png", "eight.webp")


def test_info_describes_the_server(server: Server, tmp_path: Path) -> None:
    printed = info(server, cwd=tmp_path)
    assert printed["version"] == version("gramophone")
    assert printed["backbone"] == "vgg19"
    assert "CC BY 4.0" in printed["weights"]  # which the licence requires
    assert printed["layers"][:3] == ["conv1_1", "relu1_1", "conv1_2"]
    assert printed["limits"]["max_size"] == 2048
    assert printed["presets"].keys() == PRESETS.keys()
    assert (printed["running_jobs"], printed["queued_jobs"]) == (0, 0)


def test_the_health_check_of_the_container_image(server: Server, tmp_path: Path) -> None:
    for port, code in ((server.address.rpartition(":")[2], 0), ("1", 1)):
        with Process(ROOT / "deploy" / "health.py", cwd=tmp_path, GRAMOPHONE_PORT=port) as check:
            assert check.code() == code, check.output
    assert check.output == "127.0.0.1:1: UNAVAILABLE\n"


def test_bad_input_is_exit_code_2_and_a_helpful_message(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is not a picture, however it is named")
    cases: dict[tuple[str | Path, ...], str] = {
        ("text.png", PAINTING): "text.png: must be a JPEG, PNG or WebP image, got 42 bytes of something else",
        (PHOTO, PAINTING, "--style-layers", "relu1_1,relu9_1"): "--style-layers[1].layer: 'relu9_1' is not a layer",
        (PHOTO, PAINTING, "--alpha", "0", "--beta", "0"): "--beta: must be above 0 when alpha is 0",
        (PHOTO, PAINTING, "--size", "4096"): "--size: must be at most 2048 pixels (server setting GRAMOPHONE_MAX_SIZE)",
    }
    with ExitStack() as stack:  # at the same time, to save time
        clients = [
            stack.enter_context(server.client("stylize", *words, "-o", "out.png", cwd=tmp_path)) for words in cases
        ]
        for client, words in zip(clients, cases.values(), strict=True):
            assert client.code() == 2, client.output
            assert client.output.startswith(f"gramophone: {words}")
            assert client.output.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


# Several at once, and ends --------------------------------------------------------------------------------------------


def test_two_clients_at_once_both_finish(server: Server) -> None:
    short = RecipeOverrides(size=96, smallest_size=0, iterations=2)
    long = short | RecipeOverrides(iterations=60)
    with GramophoneClient(server.address) as one, GramophoneClient(server.address) as other:
        first = one.stream(PHOTO, PAINTING, **long, timeout=WITHIN_S)
        assert isinstance(next(first), Accepted)
        second = other.stream(PAINTING, PHOTO, **short, timeout=WITHIN_S)
        accepted = next(second)
        assert isinstance(accepted, Accepted)
        assert accepted.queue_position == 0  # runs together with the first job
        results = [list(second)[-1], list(first)[-1]]
    for result, shape in zip(results, ((96, 75), (96, 64)), strict=True):
        assert isinstance(result, Result)
        assert result.picture.image().size == shape


def test_a_client_that_is_killed_gives_its_slot_back(server: Server, tmp_path: Path) -> None:
    with server.client("stylize", PHOTO, PAINTING, "-o", "out.png", *LONG, cwd=tmp_path) as client:
        client.line("job ")
        client.signal(signal.SIGKILL)
        assert client.code() == -signal.SIGKILL
    assert stylize(server, "next.png", *SMALL, "--quiet", cwd=tmp_path) == "next.png\n"
    printed = info(server, cwd=tmp_path)
    assert (printed["running_jobs"], printed["queued_jobs"]) == (0, 0)
    assert os.listdir(tmp_path) == ["next.png"]


def test_sigterm_lets_the_job_end(tmp_path: Path) -> None:
    flags = ("--size", "96", "--iterations", "80", "--smallest-size", "0", "--wait", str(WITHIN_S))
    with (
        Server("--drain-s", "600", cwd=tmp_path) as server,
        server.client("stylize", PHOTO, PAINTING, "-o", "out.png", *flags, cwd=tmp_path) as client,
    ):
        client.line("job ")
        server.signal(signal.SIGTERM)
        assert client.code() == 0, client.output
        assert server.code() == 0, server.output
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (96, 64)
    assert re.search(r"SIGTERM: draining(.|\n)* StylizeStream job=[\w-]+ code=OK (.|\n)* stopped\n$", server.output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "{port}"), "cannot listen on 127.0.0.1:{port}: Address already in use; choose another address"),
        (("--port", "0", "--weights", "missing.pth"), "no weights file at missing.pth; give a path, or --weights"),
    ],
    ids=["port", "weights"],
)
def test_a_server_that_cannot_start_reports_why_in_one_line(
    server: Server, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    port = server.address.rpartition(":")[2]
    with Process("-m", "gramophone_server.main", *(flag.format(port=port) for flag in flags), cwd=tmp_path) as failed:
        assert failed.code() == 2, failed.output
    *before, last = failed.output.splitlines()
    assert last.startswith(f"gramophone-server: {message.format(port=port)}")
    assert all(line.startswith("listening on ") or " INFO " in line for line in before), failed.output


# Without the compiled ops ---------------------------------------------------------------------------------------------


def test_the_fake_engine_needs_no_compiled_ops(tmp_path: Path) -> None:
    module = "tests.support.without_ops"
    with Server("--engine", "fake", cwd=tmp_path, module=module) as server:
        server.line("ready in ")
        flags = ("--checkpoint", "job.state", "--frames", "frames", "--frame-every", "1")
        stylize(server, "out.png", *SMALL, *flags, cwd=tmp_path)
        with Image.open(tmp_path / "out.png") as out:
            assert out.size == (96, 64)
    # The network does need them, so the module does keep them away.
    with Process("-m", module, "--port", "0", cwd=tmp_path) as real:
        assert real.code() == 1
    assert "gramophone_server._C" in real.output


# Traces ---------------------------------------------------------------------------------------------------------------


def test_the_access_log_has_the_trace_of_the_caller(tmp_path: Path) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    small = RecipeOverrides(size=64, smallest_size=0, iterations=1)
    log = tmp_path / "access.log"
    with Server("--access-log", str(log), cwd=tmp_path) as server:
        server.line("ready in ")
        with GramophoneClient(server.address, metadata={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}) as client:
            client.server_info()
            client.upload(PAINTING)
            client.stylize(PHOTO, PAINTING, **small)
            with client.control(PHOTO, PAINTING, **small) as job:
                job.result()
        server.signal(signal.SIGTERM)
        assert server.code() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 4
    assert {line["trace"] for line in lines} == {trace}
