"""Whether something grows: a line through samples that a few outliers do not turn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from gramophone_client.bench.html.charts import Axis, Series, line_chart
from gramophone_client.bench.html.stylesheet import STYLE

MOST_POINTS = 400  # whose pairs are 80,000; more are thinned out, evenly


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Units of y for one of x: the median of the slopes of all pairs of points (Theil and Sen's estimator), which up to
    29 % of outliers do not move far. 0 for fewer than two points."""
    step = -(-len(samples) // MOST_POINTS)
    points = samples[:: max(1, step)]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2]
    return median(slopes) if slopes else 0.0


def chart(points: Sequence[tuple[float, float]], x: str, y: str) -> str:
    """An SVG file of them, that stands for itself."""
    step = max(1, -(-len(points) // MOST_POINTS))
    drawn = line_chart(Axis(x), Axis(y), [Series(y, "c0", points[::step], has_dots=False)])
    title = f'<text class="label" x="56" y="12">{y}</text>'
    opened = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="960" height="480" ', 1)
    return opened.replace(">", f"><style>{STYLE}</style>", 1).replace("</svg>", f"{title}</svg>")
