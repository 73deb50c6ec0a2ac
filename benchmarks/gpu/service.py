"""Jobs through the server in the GPU check: the preset `fast` with frames, the cost of the service, and 16 at once."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.goals import WHOLE_JOBS
from benchmarks.gpu.runner import ROOT, environment, last_line
from benchmarks.gpu.section import Section
from benchmarks.measure import interleaved
from gramophone.recipe import preset
from gramophone_server.domain.job import StyleJob
from gramophone_server.engine.engine import VggEngine
from gramophone_server.network.precision import choose_precision

if TYPE_CHECKING:
    from gramophone_client import GramophoneClient

__all__ = ["service"]

PACKAGES = ("grpc", "grpc_health", "google.protobuf", "prometheus_client", "PIL")  # of server and client
PHOTO, PAINTING = ROOT / "examples" / "photos" / "cat.jpg", ROOT / "examples" / "styles" / "brushwork.jpg"
QUALITY = 95  # of the square photo that is sent
STOP_S = 5.0  # for the server to stop
LONG = 200  # iterations of each of the 16 jobs, at one scale


def service(section: Section) -> None:
    """Starts a server on the device and sends it jobs over loopback."""
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        section.left_out("jobs through the server", f"the packages {', '.join(missing)} are not installed")
        return
    from gramophone_client import GramophoneClient

    log = section.folder / "server.log"
    command = [sys.executable, "-m", "gramophone_server.main", "--port", "0", "--device", section.device]
    with log.open("w") as err:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err,
            text=True, process_group=0,
        )  # fmt: skip
    try:
        engine = _engine(section)  # while the server loads its own
        assert server.stdout is not None
        listening = server.stdout.readline().split()
        if not listening:
            raise RuntimeError(f"the server did not start: {last_line(log)}")
        address = listening[-1]
        with GramophoneClient(address, timeout=max(10.0, section.seconds_left)) as client:
            ready = functools.partial(_wait_until_ready, section, client, server, log)
            if section.attempt("the server starts", ready):
                _jobs(section, client, engine, address)
    finally:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(section: Section, client: GramophoneClient, server: subprocess.Popen[str], log: Path) -> None:
    """Waits until the server has loaded its engine. A server that ends meanwhile must not cost the time of the jobs."""
    from gramophone_client import NotReadyError

    while True:
        try:
            return client.wait_until_ready(1.0)
        except NotReadyError as problem:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}: {last_line(log)}") from None
            if section.seconds_left < 0:
                raise problem from None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


def _engine(section: Section) -> VggEngine:
    """The server's engine, in this process."""
    if section.dry:
        return VggEngine.load(device="cpu", precision="auto", weights="embedded", backbone="vgg19", threads=0)
    device = torch.device(section.device)
    return VggEngine(section.network(), device, choose_precision("auto", device))


def _jobs(section: Section, client: GramophoneClient, engine: VggEngine, address: str) -> None:
    fallen = client.server_info().library_ops
    if fallen:
        section.failed("kernels of the server", f"these ops run through torch's library: {dict(fallen)}")
    content, style = _square(PHOTO), _square(PAINTING)
    for turn in ("cold", "second", "warm"):
        section.attempt(f"{turn} job at 512 px", functools.partial(_watched, section, client, content, style, turn), 3)
    section.attempt("16 jobs at 256 px", functools.partial(_crowd, section, address, content, style), 12)
    for name, least_s in zip(WHOLE_JOBS, (4, 15), strict=True):
        call = functools.partial(_against_engine, section, client, engine, content, style, name)
        section.attempt(f"{name}, server and engine", call, least_s)


def _square(path: Path) -> bytes:
    """A square part of the picture as JPEG, because the pictures of the other sections are square."""
    from gramophone_server.config import Settings
    from gramophone_server.images.codec import Format, decode, encode

    picture = decode(path.read_bytes(), Settings(), 1024)
    side = min(picture.shape[1:])
    return encode(picture[:, :side, :side].permute(1, 2, 0).contiguous(), Format.JPEG, QUALITY).data


def _options(section: Section, size: int) -> dict[str, Any]:
    """The recipe's fields that differ from the preset: the size, and fewer iterations in a dry run."""
    shorter = {"iterations": 3, "coarse_iterations": 2} if section.dry else {}
    side = section.px(size)
    return {"size": side, "smallest_size": min(side, section.px(128)), **shorter}


def _watched(section: Section, client: GramophoneClient, content: bytes, style: bytes, turn: str) -> None:
    """A job with up to ten frames a second, from the request to the last byte of its result."""
    from gramophone_client import Frame, FrameOptions, Result

    start = time.perf_counter()
    first_frame_ms = ms = None
    frames = 0
    options = _options(section, 512)
    for update in client.stream(content, style, preset="fast", frames=FrameOptions(min_interval_s=0.1), **options):
        now_ms = (time.perf_counter() - start) * 1e3
        if isinstance(update, Frame):
            frames += 1
            first_frame_ms = first_frame_ms or now_ms
        elif isinstance(update, Result):
            ms = now_ms
    section.row(name=turn, size=512, batch=1, frames=frames, ms=ms, first_frame_ms=first_frame_ms)


def _crowd(section: Section, address: str, content: bytes, style: bytes) -> None:
    """16 equal jobs at the same time against one after another."""
    from benchmarks.crowd import sizes_measured

    count, iterations, repeats = (2, 4, 1) if section.dry else (16, LONG, 3)
    side = section.px(256)
    (row,) = asyncio.run(sizes_measured(address, [side], count, iterations, repeats, content, style))
    for name, seconds in (("together", row["together_s"]), ("in turn", row["alone_s"])):
        section.row(
            name=f"16 jobs {name}",
            size=256,
            iterations=iterations,
            ms=seconds * 1e3,
            ms_per_job=seconds * 1e3 / count,
            throughput_vs_in_turn=row["alone_s"] / seconds,
        )


def _against_engine(
    section: Section, client: GramophoneClient, engine: VggEngine, content: bytes, style: bytes, name: str
) -> None:
    """The same job through the server and by the engine in this process, without decoding and encoding."""
    from gramophone_server.config import Settings
    from gramophone_server.images.codec import decode

    size = int(name.split()[1])
    recipe_name = name.split(",")[0]
    options = _options(section, size)
    recipe = preset(recipe_name, **options)
    picture, painting = (decode(data, Settings(), options["size"]) for data in (content, style))
    one = StyleJob(recipe=recipe, content=picture, styles=(painting,), style_weights=(1.0,), start=None, seed=0)

    def in_process() -> None:
        run = engine.run_batch([one])
        while not run.finished:
            run.advance(20)
        run.picture(0)
        run.close()

    def through_the_server() -> None:
        client.stylize(content, style, preset=recipe_name, **options)

    ways: dict[str, Callable[[], object]] = {"server": through_the_server, "engine": in_process}
    times = interleaved(ways, 1 if section.dry else 5)
    section.row(
        name=name,
        size=size,
        batch=1,
        ms=times["server"],
        engine_ms=times["engine"],
        ratio_vs_engine=times["server"] / times["engine"],
    )
