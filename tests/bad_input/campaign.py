"""Sends bad inputs to a server and tells what it did wrong.

Three parts: what failed once (the corpus), and the bombs, each alone, so that the server's memory is that of one request;
then damaged messages of all kinds, eight at a time, whose memory together is held to the limit of one. Throughout, the server
must answer health, log no error, and be able to make a good picture afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.bad_input import inputs
from tests.bad_input.inputs import Input, corpus
from tests.bad_input.sending import AT_ONCE, LIMITS, Target, beside, target

MIB = 2**20
ENOUGH = 50  # failures, behind which no more damage is sent: the same again, and each may take a minute


@dataclass
class Findings:
    """What a campaign has seen."""

    sent: Counter[str] = field(default_factory=Counter)  # by kind
    codes: dict[str, Counter[str]] = field(default_factory=dict)  # by kind
    slowest: dict[str, float] = field(default_factory=dict)  # seconds on the clock by kind
    again: int = 0  # inputs that were slow, and were made again
    failures: list[tuple[Input | None, str]] = field(default_factory=list)  # of an input, or of the server as a whole
    most_memory: int = 0  # bytes of one request alone, above what the server held before it
    most_memory_of: str = ""
    most_memory_at_once: int = 0  # bytes while others were on their way, above what it held before one of them
    most_memory_at_once_of: str = ""
    peak: int = 0  # bytes of the server
    slowest_health_s: float = 0.0

    @property
    def total(self) -> int:
        return self.sent.total()


async def campaign(
    count: int, seed: int, paths: Iterable[Path] | None = None, *, bombs: bool = True, loud: bool = False
) -> Findings:
    """``count`` inputs of this seed behind what is in the files, by default the corpus, and the bombs."""
    findings, console = Findings(), Console()
    inputs.prepare()  # or it would hold up the clock of whatever is on its way
    alone = [(path.stem, Input.of_file(path)) for path in (corpus() if paths is None else paths)]
    if bombs:
        alone += [(bomb.kind, bomb) for bomb in inputs.bombs()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, disable=not loud) as progress:
        async with target(f"{folder}/log") as server:
            await server.begin()
            task = progress.add_task("bombs", total=len(alone) + count)

            async def work() -> None:
                for name, sent in alone:
                    await _noted(server, name, sent, findings)
                    progress.advance(task)
                progress.update(task, description="damage")
                source = itertools.islice(inputs.inputs(seed), count)
                await asyncio.gather(
                    *(_sender(server, source, findings, lambda: progress.advance(task)) for _ in range(AT_ONCE))
                )

            await beside(work(), server)
            _judge(findings, server, await server.still_paints())
    return findings


async def _sender(server: Target, source: Iterable[Input], findings: Findings, sent: object) -> None:
    for one in source:
        if len(findings.failures) >= ENOUGH:
            return
        await _noted(server, one.kind, one, findings)
        sent()  # type: ignore[operator]


async def _noted(server: Target, name: str, sent: Input, findings: Findings) -> None:
    """Sends one input, and holds the server to its rules."""
    outcome = await server.outcome(sent)
    kind = sent.kind.split()[0]
    findings.sent[kind] += 1
    findings.codes.setdefault(kind, Counter())[outcome.code] += 1
    findings.slowest[kind] = max(findings.slowest.get(kind, 0.0), outcome.seconds)
    findings.again += outcome.again > 0
    if outcome.failure:
        findings.failures.append((sent, outcome.failure))
    took, others = outcome.memory, f" with up to {outcome.beside} others beside" if outcome.beside else ""
    if outcome.beside and took > findings.most_memory_at_once:
        findings.most_memory_at_once, findings.most_memory_at_once_of = took, name
    elif not outcome.beside and took > findings.most_memory:
        findings.most_memory, findings.most_memory_of = took, name
    if took > LIMITS.request_memory_bytes:
        limit = f"at most {LIMITS.request_memory_bytes / MIB:.0f} are allowed"
        findings.failures.append((sent, f"took {took / MIB:.0f} MiB{others}, {limit}"))


def _judge(findings: Findings, server: Target, picture: str) -> None:
    """What the server as a whole did wrong."""
    findings.slowest_health_s, findings.peak = server.slowest_health_s, server.peak
    wrong = [*(f"health: {failure}" for failure in sorted(set(server.health_failures))), *server.defects()]
    if server.slowest_health_s > 2:
        wrong.append(f"health took {server.slowest_health_s:.1f} s")
    if picture:
        wrong.append(f"no good picture afterwards: {picture}")
    findings.failures.extend((None, failure) for failure in wrong)


def show(findings: Findings, began: float, console: Console) -> None:
    """The table at the end."""
    table = Table(
        "input", "sent", "slowest", "ended in", title=f"{findings.total} bad inputs in {time.monotonic() - began:.0f} s"
    )
    for kind, sent in sorted(findings.sent.items()):
        codes = ", ".join(f"{code} {n}" for code, n in findings.codes[kind].most_common())
        table.add_row(kind, str(sent), f"{findings.slowest[kind]:.2f} s", codes)
    console.print(table)
    console.print(
        f"one request took at most {findings.most_memory / MIB:.0f} MiB ({findings.most_memory_of}), up to {AT_ONCE} at once "
        f"{findings.most_memory_at_once / MIB:.0f} MiB ({findings.most_memory_at_once_of}), the limit is "
        f"{LIMITS.request_memory_bytes / MIB:.0f} MiB; {findings.again} inputs were slow and made again; "
        f"health took at most {findings.slowest_health_s * 1000:.0f} ms"
    )


def keep(findings: Findings, folder: Path) -> list[str]:
    """Writes each input that failed, and returns what is to be said of every failure."""
    said = []
    for number, (sent, failure) in enumerate(findings.failures):
        if sent is None:
            said.append(failure)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:03}-{sent.kind.replace(' ', '-')}.input"
        path.write_bytes(sent.to_file())
        said.append(f"{failure}\n    {sent.method}; again with: python -m tests.bad_input {path}")
    return said
