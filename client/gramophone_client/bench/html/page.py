"""Reports as a self-contained HTML page with charts, tables and notes, in light and dark mode."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from gramophone_client.bench.arrivals import ClosedLoop
from gramophone_client.bench.histogram import Histogram
from gramophone_client.bench.html.charts import Axis, Bar, Series, bar_chart, line_chart
from gramophone_client.bench.html.stylesheet import STYLE
from gramophone_client.bench.measure import LEFT, OK
from gramophone_client.bench.metrics import METRICS, Metric, Pair, format_number, pairs
from gramophone_client.bench.report import Report, Step
from gramophone_client.bench.table import describe_server, differences

__all__ = ["comparison_page", "report_page"]

ORDERED_COLOURS = ("o1", "o2", "o3", "o4", "o5")  # CSS classes of the stylesheet module
FAILURE_COLOURS = ("c2", "c3", "c4", "c5", "c6")  # one for each failure status; further ones share the last
MAX_BARS = 120
PERCENTILES = (0.0, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


class _NamedReport(NamedTuple):
    name: str
    report: Report


def report_page(report: Report) -> str:
    """The page of one report."""
    reports = [_NamedReport("", report)]
    body = [_tiles(_headline(report)), '<div class="charts">']
    for closed in (True, False):
        if _steps(report, closed):
            body += [_throughput(reports, closed), _latency(report, closed), _percentiles(report, closed)]
    body += ["</div>", _outcomes(report), *_step_table(report)]
    return _page("gramophone bench", [describe_server(report), *_about(report)], body)


def comparison_page(before: Report, after: Report, names: tuple[str, str]) -> str:
    """The page that compares two reports; the ratios are after / before."""
    reports = [_NamedReport(name, report) for name, report in zip(names, (before, after), strict=True)]
    both = pairs(before, after)
    body = [_tiles(_ratios(both[-1])) if both else "", '<div class="charts">']
    for closed in (True, False):
        if _steps(before, closed) and _steps(after, closed):
            body.append(_throughput(reports, closed))
            body += [
                _compared(reports, closed, metric) for metric in METRICS if metric.name in ("result p50", "result p99")
            ]
    for pair in both:
        body.append(_distributions(pair, names))
    body.append("</div>")
    body += [_pair_table(pair, names) for pair in both]
    about = [f"{name}: {describe_server(report)}" for name, report in reports]
    return _page("gramophone bench: " + " and ".join(names), [*about, *differences(before, after)], body)


# Charts ---------------------------------------------------------------------------------------------------------------


def _steps(report: Report, closed: bool) -> list[Step]:
    return [step for step in report.steps if isinstance(step.load, ClosedLoop) == closed]


def _size(step: Step) -> float:
    return step.load.concurrency if isinstance(step.load, ClosedLoop) else step.load.rate


def _x_axis(steps: Sequence[Step], closed: bool) -> tuple[Axis, Mapping[float, float]]:
    """The load axis, and the x coordinate of each load. Concurrencies usually double, so they are evenly spaced."""
    sizes = sorted({_size(step) for step in steps})
    if not closed:
        return Axis("offered, jobs/s"), {size: size for size in sizes}
    positions = {size: float(i) for i, size in enumerate(sizes)}
    return Axis("jobs at a time", [(x, f"{size:g}") for size, x in positions.items()]), positions


def _throughput(reports: Sequence[_NamedReport], closed: bool) -> str:
    steps = [step for named in reports for step in _steps(named.report, closed)]
    axis, positions = _x_axis(steps, closed)
    lines = [
        Series(
            named.name or "completed",
            f"c{i}",
            [(positions[_size(step)], step.tally.jobs_per_s) for step in _steps(named.report, closed)],
        )
        for i, named in enumerate(reports)
    ]
    if not closed:
        # Jobs that were cancelled on purpose are part of the offered load, and the server did not lose them.
        for i, named in enumerate(reports):
            if any(step.tally.statuses[LEFT] for step in _steps(named.report, closed)):
                points = [(positions[_size(step)], _handled_per_s(step)) for step in _steps(named.report, closed)]
                name = f"{named.name or 'completed'}, and cancelled on purpose"
                lines.append(Series(name, f"c{i}", points, is_dashed=True))
        # Limited to 1.5 times the throughput: under overload the offered load would flatten all other lines.
        furthest = min(max(positions), 1.5 * max(y for line in lines for _, y in line.points) or math.inf)
        lines.append(Series("offered", "quiet", [(0.0, 0.0), (furthest, furthest)], is_dashed=True, has_dots=False))
    return _figure("Throughput, jobs/s", lines, line_chart(axis, Axis("jobs/s"), lines))


def _handled_per_s(step: Step) -> float:
    """Jobs/s that either succeeded or were cancelled on purpose."""
    return (step.tally.ok + step.tally.statuses[LEFT]) / (step.tally.seconds or 1)


def _latency(report: Report, closed: bool) -> str:
    steps = _steps(report, closed)
    axis, positions = _x_axis(steps, closed)

    def line(name: str, label: str, colour: str, is_dashed: bool = False) -> Series:
        metric = next(metric for metric in METRICS if metric.name == name)
        points = [(positions[_size(step)], value) for step in steps if (value := metric.value(step)) is not None]
        return Series(label, colour, points, is_dashed)

    lines = [
        line("result p50", "result p50", "o2"),
        line("result p95", "p95", "o3"),
        line("result p99", "p99", "o5"),
        line("first frame p50", "first frame p50", "c1", is_dashed=True),
    ]
    return _figure("Latency, s", lines, line_chart(axis, Axis("s"), lines))


def _compared(reports: Sequence[_NamedReport], closed: bool, metric: Metric) -> str:
    axis, positions = _x_axis([step for named in reports for step in _steps(named.report, closed)], closed)
    lines = []
    for i, named in enumerate(reports):
        values = [(positions[_size(step)], metric.value(step)) for step in _steps(named.report, closed)]
        lines.append(Series(named.name, f"c{i}", [(x, y) for x, y in values if y is not None]))
    name = f"{metric.name[0].upper()}{metric.name[1:]}, {metric.unit}"
    return _figure(name, lines, line_chart(axis, Axis(metric.unit), lines))


def _percentiles(report: Report, closed: bool) -> str:
    steps = [step for step in _steps(report, closed) if step.tally.result_s.count]
    last = len(ORDERED_COLOURS) - 1
    colours = [ORDERED_COLOURS[i * last // max(1, len(steps) - 1)] for i in range(len(steps))]
    lines = [_curve(str(step.load), colour, step.tally.result_s) for step, colour in zip(steps, colours, strict=True)]
    return _figure("Time to the result, s, by the share of jobs that had it by then", lines, _curves(lines))


def _distributions(pair: Pair, names: tuple[str, str]) -> str:
    lines = [_curve(name, f"c{i}", step.tally.result_s) for i, (name, step) in enumerate(zip(names, pair, strict=True))]
    return _figure(f"Time to the result, s: {pair.before.load}", lines, _curves(lines))


def _curves(lines: Sequence[Series]) -> str:
    furthest = max((x for line in lines for x, _ in line.points), default=0.0)
    ticks = [(_stretched(share), f"{100 * share:g} %") for share in PERCENTILES]
    ticks = ticks[: next((i for i, (x, _) in enumerate(ticks) if x >= furthest), len(ticks)) + 1]
    return line_chart(Axis("of the jobs", ticks), Axis("s"), lines)


def _curve(name: str, colour: str, histogram: Histogram) -> Series:
    points, before = [], 0
    for seconds, total in histogram.curve():
        # Each bucket is drawn at the middle of its jobs, because 100 % would be infinitely far on this axis.
        points.append((_stretched((before + total) / 2 / histogram.count), seconds))
        before = total
    return Series(name, colour, points, has_dots=False)


def _stretched(share: float) -> float:
    """The x coordinate of a share: 90 %, 99 % and 99.9 % are evenly spaced."""
    return -math.log10(1 - share)


def _outcomes(report: Report) -> str:
    names = sorted({name for step in report.steps for second in step.timeline for name in second} - {OK, LEFT})
    colours = {OK: "c1", LEFT: "quiet"}
    colours |= {name: FAILURE_COLOURS[min(i, len(FAILURE_COLOURS) - 1)] for i, name in enumerate(names)}
    totals = sum((Counter(second) for step in report.steps for second in step.timeline), Counter[str]())
    colours = {name: colour for name, colour in colours.items() if totals[name]}
    seconds = sum(len(step.timeline) for step in report.steps)
    width = max(1, math.ceil(seconds / MAX_BARS))
    bars = []
    for step in report.steps:
        for start in range(0, len(step.timeline), width):
            group = step.timeline[start : start + width]
            total = sum(map(Counter, group), Counter[str]())
            bars.append(Bar(step.began_s + start, len(group), {name: n / len(group) for name, n in total.items()}))
    marks = [(step.began_s, str(step.load)) for step in report.steps]
    lines = [Series(name, colour, ()) for name, colour in colours.items()]
    chart = bar_chart(Axis("seconds since the bench began"), Axis("jobs/s"), bars, colours, marks)
    return _figure("How the jobs ended, jobs/s", lines, chart)


def _figure(title: str, lines: Sequence[Series], chart: str) -> str:
    legend = "".join(
        f'<span><i class="{line.colour}{" dashed" if line.is_dashed else ""}"></i>{escape(line.name)}</span>'
        for line in lines
    )
    return f'<figure><figcaption>{escape(title)}</figcaption><p class="legend">{legend}</p>{chart}</figure>'


# Texts and tables -----------------------------------------------------------------------------------------------------


def _headline(report: Report) -> Iterator[tuple[str, str, str]]:
    """The most important values as (number, unit, description)."""
    successful = [step for step in report.steps if step.tally.ok]
    if not successful:
        yield "0", "jobs", "no job was completed"
        return
    best, first = max(successful, key=lambda step: step.tally.jobs_per_s), successful[0]
    yield format_number(best.tally.jobs_per_s), "jobs/s", f"most jobs, {best.load}"
    work = max(successful, key=lambda step: step.tally.megapixel_iterations_per_s)
    yield format_number(work.tally.megapixel_iterations_per_s), "Mpx·it/s", f"most megapixel-iterations, {work.load}"
    if first.tally.first_frame_s.count:
        yield format_number(first.tally.first_frame_s.quantile(0.5)), "s", f"to the first frame, median, {first.load}"
    yield format_number(first.tally.result_s.quantile(0.5)), "s", f"to the result, median, {first.load}"
    failed, ended = sum(step.tally.failed for step in report.steps), sum(step.tally.ended for step in report.steps)
    yield format_number(100 * failed / ended), "%", f"of {ended} jobs failed or were refused"


def _ratios(pair: Pair) -> Iterator[tuple[str, str, str]]:
    for metric in METRICS:
        ratio = pair.ratio(metric)
        if ratio is not None and metric.name in ("throughput", "work", "first frame p50", "result p50", "result p99"):
            yield f"{ratio:.2f}", "times", f"{metric.name}, {pair.before.load}"


def _tiles(values: Iterator[tuple[str, str, str]]) -> str:
    tiles = (
        f"<div><b>{escape(number)}</b> <span>{escape(unit)}</span><p>{escape(description)}</p></div>"
        for number, unit, description in values
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _about(report: Report) -> list[str]:
    return [f"Measured from {report.machine}, with the client {report.client}."]


def _step_table(report: Report) -> Iterator[str]:
    steps = report.steps
    yield '<div class="table"><table><thead><tr><th></th>'
    yield "".join(f"<th>{escape(str(step.load))}</th>" for step in steps) + "</tr></thead><tbody>"
    for metric in METRICS:
        cells = "".join(f"<td>{format_number(metric.value(step))}</td>" for step in steps)
        yield f"<tr><th>{_named(metric)}</th>{cells}</tr>"
    for status in sorted(report.statuses):
        cells = "".join(f"<td>{step.tally.statuses.get(status, 0)}</td>" for step in steps)
        yield f"<tr><th>{escape(status)}</th>{cells}</tr>"
    for word, loads in (("before", [s.server_before for s in steps]), ("after", [s.server_after for s in steps])):
        cells = "".join(f"<td>{'-' if load is None else f'{load[0]}, {load[1]}'}</td>" for load in loads)
        yield f"<tr><th>jobs at the server {word} <span>running, waiting</span></th>{cells}</tr>"
    kinds = sorted({kind for step in steps for kind in step.tally.by_kind})
    for kind in kinds if len(kinds) > 1 else ():
        medians = (step.tally.by_kind.get(kind, Histogram()).quantile(0.5) for step in steps)
        yield f"<tr><th>result p50 of {escape(kind)} <span>s</span></th>"
        yield "".join(f"<td>{format_number(median)}</td>" for median in medians) + "</tr>"
    yield "</tbody></table></div>"
    notes = [f"{step.load}: {note}" for step in steps for note in step.notes()]
    if notes:
        yield "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"
    yield "<details><summary>Settings and server</summary><pre>"
    yield escape(json.dumps({"settings": report.settings, "server": report.server}, indent=2)) + "</pre></details>"


def _pair_table(pair: Pair, names: tuple[str, str]) -> str:
    rows = []
    for metric in METRICS:
        ratio, before, after = pair.ratio(metric), metric.value(pair.before), metric.value(pair.after)
        verdict = ""
        if ratio is not None and metric.more_is_better is not None and not 0.95 < ratio < 1.05:
            verdict = ' class="better"' if (ratio > 1) == metric.more_is_better else ' class="worse"'
        text = "-" if ratio is None else f"{ratio:.2f}"
        cells = f"<td>{format_number(before)}</td><td>{format_number(after)}</td><td{verdict}>{text}</td>"
        rows.append(f"<tr><th>{_named(metric)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(word)}</th>" for word in (str(pair.before.load), *names, "ratio"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _named(metric: Metric) -> str:
    unit = f" <span>{escape(metric.unit)}</span>" if metric.unit else ""
    return escape(metric.name) + unit


def _page(title: str, about: Sequence[str], body: Sequence[str]) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><header><h1>{escape(title)}</h1>{lines}</header>{''.join(body)}</main></body></html>\n"
    )
