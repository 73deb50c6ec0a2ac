"""The bench while it runs: the steps that are done, and the present one as it stands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gramophone_client.bench.metrics import number
from gramophone_client.bench.run import Bench
from gramophone_client.bench.table import StepTable

__all__ = ["shown"]

REFRESH_S = 0.25
BAR_COLUMNS = SPARK_COLUMNS = 40
SPARKS = "▁▂▃▄▅▆▇█"


@asynccontextmanager
async def shown(bench: Bench, console: Console) -> AsyncIterator[None]:
    """Draws the bench on the console, if that is a terminal, until the block ends; then the lines are gone."""
    if not console.is_terminal:
        yield
        return
    # Refreshed by the event loop and not by a thread of its own, so that nothing changes while it is drawn.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        async def refresh() -> None:
            while True:
                live.update(_drawn(bench, console.encoding), refresh=True)
                await asyncio.sleep(REFRESH_S)

        refreshing = asyncio.create_task(refresh())
        try:
            yield
        finally:
            refreshing.cancel()


def _drawn(bench: Bench, encoding: str) -> RenderableType:
    parts: list[RenderableType] = [StepTable(bench.steps)] if bench.steps else []
    if bench.recorder is None:
        parts.append(Text("waiting for the server"))
    else:
        step, steps, duration_s = len(bench.steps) + 1, len(bench.plan.loads), bench.plan.duration_s
        title = f"step {step} of {steps}: {bench.load}, {bench.step_s:.0f} s of at most {duration_s:g}"
        parts.append(Text(title, style="bold", no_wrap=True, overflow="ellipsis"))
        bar = Table.grid()  # which ends its line
        bar.add_row(ProgressBar(duration_s, min(bench.step_s, duration_s), width=BAR_COLUMNS))
        parts.append(bar)
        parts += [Text(words, no_wrap=True, overflow="ellipsis") for words in _words(bench, encoding)]
    return Group(*parts)


def _words(bench: Bench, encoding: str) -> Iterator[str]:
    recorder = bench.recorder
    if recorder is None:
        return
    tally = recorder.measured(bench.step_s)
    stage = f"window {len(recorder.windows) + 1}" if recorder.is_warm else "warm-up"
    medians = " ".join(number(window.result_s.quantile(0.5)) for window in recorder.windows[-3:])
    yield f"{stage}, {len(recorder.in_flight)} jobs on their way" + (f", medians so far {medians} s" if medians else "")
    yield (
        f"{number(tally.jobs_per_s)} jobs/s, {number(tally.megapixel_iterations_per_s)} Mpx it/s, "
        f"first frame {number(tally.first_frame_s.quantile(0.5))} s, "
        f"result p50 {number(tally.result_s.quantile(0.5))} s, p99 {number(tally.result_s.quantile(0.99))} s"
    )
    statuses = ", ".join(f"{count} {status}" for status, count in tally.statuses.most_common())
    ended = [sum(second.values()) for second in recorder.timeline[-SPARK_COLUMNS:]]
    if statuses and encoding.startswith("utf"):
        most = max(ended, default=0) or 1
        statuses += "  " + "".join(SPARKS[count * (len(SPARKS) - 1) // most] for count in ended) + " jobs each second"
    yield statuses or "no job has ended yet"
