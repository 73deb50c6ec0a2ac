"""Sends bad inputs to a server and records the rules that the server violates.

First the corpus (inputs that failed once) and the bombs are sent, one at a time, so that the server's memory is that of
one request. Then damaged messages of all kinds are sent, eight at a time; their memory together must not exceed the
limit for one. All the while the server must answer health checks and must not log an error, and at the end it must run
an ordinary job.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gramophone_server.memory_bound import request_memory_bytes
from tests.bad_input import inputs
from tests.bad_input.inputs import Input, corpus
from tests.bad_input.sending import CONCURRENCY, LIMITS, ServerUnderTest, running_server, watch_health_during

MIB = 2**20
MAX_FAILURES = 50  # ends the campaign; further failures are likely to be the same, and each may take a minute
MAX_HEALTH_S = 2.0  # longest allowed health check


@dataclass
class Findings:
    """The results of a campaign."""

    sent: Counter[str] = field(default_factory=Counter)  # by kind
    codes: dict[str, Counter[str]] = field(default_factory=dict)  # by kind
    slowest_s: dict[str, float] = field(default_factory=dict)  # elapsed time by kind
    repeated: int = 0  # inputs that were slow and therefore sent again
    failures: list[tuple[Input | None, str]] = field(default_factory=list)  # None: of the server as a whole
    max_memory: int = 0  # bytes that one request alone took
    max_memory_input: str = ""
    max_memory_concurrent: int = 0  # bytes that a request and those beside it took
    max_memory_concurrent_input: str = ""
    peak: int = 0  # bytes of the server
    slowest_health_s: float = 0.0

    @property
    def total(self) -> int:
        return self.sent.total()


async def run_campaign(
    count: int, seed: int, paths: Iterable[Path] | None = None, *, bombs: bool = True, show_progress: bool = False
) -> Findings:
    """Sends the inputs in the files (default: the corpus) and the bombs, then ``count`` random inputs of this seed."""
    findings, console = Findings(), Console()
    inputs.prepare()  # now, because it would block the event loop while requests are timed
    alone = [(path.stem, Input.from_file(path)) for path in (corpus() if paths is None else paths)]
    if bombs:
        alone += [(bomb.kind, bomb) for bomb in inputs.bombs()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disable = not show_progress
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, disable=disable) as progress:
        async with running_server(f"{folder}/log") as server:
            await server.run_named_job()
            task = progress.add_task("corpus and bombs", total=len(alone) + count)

            def advance() -> None:
                progress.advance(task)

            async def send_all() -> None:
                for name, sent in alone:
                    await _send(server, name, sent, findings)
                    advance()
                progress.update(task, description="damage")
                source = itertools.islice(inputs.inputs(seed), count)
                await asyncio.gather(*(_send_from(server, source, findings, advance) for _ in range(CONCURRENCY)))

            await watch_health_during(send_all(), server)
            _check_server(findings, server, await server.check_ordinary_job())
    return findings


async def _send_from(
    server: ServerUnderTest, source: Iterable[Input], findings: Findings, advance: Callable[[], None]
) -> None:
    for sent in source:
        if len(findings.failures) >= MAX_FAILURES:
            return
        await _send(server, sent.kind, sent, findings)
        advance()


async def _send(server: ServerUnderTest, name: str, sent: Input, findings: Findings) -> None:
    """Sends one input and adds the outcome to the findings."""
    outcome = await server.send(sent)
    kind = sent.kind.split()[0]
    findings.sent[kind] += 1
    findings.codes.setdefault(kind, Counter())[outcome.code] += 1
    findings.slowest_s[kind] = max(findings.slowest_s.get(kind, 0.0), outcome.seconds)
    findings.repeated += outcome.repeats > 0
    if outcome.failure:
        findings.failures.append((sent, outcome.failure))
    memory = outcome.memory
    if outcome.others and memory > findings.max_memory_concurrent:
        findings.max_memory_concurrent, findings.max_memory_concurrent_input = memory, name
    elif not outcome.others and memory > findings.max_memory:
        findings.max_memory, findings.max_memory_input = memory, name
    if memory > request_memory_bytes(LIMITS):
        others = f" with up to {outcome.others} other requests" if outcome.others else ""
        limit = f"at most {request_memory_bytes(LIMITS) / MIB:.0f} are allowed"
        findings.failures.append((sent, f"took {memory / MIB:.0f} MiB{others}, {limit}"))


def _check_server(findings: Findings, server: ServerUnderTest, job_failure: str) -> None:
    """Adds the failures of the server as a whole."""
    findings.slowest_health_s, findings.peak = server.slowest_health_s, server.peak
    failures = [*(f"health: {failure}" for failure in sorted(set(server.health_failures))), *server.logged_errors()]
    if server.slowest_health_s > MAX_HEALTH_S:
        failures.append(f"a health check took {server.slowest_health_s:.1f} s")
    if job_failure:
        failures.append(f"an ordinary job failed afterwards: {job_failure}")
    findings.failures.extend((None, failure) for failure in failures)


def print_summary(findings: Findings, seconds: float, console: Console) -> None:
    """Prints the results of a campaign that took ``seconds``."""
    table = Table("input", "sent", "slowest", "ended in", title=f"{findings.total} bad inputs in {seconds:.0f} s")
    for kind, sent in sorted(findings.sent.items()):
        codes = ", ".join(f"{code} {n}" for code, n in findings.codes[kind].most_common())
        table.add_row(kind, str(sent), f"{findings.slowest_s[kind]:.2f} s", codes)
    console.print(table)
    console.print(
        f"memory: one request took at most {findings.max_memory / MIB:.0f} MiB ({findings.max_memory_input}), "
        f"up to {CONCURRENCY} concurrent requests {findings.max_memory_concurrent / MIB:.0f} MiB "
        f"({findings.max_memory_concurrent_input}); the limit is {request_memory_bytes(LIMITS) / MIB:.0f} MiB"
    )
    console.print(
        f"{findings.repeated} inputs were slow and sent again; "
        f"a health check took at most {findings.slowest_health_s * 1000:.0f} ms"
    )


def save_failures(findings: Findings, folder: Path) -> list[str]:
    """Writes each input that failed to the folder. Returns a message for each failure."""
    messages = []
    for number, (sent, failure) in enumerate(findings.failures):
        if sent is None:
            messages.append(failure)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:03}-{sent.kind.replace(' ', '-')}.input"
        path.write_bytes(sent.to_file())
        messages.append(f"{failure}\n    {sent.method}; repeat with: python -m tests.bad_input {path}")
    return messages
