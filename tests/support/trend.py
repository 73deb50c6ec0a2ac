"""Detects growth: the slope of a line through samples that a few outliers do not change, and a chart of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from gramophone_client.bench.html.charts import Axis, Series, line_chart
from gramophone_client.bench.html.stylesheet import STYLE

MAX_POINTS = 400  # these have 80,000 pairs; longer series are thinned out evenly


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """The slope in units of y per unit of x; 0 for fewer than two points.

    It is the median of the slopes between all pairs of points (the Theil-Sen estimator), which is robust against up to
    29 % of outliers.
    """
    step = -(-len(samples) // MAX_POINTS)
    points = samples[:: max(1, step)]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2]
    return median(slopes) if slopes else 0.0


def chart(points: Sequence[tuple[float, float]], x: str, y: str) -> str:
    """A standalone SVG file of the points; `x` and `y` are the titles of the axes."""
    step = max(1, -(-len(points) // MAX_POINTS))
    drawn = line_chart(Axis(x), Axis(y), [Series(y, "c0", points[::step], has_dots=False)])
    title = f'<text class="label" x="56" y="12">{y}</text>'
    opened = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="960" height="480" ', 1)
    return opened.replace(">", f"><style>{STYLE}</style>", 1).replace("</svg>", f"{title}</svg>")
