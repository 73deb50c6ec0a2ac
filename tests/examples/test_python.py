"""examples/python: each program, as its users start it, against a server with the fake engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from gramophone_client import AsyncGramophoneClient
from tests.support.pictures import png
from tests.support.processes import PAINTING, PHOTO, ROOT, WITHIN_S, Process, Server

EXAMPLES = ROOT / "examples" / "python"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        *("--engine", "fake", "--iter-ms", "20", "--list-jobs", "--max-running", "2", "--max-queued", "1"),
        cwd=tmp_path_factory.mktemp("server"),
    ) as started:
        yield started


def run(name: str, *words: str | Path, cwd: Path) -> tuple[int, list[str]]:
    """The exit code of an example, and the lines that it prints."""
    with Process(EXAMPLES / name, *words, cwd=cwd) as example:
        return example.code(), example.output.splitlines()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_each_explains_its_command_line(name: str, tmp_path: Path) -> None:
    code, lines = run(name, "--help", cwd=tmp_path)
    assert (code, lines[0].startswith(f"usage: {name} ")) == (0, True)


@pytest.mark.parametrize("name", ["sync.py", "async.py", "control.py"])
def test_a_problem_is_one_line(name: str, server: Server, tmp_path: Path) -> None:
    code, lines = run(name, "missing.jpg", PAINTING, "--server", server.address, cwd=tmp_path)
    assert (code, len(lines)) == (1, 1) and lines[0].startswith(f"{name}: ") and "missing.jpg" in lines[0]


def test_sync_paints_with_progress_and_a_preview(server: Server, tmp_path: Path) -> None:
    code, lines = run(
        "sync.py", PHOTO, PAINTING, "-o", "out.png", "--size", "96", "--server", server.address, cwd=tmp_path
    )
    assert code == 0, lines
    assert lines[0].startswith("job ") and lines[0].endswith(": 96x64, 30 iterations")
    assert any(line.startswith("iteration ") for line in lines)
    assert lines[-1].startswith("out.png: 30 iterations in ")
    assert size_of(tmp_path / "out.png") == size_of(tmp_path / "out-preview.jpg") == (96, 64)


def test_async_paints_several_styles_of_one_upload(server: Server, tmp_path: Path) -> None:
    styles = [ROOT / "examples" / "styles" / f"{name}.jpg" for name in ("woodcut", "brushwork")]
    code, lines = run("async.py", PHOTO, *styles, "-o", "all", "--size", "96", "--server", server.address, cwd=tmp_path)
    assert code == 0, lines
    assert sorted(os.listdir(tmp_path / "all")) == ["cat-brushwork.png", "cat-woodcut.png"]
    assert size_of(tmp_path / "all" / "cat-woodcut.png") == (96, 64)
    assert {"woodcut.jpg: all/cat-woodcut.png", "brushwork.jpg: all/cat-brushwork.png"} <= set(lines)


def test_control_strengthens_the_style_and_ends_early(server: Server, tmp_path: Path) -> None:
    words = (PHOTO, PAINTING, "-o", "out.png", "--size", "96", "--iterations", "200", "--server", server.address)
    code, lines = run("control.py", *words, cwd=tmp_path)
    assert code == 0, lines
    assert lines[0].startswith("twice the style from iteration ")
    assert lines[-1].startswith("out.png: ")
    assert size_of(tmp_path / "out-halfway.png") == size_of(tmp_path / "out.png") == (96, 64)


def test_batch_continues_where_it_stopped_and_one_failure_does_not_end_it(server: Server, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(6):  # more than the server runs and queues at once
        (photos / f"{i}.png").write_bytes(png(40 + i, 30))
    (photos / "3.png").write_bytes(b"not a picture")
    (photos / "notes.txt").write_text("not a photo")
    (tmp_path / "painted").mkdir()
    (tmp_path / "painted" / "0.png").write_bytes(b"from an earlier run")
    words = ("photos", PAINTING, "-o", "painted", "--size", "64", "--parallel", "5", "--server", server.address)

    code, lines = run("batch.py", *words, cwd=tmp_path)
    assert code == 1
    assert lines[0] == "5 of 6 photos to paint"
    (failure,) = (line for line in lines if line.startswith("photos/3.png: "))
    assert "content" in failure
    assert lines[-1] == "batch.py: 1 failed; run it again to continue"
    assert sorted(os.listdir(tmp_path / "painted")) == ["0.png", "1.png", "2.png", "4.png", "5.png"]
    assert (tmp_path / "painted" / "0.png").read_bytes() == b"from an earlier run"

    (photos / "3.png").write_bytes(png(43, 30))
    code, lines = run("batch.py", *words, cwd=tmp_path)
    assert (code, lines) == (0, ["1 of 6 photos to paint", "painted/3.png"])
    assert size_of(tmp_path / "painted" / "3.png") == (64, 45)


def test_batch_ends_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    code, lines = run("batch.py", ".", "0.png", "-o", "painted", "--server", "127.0.0.1:1", cwd=tmp_path)
    assert code == 1
    assert lines[-1].startswith("batch.py: no connection to a gramophone server at 127.0.0.1:1")


def test_batch_names_what_is_missing_before_it_makes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png())
    for words, missing in (
        (("photos", "0.png"), "photos: there is no such folder"),
        ((".", "monet.jpg"), "monet.jpg: there is no such file"),
    ):
        code, lines = run("batch.py", *words, "-o", "painted", cwd=tmp_path)
        assert code == 2
        assert lines[-1] == f"batch.py: error: {missing}"
    assert not (tmp_path / "painted").exists()


# The HTTP service -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def service_of(server: Server, folder: Path) -> Iterator[httpx.Client]:
    """A client of the HTTP service."""
    with Process(EXAMPLES / "fastapi_service.py", "--port", "0", "--server", server.address, cwd=folder) as process:
        address = process.line("INFO:     Uvicorn running on ").split()[0]
        with httpx.Client(base_url=address, timeout=WITHIN_S) as client:
            yield client


@pytest.fixture(scope="module")
def service(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with service_of(server, tmp_path_factory.mktemp("service")) as client:
        yield client


def images() -> dict[str, bytes]:
    return {"photo": png(64, 48), "painting": png(32, 32)}


def test_the_service_answers_with_a_picture(service: httpx.Client, tmp_path: Path) -> None:
    answer = service.post("/stylize", files=images(), data={"size": "96"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png"), answer.text
    (tmp_path / "out.png").write_bytes(answer.content)
    assert size_of(tmp_path / "out.png") == (96, 72)


@pytest.mark.parametrize("path", ["/stylize", "/stylize/events"])
def test_the_service_answers_an_invalid_request_with_its_fields(service: httpx.Client, path: str) -> None:
    answer = service.post(path, files=images() | {"photo": b"not a picture"}, data={"size": "9999"})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["reason"] == "INVALID_REQUEST" and problem["error"]
    assert {"spec.recipe.size"} <= {field["field"] for field in problem["fields"]}
    assert service.post(path, files={"photo": b""}).status_code == 422  # FastAPI's own answer


def events_of(response: httpx.Response) -> Iterator[tuple[str, dict[str, object]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_the_service_streams_events_up_to_the_picture(service: httpx.Client, tmp_path: Path) -> None:
    with service.stream("POST", "/stylize/events", files=images(), data={"size": "96"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    names = [name for name, _ in events]
    assert names[0] == "accepted" and names[-1] == "result" and {"progress", "frame"} <= set(names)
    (tmp_path / "out.png").write_bytes(base64.b64decode(str(events[-1][1]["png"])))
    assert size_of(tmp_path / "out.png") == (96, 72)


async def test_a_job_stops_when_the_http_client_leaves(tmp_path: Path) -> None:
    with (
        Server("--engine", "fake", "--iter-ms", "400", "--list-jobs", cwd=tmp_path) as server,
        service_of(server, tmp_path) as service,
    ):
        server.line("ready in ")
        async with AsyncGramophoneClient(server.address) as client:
            for path in ("/stylize", "/stylize/events"):
                await check_that_it_stops(client, service, path)


async def check_that_it_stops(client: AsyncGramophoneClient, service: httpx.Client, path: str) -> None:
    earlier = {job.job_id for job in await client.list_jobs()}

    async def until_the_new_job_is(state: str) -> None:
        async with asyncio.timeout(WITHIN_S):
            while (states := {str(job.state) for job in await client.list_jobs() if job.job_id not in earlier}) != {
                state
            }:
                assert "SUCCEEDED" not in states
                await asyncio.sleep(0.02)

    async with httpx.AsyncClient(base_url=service.base_url) as browser:
        # A minute of work if it is not stopped: 150 iterations.
        request = asyncio.create_task(browser.post(path, files=images(), data={"size": "1024"}, timeout=WITHIN_S))
        await until_the_new_job_is("RUNNING")
        request.cancel()
        await until_the_new_job_is("CANCELLED")


def test_the_service_is_unavailable_without_a_server(tmp_path: Path) -> None:
    with Process(EXAMPLES / "fastapi_service.py", "--port", "0", "--server", "127.0.0.1:1", cwd=tmp_path) as process:
        address = process.line("INFO:     Uvicorn running on ").split()[0]
        answer = httpx.post(f"{address}/stylize", files=images(), timeout=WITHIN_S)
    assert answer.status_code == 503
    assert answer.json()["error"].startswith("no connection to a gramophone server at 127.0.0.1:1")
