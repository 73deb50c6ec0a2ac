"""Reports as text, as wide as there is room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gramophone_client.bench.histogram import Histogram
from gramophone_client.bench.measure import OK
from gramophone_client.bench.metrics import METRICS, Metric, Pair, number, pairs
from gramophone_client.bench.report import Report, Step

__all__ = ["StepTable", "differences", "print_comparison", "print_report", "said_of_server"]

FIGURE_COLUMNS = 7  # of the longest that `number` is likely to make
BESIDE_FIGURES = 42  # columns of a comparison: the longest name of a metric, the ratio, and what is between them
QUARTET = (0.5, 0.95, 0.99, 1.0)

# Most important first: the last ones are left out where there is no room.
COLUMNS: Sequence[tuple[str, Callable[[Step], str]]] = (
    ("load", lambda step: str(step.load)),
    ("jobs/s", lambda step: number(step.tally.jobs_per_s)),
    ("result s\np50/p95/p99/max", lambda step: _quantiles(step.tally.result_s, QUARTET)),
    ("failed", lambda step: str(step.tally.failed)),
    ("first frame s\np50/p95/p99/max", lambda step: _quantiles(step.tally.first_frame_s, QUARTET)),
    ("Mpx it/s", lambda step: number(step.tally.megapixel_iterations_per_s)),
    ("jobs", lambda step: str(step.tally.ended)),
    ("frame gap s\np50/p99", lambda step: _quantiles(step.tally.frame_gap_s, (0.5, 0.99))),
    ("dropped", lambda step: str(step.tally.frames_dropped)),
    ("MB", lambda step: number(step.tally.bytes_received / 1e6)),
    ("client\nCPU", lambda step: f"{100 * step.client_cpu:.0f} %"),
)


class StepTable:
    """One line for each step, with as many columns as fit."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, unbounded = len(COLUMNS), options.update(max_width=10_000)
        while columns > 2 and Measurement.get(console, unbounded, self._table(columns)).maximum > options.max_width:
            columns -= 1
        yield self._table(columns)

    def _table(self, columns: int) -> Table:
        table = _bare_table()
        for title, _ in COLUMNS[:columns]:
            table.add_column(title, justify="left" if title == "load" else "right", no_wrap=True)
        for step in self._steps:
            style = "" if step.ending == "stable" else "dim"
            table.add_row(*(shown(step) for _, shown in COLUMNS[:columns]), style=style)
        return table


def print_report(console: Console, report: Report) -> None:
    """The final table, and what has to be said about it."""
    console.print(Text(said_of_server(report)))
    console.print(StepTable(report.steps))
    for line in _remarks(report):
        console.print(Text(line))


def print_comparison(console: Console, before: Report, after: Report, names: tuple[str, str]) -> None:
    """Each load that both have, figure by figure, and the ratio."""
    for name, report in zip(names, (before, after), strict=True):
        console.print(Text(f"{name}: {said_of_server(report)}"))
    for line in differences(before, after):
        console.print(Text(line, style="yellow"))
    # The names of the files may be long; the figures are not, and are there from 40 columns on.
    room = max(FIGURE_COLUMNS, (console.width - BESIDE_FIGURES) // 2)
    for pair in pairs(before, after):
        table = _bare_table()
        table.add_column(str(pair.before.load), min_width=10, overflow="fold")
        for name in names:
            table.add_column(name, justify="right", min_width=FIGURE_COLUMNS, max_width=room, overflow="fold")
        table.add_column("ratio", justify="right", no_wrap=True)
        for metric in METRICS:
            shown = (number(metric.value(pair.before)), number(metric.value(pair.after)))
            table.add_row(f"{metric.name}, {metric.unit}".rstrip(", "), *shown, _ratio(pair, metric))
        console.print(table)


def differences(before: Report, after: Report) -> Iterator[str]:
    """What makes the two hard to compare, in a sentence each."""
    for key in sorted(before.settings.keys() | after.settings.keys()):
        if before.settings.get(key) != after.settings.get(key):
            values = before.settings.get(key), after.settings.get(key)
            is_long = any(isinstance(value, list) for value in values)
            yield f"they differ in {key}" + ("" if is_long else f": {values[0]} and {values[1]}")
    loads, others = (Counter(step.load for step in report.steps) for report in (before, after))
    once = [str(load) for load in loads.keys() ^ others.keys()]
    if once:
        yield f"only one of them has: {', '.join(sorted(once))}"
    oftener = [str(load) for load in loads.keys() & others.keys() if loads[load] != others[load]]
    if oftener:
        yield f"one of them has more often: {', '.join(sorted(oftener))}"


def said_of_server(report: Report) -> str:
    """The server in a line."""
    of = report.server
    return f"gramophone {of['version']} on {of['device']}, {of['precision']}, {of['backbone']}, at {report.began}"


def _bare_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)


def _quantiles(histogram: Histogram, shares: Sequence[float]) -> str:
    return "/".join(number(histogram.quantile(share)) for share in shares) if histogram.count else "-"


def _ratio(pair: Pair, metric: Metric) -> Text:
    ratio = pair.ratio(metric)
    if ratio is None:
        return Text("-")
    if metric.more_is_better is None or 0.95 < ratio < 1.05:  # runs differ by that much without a cause
        return Text(f"{ratio:.2f}")
    return Text(f"{ratio:.2f}", style="green" if (ratio > 1) == metric.more_is_better else "red")


def _remarks(report: Report) -> Iterator[str]:
    for step in report.steps:
        if set(step.tally.statuses) - {OK}:
            yield f"{step.load}: {_counted(step.tally.statuses)}"
        if step.tally.failed_s:
            told = (f"{status} {_quantiles(one, QUARTET)}" for status, one in sorted(step.tally.failed_s.items()))
            yield f"{step.load}: failed after s p50/p95/p99/max: {', '.join(told)}"
        if len(step.tally.by_kind) > 1:
            told = (f"{kind} {_quantiles(one, QUARTET)}" for kind, one in sorted(step.tally.by_kind.items()))
            yield f"{step.load}: result s p50/p95/p99/max of {', '.join(told)}"
        for note in step.notes():
            yield f"{step.load}: {note}"


def _counted(statuses: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in statuses.most_common())
