"""Line charts and stacked bar charts as SVG. Colours are CSS classes, for light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from gramophone_client.bench.html.stylesheet import CHART_STYLE
from gramophone_client.bench.metrics import format_number

__all__ = ["Axis", "Bar", "Panel", "Series", "bar_chart", "line_chart", "sheet"]

# All sizes are in pixels.
LINE_WIDTH, BAR_WIDTH, HEIGHT = 640, 1240, 320  # of line charts, of bar charts, of both
LEFT, RIGHT, TOP, BOTTOM = 56, 26, 14, 44  # margins of a chart, with room for the labels of its axes
SHEET_HEADER = 40  # height of a sheet's title
PANEL_HEADER = 50  # height of a panel's title and legend
LETTER_WIDTH = 6.3  # average, at a font size of 12 px


@dataclass(frozen=True)
class Series:
    """A line: its name, the CSS class of its colour, and its points, ordered by x."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False
    has_dots: bool = True


@dataclass(frozen=True)
class Axis:
    """The title of an axis and its ticks, as (value, label). Without ticks, round numbers from 0 are used."""

    title: str
    ticks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Bar:
    """A stacked bar from `x` to `x` + `width`; `parts` has the height of each part by its name."""

    x: float
    width: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Panel:
    """One chart of a sheet, with the series of its legend."""

    title: str
    legend: Sequence[Series]
    chart: str  # SVG from `line_chart`


def sheet(title: str, panels: Sequence[Panel]) -> str:
    """A standalone SVG file with line charts side by side. It supports light and dark mode."""
    width, height = LINE_WIDTH * len(panels), SHEET_HEADER + PANEL_HEADER + HEIGHT
    drawn = [f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>']
    for i, panel in enumerate(panels):
        left = LINE_WIDTH * i
        drawn.append(f'<text class="caption" x="{left + LEFT}" y="{SHEET_HEADER + 20}">{escape(panel.title)}</text>')
        x = float(left + LEFT)
        for line in panel.legend:
            dashes = ' stroke-dasharray="6 5"' if line.is_dashed else ""
            y = SHEET_HEADER + 36
            drawn.append(f'<path class="line {line.colour}" d="M{x:.1f} {y}h16"{dashes}/>')
            drawn.append(f'<text class="label" x="{x + 22:.1f}" y="{y + 4}">{escape(line.name)}</text>')
            x += 22 + LETTER_WIDTH * len(line.name) + 20
        frame = f'x="{left}" y="{SHEET_HEADER + PANEL_HEADER}" width="{LINE_WIDTH}" height="{HEIGHT}"'
        drawn.append(panel.chart.replace("<svg ", f"<svg {frame} ", 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(title)}"><style>{CHART_STYLE}</style>'
        f'<rect class="sheet" width="{width}" height="{height}" rx="10"/>{"".join(drawn)}</svg>\n'
    )


def line_chart(x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Lines with a dot and a tooltip for every point. The y axis starts at 0."""
    points = [point for line in series for point in line.points]
    if not points:
        return _empty()
    frame = _Frame.around([px for px, _ in points], [py for _, py in points], x, y)
    drawn = list(frame.axes(x, y))
    for line in series:
        if not line.points:
            continue
        path = " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in line.points)
        dashes = ' stroke-dasharray="6 5"' if line.is_dashed else ""
        drawn.append(f'<polyline class="line {line.colour}" points="{path}"{dashes}/>')
        for px, py in line.points if line.has_dots else ():
            tip = escape(f"{line.name}: {format_number(py)} at {frame.label(px, x)}")
            centre = f'cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}"'
            # A small dot is hard to hit with the pointer, so a larger invisible one above it has the tooltip.
            drawn.append(f'<circle class="dot {line.colour}" {centre} r="5"/>')
            drawn.append(f'<circle class="target" {centre} r="12"><title>{tip}</title></circle>')
    return _svg(drawn, frame.width, y.title)


def bar_chart(
    x: Axis, y: Axis, bars: Sequence[Bar], colours: Mapping[str, str], marks: Sequence[tuple[float, str]]
) -> str:
    """Stacked bars whose parts are in the order of `colours`; `marks` are vertical lines, as (x, label)."""
    if not bars:
        return _empty()
    ends = [end for bar in bars for end in (bar.x, bar.x + bar.width)]
    heights = [sum(bar.parts.values()) for bar in bars]
    frame = _Frame.around(ends, heights, x, y, BAR_WIDTH)
    drawn = list(frame.axes(x, y))
    for bar in bars:
        base = 0.0
        for name, colour in colours.items():
            if height := bar.parts.get(name, 0.0):
                left, right = frame.x(bar.x), frame.x(bar.x + bar.width)
                top, bottom = frame.y(base + height), frame.y(base)
                gap = 1 if right - left > 3 else 0  # between adjacent bars
                tip = escape(f"{name}: {format_number(height)} at {format_number(bar.x)}")
                drawn.append(
                    f'<rect class="{colour}" x="{left:.1f}" y="{top:.1f}" width="{right - left - gap:.1f}" '
                    f'height="{bottom - top:.1f}"><title>{tip}</title></rect>'
                )
                base += height
    for value, label in marks:
        left = frame.x(value)
        drawn.append(f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text class="label" x="{left + 4:.1f}" y="{TOP + 10}">{escape(label)}</text>')
    return _svg(drawn, frame.width, y.title)


@dataclass(frozen=True)
class _Frame:
    """The coordinate system of a chart: maps values to pixels."""

    width: int
    x_low: float
    x_high: float
    y_high: float
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, width: int = LINE_WIDTH) -> _Frame:
        """A frame that holds all values and all ticks."""
        x_ticks = x.ticks or [(tick, format_number(tick)) for tick in _round_numbers(max(xs))]
        y_ticks = y.ticks or [(tick, format_number(tick)) for tick in _round_numbers(max(ys))]
        xs, y_high = [*xs, *(tick for tick, _ in x_ticks)], max(*ys, *(tick for tick, _ in y_ticks))
        low, high = min(xs), max(xs)
        if low == high:  # a single point is centred
            low, high = low - 1, high + 1
        return cls(width, low, high, y_high or 1.0, x_ticks, y_ticks)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.y_high * (HEIGHT - TOP - BOTTOM)

    def label(self, value: float, x: Axis) -> str:
        """The label of the tick at this value, or the number itself."""
        return next((label for tick, label in x.ticks if tick == value), format_number(value))

    def axes(self, x: Axis, y: Axis) -> Iterator[str]:
        bottom = HEIGHT - BOTTOM
        for value, label in self.y_ticks:
            height = self.y(value)
            yield f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            yield f'<text class="label end" x="{LEFT - 8}" y="{height + 4:.1f}">{escape(label)}</text>'
        for value, label in self.x_ticks:
            yield f'<text class="label middle" x="{self.x(value):.1f}" y="{bottom + 18}">{escape(label)}</text>'
        yield f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        middle = (LEFT + self.width - RIGHT) / 2
        yield f'<text class="label middle" x="{middle}" y="{HEIGHT - 6}">{escape(x.title)}</text>'


def _round_numbers(high: float) -> list[float]:
    """Four to six ticks from 0 to `high` or just above it, in steps of 1, 2 or 5 times a power of ten."""
    if not high > 0:
        return [0.0, 1.0]
    power = 10 ** math.floor(math.log10(high / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= high * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(high / step - 1e-9) + 1)]


def _svg(drawn: Sequence[str], width: int, title: str) -> str:
    parts = "".join(drawn)
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">{parts}</svg>'


def _empty() -> str:
    return '<p class="quiet">Nothing was measured.</p>'
