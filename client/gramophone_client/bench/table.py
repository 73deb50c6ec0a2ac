"""Reports as text tables that fit the width of the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gramophone_client.bench.histogram import Histogram
from gramophone_client.bench.measure import OK
from gramophone_client.bench.metrics import METRICS, Metric, Pair, format_number, pairs
from gramophone_client.bench.report import Report, Step

__all__ = ["StepTable", "describe_server", "differences", "print_comparison", "print_report"]

NUMBER_WIDTH = 7  # characters of the longest number that `format_number` is likely to return
OTHER_WIDTH = 42  # characters of a comparison without its numbers: the longest metric name, the ratio, the separators
QUANTILES = (0.5, 0.95, 0.99, 1.0)

# Most important first; if there is not enough room, the last columns are omitted.
COLUMNS: Sequence[tuple[str, Callable[[Step], str]]] = (
    ("load", lambda step: str(step.load)),
    ("jobs/s", lambda step: format_number(step.tally.jobs_per_s)),
    ("result s\np50/p95/p99/max", lambda step: _quantiles(step.tally.result_s, QUANTILES)),
    ("failed", lambda step: str(step.tally.failed)),
    ("first frame s\np50/p95/p99/max", lambda step: _quantiles(step.tally.first_frame_s, QUANTILES)),
    ("Mpx it/s", lambda step: format_number(step.tally.megapixel_iterations_per_s)),
    ("jobs", lambda step: str(step.tally.ended)),
    ("frame gap s\np50/p99", lambda step: _quantiles(step.tally.frame_gap_s, (0.5, 0.99))),
    ("dropped", lambda step: str(step.tally.frames_dropped)),
    ("MB", lambda step: format_number(step.tally.bytes_received / 1e6)),
    ("client\nCPU", lambda step: f"{100 * step.client_cpu:.0f} %"),
)


class StepTable:
    """One row per step, with as many columns as fit."""

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
            table.add_row(*(cell(step) for _, cell in COLUMNS[:columns]), style=style)
        return table


def print_report(console: Console, report: Report) -> None:
    """Prints the server, the table of all steps, and the notes on them."""
    console.print(Text(describe_server(report)))
    console.print(StepTable(report.steps))
    for line in _details(report):
        console.print(Text(line))


def print_comparison(console: Console, before: Report, after: Report, names: tuple[str, str]) -> None:
    """Prints the metrics and their ratios for each load profile that both reports have."""
    for name, report in zip(names, (before, after), strict=True):
        console.print(Text(f"{name}: {describe_server(report)}"))
    for line in differences(before, after):
        console.print(Text(line, style="yellow"))
    # File names may be long and wrap; the numbers fit from 40 columns up.
    max_width = max(NUMBER_WIDTH, (console.width - OTHER_WIDTH) // 2)
    for pair in pairs(before, after):
        table = _bare_table()
        table.add_column(str(pair.before.load), min_width=10, overflow="fold")
        for name in names:
            table.add_column(name, justify="right", min_width=NUMBER_WIDTH, max_width=max_width, overflow="fold")
        table.add_column("ratio", justify="right", no_wrap=True)
        for metric in METRICS:
            values = (format_number(metric.value(pair.before)), format_number(metric.value(pair.after)))
            table.add_row(f"{metric.name}, {metric.unit}".rstrip(", "), *values, _ratio(pair, metric))
        console.print(table)


def differences(before: Report, after: Report) -> Iterator[str]:
    """Sentences about differences that limit the comparison of two reports."""
    for key in sorted(before.settings.keys() | after.settings.keys()):
        if before.settings.get(key) != after.settings.get(key):
            values = before.settings.get(key), after.settings.get(key)
            is_long = any(isinstance(value, list) for value in values)
            yield f"the reports differ in {key}" + ("" if is_long else f": {values[0]} and {values[1]}")
    first, second = (Counter(step.load for step in report.steps) for report in (before, after))
    unmatched = [str(load) for load in first.keys() ^ second.keys()]
    if unmatched:
        yield f"only one report has: {', '.join(sorted(unmatched))}"
    unequal = [str(load) for load in first.keys() & second.keys() if first[load] != second[load]]
    if unequal:
        yield f"one report has more steps of: {', '.join(sorted(unequal))}"


def describe_server(report: Report) -> str:
    """One line about the server and the date."""
    server = report.server
    backend = f"{server['device']}, {server['precision']}, {server['backbone']}"
    return f"gramophone {server['version']} on {backend}, at {report.began}"


def _bare_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)


def _quantiles(histogram: Histogram, shares: Sequence[float]) -> str:
    return "/".join(format_number(histogram.quantile(share)) for share in shares) if histogram.count else "-"


def _ratio(pair: Pair, metric: Metric) -> Text:
    ratio = pair.ratio(metric)
    if ratio is None:
        return Text("-")
    if metric.more_is_better is None or 0.95 < ratio < 1.05:  # repeated runs of the same server differ this much
        return Text(f"{ratio:.2f}")
    return Text(f"{ratio:.2f}", style="green" if (ratio > 1) == metric.more_is_better else "red")


def _details(report: Report) -> Iterator[str]:
    """For each step: the statuses if not all are OK, the latencies of failures and of each kind, and the notes."""
    for step in report.steps:
        if set(step.tally.statuses) - {OK}:
            yield f"{step.load}: {_counts(step.tally.statuses)}"
        if step.tally.failed_s:
            yield f"{step.load}: time to failure, s, p50/p95/p99/max: {_by_name(step.tally.failed_s)}"
        if len(step.tally.by_kind) > 1:
            yield f"{step.load}: time to result, s, p50/p95/p99/max: {_by_name(step.tally.by_kind)}"
        for note in step.notes():
            yield f"{step.load}: {note}"


def _by_name(histograms: Mapping[str, Histogram]) -> str:
    return ", ".join(f"{name} {_quantiles(histogram, QUANTILES)}" for name, histogram in sorted(histograms.items()))


def _counts(statuses: Counter[str]) -> str:
    return ", ".join(f"{count} {status}" for status, count in statuses.most_common())
