"""The live display of a running bench: the completed steps and the current one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gramophone_client.bench.metrics import format_number
from gramophone_client.bench.run import Bench
from gramophone_client.bench.table import StepTable

__all__ = ["live_display"]

REFRESH_S = 0.25
BAR_COLUMNS = SPARK_COLUMNS = 40
SPARKS = "▁▂▃▄▅▆▇█"


@asynccontextmanager
async def live_display(bench: Bench, console: Console) -> AsyncIterator[None]:
    """Shows the bench on the console until the block ends, and then erases it. Does nothing without a terminal."""
    if not console.is_terminal:
        yield
        return
    # Refreshed by the event loop instead of a thread, so that nothing changes while it is drawn.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        async def refresh() -> None:
            while True:
                live.update(_render(bench, console.encoding), refresh=True)
                await asyncio.sleep(REFRESH_S)

        refreshing = asyncio.create_task(refresh())
        try:
            yield
        finally:
            refreshing.cancel()


def _render(bench: Bench, encoding: str) -> RenderableType:
    parts: list[RenderableType] = [StepTable(bench.steps)] if bench.steps else []
    if bench.recorder is None:
        parts.append(Text("waiting for the server"))
    else:
        step, steps, duration_s = len(bench.steps) + 1, len(bench.plan.loads), bench.plan.duration_s
        title = f"step {step} of {steps}: {bench.load}, {bench.step_s:.0f} s of at most {duration_s:g}"
        parts.append(Text(title, style="bold", no_wrap=True, overflow="ellipsis"))
        bar = Table.grid()  # adds the line break that a ProgressBar lacks
        bar.add_row(ProgressBar(duration_s, min(bench.step_s, duration_s), width=BAR_COLUMNS))
        parts.append(bar)
        parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in _lines(bench, encoding)]
    return Group(*parts)


def _lines(bench: Bench, encoding: str) -> Iterator[str]:
    recorder = bench.recorder
    if recorder is None:
        return
    tally = recorder.measured(bench.step_s)
    phase = f"window {len(recorder.windows) + 1}" if recorder.is_warm else "warm-up"
    medians = " ".join(format_number(window.result_s.quantile(0.5)) for window in recorder.windows[-3:])
    yield f"{phase}, {len(recorder.in_flight)} jobs in flight" + (f", medians so far {medians} s" if medians else "")
    yield (
        f"{format_number(tally.jobs_per_s)} jobs/s, {format_number(tally.megapixel_iterations_per_s)} Mpx it/s, "
        f"first frame {format_number(tally.first_frame_s.quantile(0.5))} s, "
        f"result p50 {format_number(tally.result_s.quantile(0.5))} s, "
        f"p99 {format_number(tally.result_s.quantile(0.99))} s"
    )
    statuses = ", ".join(f"{count} {status}" for status, count in tally.statuses.most_common())
    ended = [sum(second.values()) for second in recorder.timeline[-SPARK_COLUMNS:]]
    if statuses and encoding.startswith("utf"):
        most = max(ended, default=0) or 1
        statuses += "  " + "".join(SPARKS[count * (len(SPARKS) - 1) // most] for count in ended) + " jobs per second"
    yield statuses or "no job has ended yet"
