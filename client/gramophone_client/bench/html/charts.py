"""Charts as SVG: lines, and bars on top of each other. Colours are classes, so that a page can follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from gramophone_client.bench.html.stylesheet import CHART_STYLE
from gramophone_client.bench.metrics import number

__all__ = ["Axis", "Bar", "Panel", "Series", "bar_chart", "line_chart", "sheet"]

WIDTH, WIDE, HEIGHT = 640, 1240, 320  # of lines, of bars, of both
LEFT, RIGHT, TOP, BOTTOM = 56, 26, 14, 44  # margins, with room for the axes' words
HEAD, PANEL_HEAD = 40, 50  # above the panels of a sheet: its title; above the chart of one: its title and its key
LETTER = 6.3  # wide, of 12 px, on the average


@dataclass(frozen=True)
class Series:
    """A line: its name, the class of its colour, and its points in the order of x."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False
    has_dots: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis says, and where its ticks are with their labels; without ticks they are round numbers from 0."""

    title: str
    ticks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Bar:
    """Parts on top of each other by name, from `x` to `x` + `width`."""

    x: float
    width: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Panel:
    """One chart of a sheet, and the lines that its key explains."""

    title: str
    key: Sequence[Series]
    chart: str  # of `line_chart`


def sheet(title: str, panels: Sequence[Panel]) -> str:
    """Charts of lines beside each other as an SVG file of its own, which follows light and dark where it is shown."""
    width, height = WIDTH * len(panels), HEAD + PANEL_HEAD + HEIGHT
    drawn = [f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>']
    for i, panel in enumerate(panels):
        left = WIDTH * i
        drawn.append(f'<text class="caption" x="{left + LEFT}" y="{HEAD + 20}">{escape(panel.title)}</text>')
        at = float(left + LEFT)
        for line in panel.key:
            dashes = ' stroke-dasharray="6 5"' if line.is_dashed else ""
            y = HEAD + 36
            drawn.append(f'<path class="line {line.colour}" d="M{at:.1f} {y}h16"{dashes}/>')
            drawn.append(f'<text class="word" x="{at + 22:.1f}" y="{y + 4}">{escape(line.name)}</text>')
            at += 22 + LETTER * len(line.name) + 20
        place = f'x="{left}" y="{HEAD + PANEL_HEAD}" width="{WIDTH}" height="{HEIGHT}"'
        drawn.append(panel.chart.replace("<svg ", f"<svg {place} ", 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(title)}"><style>{CHART_STYLE}</style>'
        f'<rect class="sheet" width="{width}" height="{height}" rx="10"/>{"".join(drawn)}</svg>\n'
    )


def line_chart(x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Lines with a dot and a tooltip for every point. `y` begins at 0."""
    points = [point for one in series for point in one.points]
    if not points:
        return _empty()
    frame = _Frame.around([px for px, _ in points], [py for _, py in points], x, y)
    drawn = list(frame.axes(x, y))
    for one in series:
        if not one.points:
            continue
        path = " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in one.points)
        dashes = ' stroke-dasharray="6 5"' if one.is_dashed else ""
        drawn.append(f'<polyline class="line {one.colour}" points="{path}"{dashes}/>')
        for px, py in one.points if one.has_dots else ():
            tip = escape(f"{one.name}: {number(py)} at {frame.label(px, x)}")
            where = f'cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}"'
            # A small dot is hard to meet with a pointer, so a larger one that cannot be seen lies above it.
            drawn.append(f'<circle class="dot {one.colour}" {where} r="5"/>')
            drawn.append(f'<circle class="target" {where} r="12"><title>{tip}</title></circle>')
    return _svg(drawn, frame.width, y.title)


def bar_chart(
    x: Axis, y: Axis, bars: Sequence[Bar], colours: Mapping[str, str], marks: Sequence[tuple[float, str]]
) -> str:
    """Stacked bars, in the order of `colours`; `marks` are upright lines with a word."""
    if not bars:
        return _empty()
    ends, heights = (
        [end for bar in bars for end in (bar.x, bar.x + bar.width)],
        [sum(bar.parts.values()) for bar in bars],
    )
    frame = _Frame.around(ends, heights, x, y, WIDE)
    drawn = list(frame.axes(x, y))
    for bar in bars:
        base = 0.0
        for name, colour in colours.items():
            if height := bar.parts.get(name, 0.0):
                left, right = frame.x(bar.x), frame.x(bar.x + bar.width)
                top, bottom = frame.y(base + height), frame.y(base)
                gap = 1 if right - left > 3 else 0  # between neighbours
                tip = escape(f"{name}: {number(height)} at {number(bar.x)}")
                drawn.append(
                    f'<rect class="{colour}" x="{left:.1f}" y="{top:.1f}" width="{right - left - gap:.1f}" '
                    f'height="{bottom - top:.1f}"><title>{tip}</title></rect>'
                )
                base += height
    for at, word in marks:
        left = frame.x(at)
        drawn.append(f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text class="word" x="{left + 4:.1f}" y="{TOP + 10}">{escape(word)}</text>')
    return _svg(drawn, frame.width, y.title)


@dataclass(frozen=True)
class _Frame:
    """From values to places in the picture."""

    width: int
    x_low: float
    x_high: float
    y_high: float
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis, width: int = WIDTH) -> _Frame:
        x_ticks = x.ticks or [(tick, number(tick)) for tick in _round_numbers(max(xs))]
        y_ticks = y.ticks or [(tick, number(tick)) for tick in _round_numbers(max(ys))]
        xs, y_high = [*xs, *(at for at, _ in x_ticks)], max(*ys, *(at for at, _ in y_ticks))
        low, high = min(xs), max(xs)
        if low == high:  # one point stands in the middle
            low, high = low - 1, high + 1
        return cls(width, low, high, y_high or 1.0, x_ticks, y_ticks)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.y_high * (HEIGHT - TOP - BOTTOM)

    def label(self, value: float, x: Axis) -> str:
        """What the axis says at this place, else the number."""
        return next((label for at, label in x.ticks if at == value), number(value))

    def axes(self, x: Axis, y: Axis) -> Iterator[str]:
        bottom = HEIGHT - BOTTOM
        for value, label in self.y_ticks:
            at = self.y(value)
            yield f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            yield f'<text class="word end" x="{LEFT - 8}" y="{at + 4:.1f}">{escape(label)}</text>'
        for value, label in self.x_ticks:
            yield f'<text class="word middle" x="{self.x(value):.1f}" y="{bottom + 18}">{escape(label)}</text>'
        yield f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        middle = (LEFT + self.width - RIGHT) / 2
        yield f'<text class="word middle" x="{middle}" y="{HEIGHT - 6}">{escape(x.title)}</text>'


def _round_numbers(high: float) -> list[float]:
    """0 and four to six multiples of 1, 2 or 5 times a power of ten, the last at or above `high`."""
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
