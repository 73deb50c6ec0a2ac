"""The capacity of the server apart from the network: jobs, frames, streams and health checks, with `--engine fake`.

    python -m benchmarks.transport --seconds 8 --json FILE

Server and clients share this machine's cores, so the columns of CPU seconds show the time of each side. Frames are
JPEGs of about 64 KB: `watched` are those of 20 jobs for 15 watchers each, encoded once for all of them, and `own` those
of 100 jobs, each encoded for one watcher. `streams` are open at the same time, with progress and without frames, and
each ends with its result; their number is the largest that the server has reported at one time, running and waiting. A
process of its own sends a health check every 20 ms during all measurements.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from PIL import Image

from benchmarks.measure import Row, machine, print_table, write_json
from gramophone.v1 import style_transfer_pb2 as pb
from gramophone.v1 import style_transfer_pb2_grpc as pb_grpc

CLIENTS = 2  # processes
ITERATION_MS = 5
FRAME_SIDE = 470  # pixels; a pattern of this size is a JPEG of 64 KB
STREAMS = 500
# Watchers of each job. About 2,500 frames a second are due: slices of 20 ms allow 8.3 a second for each watcher, not
# 10.
JOBS, WATCHERS = 20, 15
GOALS = {"jobs": 300.0, "frames, watched": 2000.0, "streams": float(STREAMS)}  # per second; streams: at the same time
HEALTH_GOAL_MS = 50.0  # p99
OPTIONS = [("grpc.max_receive_message_length", 2**26), ("grpc.use_local_subchannel_pool", 1)]
FLAGS = (
    *("--engine", "fake", "--iter-ms", str(ITERATION_MS)),
    *("--max-running", "256", "--max-queued", "1024", "--max-watchers", "1024", "--max-iterations", "100000"),
)


def main() -> None:
    """Runs every measurement against a server of its own, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of each measurement")
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    rows = [
        measured("jobs", unary_jobs, arguments.seconds),
        measured("frames, watched", watched_frames, arguments.seconds),
        measured("frames, own", own_frames, arguments.seconds),
        measured("streams", open_streams, arguments.seconds),
    ]
    print_table(f"transport and scheduler, engine: fake, {ITERATION_MS} ms\n{machine()}", rows)
    write_json(arguments.json, rows)


def measured(name: str, client: Callable[[str, float, int], Coroutine[Any, Any, Any]], seconds: float) -> Row:
    """The row of one measurement: the sum over all client processes, CPU seconds and health checks."""
    with serving() as (address, pid), health_checks(address) as latencies:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(CLIENTS, context) as pool:
            list(pool.map(warm, [address] * CLIENTS))
            before = cpu_s(pid)
            parts = list(
                pool.map(in_process, *zip(*[(client, address, seconds, i) for i in range(CLIENTS)], strict=True))
            )
        server_s = cpu_s(pid) - before
    done = (at_once if name == "streams" else sum)([amount for amount, _ in parts])
    health = sorted(latencies)
    p99 = health[int(0.99 * len(health))] * 1000
    each = 1.0 if name == "streams" else seconds
    goal = GOALS.get(name)
    return {
        "name": name, "amount": done / each, "unit": "at once" if name == "streams" else "per s",
        "goal": goal if goal is not None else "-", "met": "-" if goal is None else done / each >= goal,
        "server cpu s": server_s, "clients cpu s": sum(cpu for _, cpu in parts),
        "health p50 ms": statistics.median(health) * 1000, "health p99 ms": p99, "p99 met": p99 < HEALTH_GOAL_MS,
    }  # fmt: skip


def at_once(parts: Sequence[tuple[int, int]]) -> float:
    """The number of streams that were open at the same time and had a result.

    ``parts``: by client, its results and the largest number of jobs that it has seen at the server.
    """
    return float(min(sum(results for results, _ in parts), max(most for _, most in parts)))


@contextlib.contextmanager
def serving(flags: Sequence[str] = FLAGS) -> Iterator[tuple[str, int]]:
    """A server process with these flags; yields its address and process id."""
    command = [sys.executable, "-m", "gramophone_server.main", "--port", "0", "--log-level", "warning", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            server.stdout.readline()  # ready
            yield address, server.pid
        finally:
            server.terminate()
            server.wait(60)


@contextlib.contextmanager
def health_checks(address: str) -> Iterator[list[float]]:
    """Sends health checks during the block; yields the list of their seconds, which is filled at the end."""
    context = multiprocessing.get_context("spawn")
    stop, latencies = context.Event(), list[float]()
    with ProcessPoolExecutor(1, context, initializer=_share, initargs=(stop,)) as pool:
        checks = pool.submit(check_health, address)
        try:
            yield latencies
        finally:
            stop.set()
            latencies.extend(checks.result())


_stop: Event


def _share(stop: Event) -> None:
    global _stop
    _stop = stop


def check_health(address: str) -> list[float]:
    """Sends a health check every 20 ms until `_stop` is set, and returns the seconds of each."""
    took = []
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        while not _stop.wait(0.02):
            before = time.perf_counter()
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            took.append(time.perf_counter() - before)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, "the server is serving"
    return took


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and its threads since its start."""
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# In the clients' processes --------------------------------------------------------------------------------------------


def warm(address: str) -> None:
    """Imports this module in a client process, and connects once."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(10)


def in_process(
    client: Callable[[str, float, int], Coroutine[Any, Any, Any]], address: str, seconds: float, number: int
) -> tuple[Any, float]:
    """Runs one client in its process. Returns its result and its CPU seconds."""
    before = time.process_time()
    return asyncio.run(client(address, seconds, number)), time.process_time() - before


def spec(size: int, iterations: int, *, frames: bool = False) -> pb.JobSpec:
    """A job with two small images."""
    out = io.BytesIO()
    Image.new("RGB", (size, size * 3 // 4), "red").save(out, "PNG")
    image = pb.ImageSource(data=out.getvalue())
    recipe = pb.Recipe(size=size, iterations=iterations, smallest_size=0)
    return pb.JobSpec(
        content=image,
        styles=[pb.StyleSource(image=image)],
        recipe=recipe,
        frames=pb.FrameOptions(format=pb.IMAGE_FORMAT_JPEG) if frames else None,
    )


async def unary_jobs(address: str, seconds: float, number: int) -> float:
    """The number of jobs of 64 px and two iterations, 32 at a time."""
    done, end = 0, time.monotonic() + seconds
    request = pb.StylizeRequest(spec=spec(64, 2))

    async def caller(stub: pb_grpc.StyleTransferServiceStub) -> None:
        nonlocal done
        while time.monotonic() < end:
            await stub.Stylize(request, timeout=60)
            done += time.monotonic() < end

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        await asyncio.gather(*(caller(stub) for _ in range(32)))
    return done


async def frames_of(stream: Any, end: float) -> int:
    """The number of frames received before ``end``."""
    count = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()):
            while (response := await stream.read()) is not grpc.aio.EOF:
                count += response.event.HasField("frame")
    stream.cancel()
    return count


async def watched_frames(address: str, seconds: float, number: int) -> float:
    """The number of frames received by all watchers of this client's jobs, each at most ten a second."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.StylizeStreamRequest(spec=spec(FRAME_SIDE, 100_000, frames=True))
        streams = [stub.StylizeStream(request) for _ in range(JOBS // CLIENTS)]
        for stream in streams.copy():
            job_id = (await stream.read()).event.accepted.job_id
            wanted = pb.WatchJobRequest(job_id=job_id, frames=request.spec.frames)
            streams += [stub.WatchJob(wanted) for _ in range(WATCHERS - 1)]
        end = time.monotonic() + seconds
        return sum(await asyncio.gather(*(frames_of(stream, end) for stream in streams)))


async def own_frames(address: str, seconds: float, number: int) -> float:
    """The number of frames of 50 jobs with one watcher each."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.StylizeStreamRequest(spec=spec(FRAME_SIDE, 100_000, frames=True))
        end = time.monotonic() + seconds
        return sum(await asyncio.gather(*(frames_of(stub.StylizeStream(request), end) for _ in range(50))))


async def open_streams(address: str, seconds: float, number: int) -> tuple[int, int]:
    """Opens streams, each with a job of its own. Returns the number that ended with a result, and the largest number of
    jobs that the server reported at one time. That includes jobs of other clients; no job outlives its stream."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = pb_grpc.StyleTransferServiceStub(channel)  # type: ignore[no-untyped-call]
        request = pb.StylizeStreamRequest(spec=spec(64, int(seconds * 1000 / ITERATION_MS / 2)))
        watching = asyncio.create_task(peak_jobs(stub, ended := asyncio.Event()))
        streams = [stub.StylizeStream(request) for _ in range(STREAMS // CLIENTS)]

        async def has_result(stream: Any) -> bool:
            while (response := await stream.read()) is not grpc.aio.EOF:
                if response.event.HasField("result"):
                    return True
            return False

        results = sum(await asyncio.gather(*map(has_result, streams)))
        ended.set()
        return results, await watching


async def peak_jobs(stub: pb_grpc.StyleTransferServiceStub, ended: asyncio.Event) -> int:
    """The largest number of jobs that the server reported at one time, of about twenty requests a second."""
    most = 0
    while not ended.is_set():
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
        most = max(most, info.running_jobs + info.queued_jobs)
        await asyncio.sleep(0.05)
    return most


if __name__ == "__main__":
    main()
