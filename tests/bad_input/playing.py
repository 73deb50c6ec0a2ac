"""Plays hostile clients, one at a time, and records the rules that the server violates.

For each case:

- every call ends in an answer that explains itself, in its time (`target`);
- the server's event loop is never blocked for 50 ms, as the server itself measures;
- the server's memory rises by no more than the case may take, and never above the bound that its settings have;
- the small jobs of a bystander succeed meanwhile, in seconds.

A case that violates a rule of time is played again, up to twice, because the machine may have been the cause: it is a
failure if it violates one each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gramophone_client import AsyncGramophoneClient, GramophoneError
from gramophone_server.command_line import load
from gramophone_server.config import Limits
from gramophone_server.memory_bound import memory_bytes
from tests.bad_input import compressed, costly, shapes, streams, unfinished
from tests.bad_input.inputs import in_jpeg, in_png
from tests.bad_input.target import Case, Target
from tests.support.monitoring import LeakCheck, ProcessUsage, RuleViolation, scrape_metrics, with_children
from tests.support.processes import Server
from tests.support.raw_http2 import StreamOver
from tests.support.watched_server import StallWatch

MIB = 2**20
MAX_STALL_S = 0.050
MAX_JOB_S = 5.0  # of the bystander; it takes 10 ms on a quiet server
SETTLE_S = 0.3  # after a case, until its last work is done
REPEATS = 2
NOISE_BYTES = 16 * MIB  # by which memory rises without a reason
# Small enough that a crowd reaches them, and large enough for all that is honest.
SETTINGS = {
    "max_iterations": 100_000, "max_queued": 512, "max_paused_s": 8, "max_detach_s": 5, "max_idle_s": 2,
    "max_blocked_s": 3, "max_receiving_bytes": 80 * MIB, "max_sending_bytes": 32 * MIB,
    "max_decoded_bytes": 256 * MIB, "max_calls_per_connection": 300, "max_parked_bytes": 256 * MIB,
    "max_checkpoint_bytes": 16 * MIB,
}  # fmt: skip
LIMITS = Limits(**SETTINGS)
ENGINES = {"fake": ("--engine", "fake", "--iter-ms", "1"), "vgg": ("--engine", "vgg")}
FLAGS = (
    *("--list-jobs", "--reflection", "--log-level", "error"),
    *("--metrics-port", "0"),
)
DEVICE_LIMIT = 'gramophone_device_memory_bytes{kind="limit"}'
BYSTANDER = {"size": 32, "smallest_size": 0, "iterations": 6}


def all_cases(limits: Limits = LIMITS) -> Iterator[Case]:
    """Every case of every kind."""
    for module in (shapes, compressed, unfinished, streams, costly):
        yield from module.cases(limits)


def select(pattern: str, per_kind: int | None = None, seed: int = 0) -> list[Case]:
    """The cases whose kind, or kind and name, match the pattern; at most this number of each kind, chosen by seed."""
    chosen = [case for case in all_cases() if fnmatch(case.kind, pattern) or fnmatch(name_of(case), pattern)]
    if per_kind is None:
        return chosen
    by_kind: dict[str, list[Case]] = {}
    for case in chosen:
        by_kind.setdefault(case.kind, []).append(case)
    rng = random.Random(seed)
    return [case for cases in by_kind.values() for case in rng.sample(cases, min(per_kind, len(cases)))]


def name_of(case: Case) -> str:
    return f"{case.kind}: {case.name}"


class Measures(NamedTuple):
    """What one playing of a case did to the server."""

    failure: str  # of an answer, or ""
    seconds: float
    stall_s: float
    stacks: str  # of its longer stalls
    rise: int  # bytes
    slowest_job_s: float  # of the bystander

    def problems(self, case: Case) -> list[str]:
        """The rules that were violated."""
        allowed = (3 * LIMITS.max_message_bytes if case.max_rise is None else case.max_rise) + NOISE_BYTES
        problems = [self.failure] if self.failure else []
        if self.stall_s > MAX_STALL_S:
            problems.append(f"the event loop was blocked for {self.stall_s * 1000:.0f} ms\n{self.stacks}")
        if self.rise > allowed:
            problems.append(f"took {self.rise / MIB:.0f} MiB, at most {allowed / MIB:.0f} are allowed")
        if self.slowest_job_s > MAX_JOB_S:
            problems.append(f"a bystander's job took {self.slowest_job_s:.1f} s")
        return problems


@dataclass
class CaseFindings:
    """The results of all cases."""

    played: Counter[str] = field(default_factory=Counter)  # by kind
    slowest_s: dict[str, float] = field(default_factory=dict)  # by kind
    longest_stall_s: dict[str, float] = field(default_factory=dict)  # by kind; the least of all repeats of a case
    largest_rise: dict[str, int] = field(default_factory=dict)  # by kind, bytes
    answers: dict[str, Counter[str]] = field(default_factory=dict)  # by kind
    repeated: int = 0
    memory: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # by engine: peak of the server and its bound, bytes
    failures: list[tuple[str, str]] = field(default_factory=list)  # of the case with this name, or of the server ("")


class Bystander:
    """An honest client that runs one small job after another while others misbehave."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._slowest_s, self._failure = 0.0, ""
        self._started_at: float | None = None
        self._ended = 0

    def take(self) -> tuple[float, str]:
        """The longest time of a job since the last call, the current one included, and the first failure."""
        now = time.monotonic()
        current_s = now - self._started_at if self._started_at is not None else 0.0
        taken = max(self._slowest_s, current_s), self._failure
        self._slowest_s, self._failure = 0.0, ""
        return taken

    async def wait_for_jobs(self, count: int, within_s: float) -> None:
        """Waits until so many more jobs have ended."""
        wanted = self._ended + count
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._ended < wanted:
                    await asyncio.sleep(0.1)

    async def run(self) -> None:
        """Runs jobs until it is cancelled."""
        async with AsyncGramophoneClient(self._address, timeout=60) as client:
            while True:
                start = self._started_at = time.monotonic()
                try:
                    await client.stylize(in_png(), in_jpeg(), **BYSTANDER)
                except GramophoneError as error:
                    self._failure = self._failure or f"a bystander's job ended in {type(error).__name__}: {error}"
                self._started_at, self._ended = None, self._ended + 1
                self._slowest_s = max(self._slowest_s, time.monotonic() - start)
                await asyncio.sleep(0.05)


class Player:
    """Plays cases on one server."""

    def __init__(self, server: Server, target: Target, stalls: StallWatch, bystander: Bystander, engine: str) -> None:
        self.server, self.target, self.stalls, self.bystander = server, target, stalls, bystander
        self.engine, self.peak = engine, 0

    def memory_bound(self) -> int:
        """Bytes that the server may take, by its settings. The batches of a real engine are also in its memory here."""
        settings, _ = load(flags(self.engine), {})
        batches = scrape_metrics(self.target.metrics_url)[DEVICE_LIMIT] if self.engine == "vgg" else 0
        return memory_bytes(settings) + int(batches)

    async def play(self, case: Case, findings: CaseFindings) -> None:
        """Plays a case, up to three times, and adds its results."""
        self.target.answers.clear()
        measures = [await self.play_once(case)]
        while measures[-1].problems(case) and not measures[-1].failure and len(measures) <= REPEATS:
            measures.append(await self.play_once(case))
        findings.played[case.kind] += 1
        findings.repeated += len(measures) > 1
        for table, value in (
            (findings.slowest_s, max(each.seconds for each in measures)),
            (findings.longest_stall_s, min(each.stall_s for each in measures)),
            (findings.largest_rise, min(each.rise for each in measures)),
        ):
            table[case.kind] = max(table.get(case.kind, 0), value)
        findings.answers.setdefault(case.kind, Counter()).update(self.target.answers)
        problems = measures[-1].problems(case)
        findings.failures.extend((name_of(case), problem) for problem in problems)

    async def play_once(self, case: Case) -> Measures:
        self.stalls.take_s(), self.stalls.take_stacks(), self.bystander.take()
        before, start = self._reset_peak(), time.monotonic()
        failure = ""
        try:
            async with asyncio.timeout(case.within_s):
                await case.play(self.target)
        except* TimeoutError:
            failure = f"was not answered within {time.monotonic() - start:.1f} s"
        except* (RuleViolation, StreamOver, OSError) as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            failure = str(error) or type(error).__name__
        seconds = time.monotonic() - start
        await asyncio.sleep(SETTLE_S)
        if failure:  # later cases are not to be blamed for what is left of this one
            await self.bystander.wait_for_jobs(2, within_s=60)
        slowest_job_s, job_failure = self.bystander.take()
        peak = self.target.memory("VmHWM")
        self.peak = max(self.peak, peak)
        return Measures(
            failure or job_failure, seconds, self.stalls.take_s(), self.stalls.take_stacks(), peak - before,
            slowest_job_s,
        )  # fmt: skip

    def _reset_peak(self) -> int:
        """Starts a new peak. Returns the server's memory."""
        for pid in with_children(self.server.pid):
            with contextlib.suppress(OSError):  # it has ended
                Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self.target.memory()


def flags(engine: str) -> list[str]:
    """The server's command line."""
    limits = (part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value)))
    return [*ENGINES[engine], *FLAGS, *limits]


@contextlib.asynccontextmanager
async def player(engine: str) -> AsyncIterator[Player]:
    """A server, and a bystander that uses it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stalls = StallWatch(folder)
        with Server(*flags(engine), cwd=folder, module="tests.support.watched_server") as server:
            target = Target(server.address, server.pid, LIMITS, server.line("metrics on "))
            server.line("ready in ")
            async with AsyncGramophoneClient(server.address, timeout=60) as client:
                target.job_id = (await client.stylize(in_png(), in_jpeg(), **BYSTANDER)).job_id
            bystander = Bystander(server.address)
            running = asyncio.create_task(bystander.run())
            try:
                await asyncio.sleep(1)
                yield Player(server, target, stalls, bystander, engine)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)


async def play_cases(cases: Iterable[Case], *, show_progress: bool = False) -> CaseFindings:
    """Plays the cases. At the end the server must hold nothing more than before."""
    findings, cases = CaseFindings(), list(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show_progress) as progress:
        task = progress.add_task("", total=len(cases))
        for engine in ENGINES:
            if chosen := [case for case in cases if case.engine == engine]:
                async with player(engine) as each:
                    async for case in _play_all(each, chosen, findings):
                        progress.update(task, description=name_of(case)[:60], advance=1)
    return findings


async def _play_all(each: Player, cases: Iterable[Case], findings: CaseFindings) -> AsyncIterator[Case]:
    """Plays the cases on one server, and checks what it has logged and still holds after them."""
    descriptors = ProcessUsage.of(each.server.pid).descriptors
    for case in cases:
        await each.play(case, findings)
        yield case
        if each.server.exit_code is not None:
            end = f"the server has ended with code {each.server.exit_code}: {each.server.read_output()[-500:]}"
            findings.failures.append((name_of(case), end))
            return
    bound = await asyncio.to_thread(each.memory_bound)
    findings.memory[each.engine] = each.peak, bound
    if each.peak > bound:
        what = f"{each.peak / MIB:.0f} MiB of memory, at most {bound / MIB:.0f} follow from its settings"
        findings.failures.append(("", f"the server with the {each.engine} engine took {what}"))
    findings.failures += [("", failure) for failure in await _leaks(each, descriptors)]
    errors = [line for line in each.server.read_output().splitlines() if " ERROR " in line or "Traceback" in line]
    findings.failures += [("", f"logged {line.strip()}") for line in sorted(set(errors))]


async def _leaks(each: Player, descriptors: int) -> list[str]:
    """What the server still holds of all cases, when they have had time to end."""
    check = LeakCheck(each.server.pid, each.target.metrics_url)
    check.baseline = {"descriptors": descriptors + 4, "threads": 100, "tasks": 30}
    try:
        await check.wait_until_settled()
    except RuleViolation as error:
        return [str(error)]
    return []


def print_cases(findings: CaseFindings, seconds: float, console: Console) -> None:
    """Prints the results of cases that took ``seconds``."""
    played = findings.played.total()
    table = Table("hostile clients", "n", "slowest", "longest stall", "most memory", "answers")
    table.title = f"{played} cases in {seconds:.0f} s"
    for kind, count in findings.played.items():
        answers = ", ".join(f"{code} {n}" for code, n in findings.answers[kind].most_common(6))
        table.add_row(
            kind, str(count), f"{findings.slowest_s[kind]:.1f} s", f"{findings.longest_stall_s[kind] * 1000:.0f} ms",
            f"{findings.largest_rise[kind] / MIB:.0f} MiB", answers,
        )  # fmt: skip
    console.print(table)
    console.print(f"{findings.repeated} cases were played again")
    for engine, (peak, bound) in findings.memory.items():
        console.print(f"memory with the {engine} engine: {peak / MIB:.0f} MiB, bound {bound / MIB:.0f} MiB")


def describe(findings: CaseFindings) -> list[str]:
    """A text for each failure, with the command that repeats it."""
    command = "\n    repeat with: python -m tests.bad_input --only"
    return [f"{name}: {failure}{command} '{name}'" if name else failure for name, failure in findings.failures]
