"""Reports of `gramophone bench` for tests, and a parser of its HTML page."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from typing import Any

from gramophone_client.bench.arrivals import ClosedLoop, LoadProfile
from gramophone_client.bench.measure import OK, Sample, Tally
from gramophone_client.bench.report import Report, Step, Window


def make_sample(ended_s: float, seconds: float = 1.0, status: str = OK, **fields: Any) -> Sample:
    """A job that was due `seconds` before it ended at `ended_s`."""
    return Sample("fast", ended_s - seconds, ended_s=ended_s, status=status, **fields)


def make_step(
    load: LoadProfile = ClosedLoop(1),  # noqa: B008  (frozen)
    results: Sequence[float] = (1.0, 2.0, 3.0),
    refusals: int = 0,
    **fields: Any,
) -> Step:
    """A step of 10 s with these latencies of successful jobs in seconds, and this number of refused jobs."""
    tally = Tally(seconds=10.0, due=len(results) + refusals)
    for seconds in results:
        sample = make_sample(5.0, seconds, megapixel_iterations=2.0)
        sample.frame(5.0 - seconds / 2, 1000, dropped=0)
        sample.frame(5.0 - seconds / 4, 1000, dropped=1)
        tally.add(sample)
    for _ in range(refusals):
        tally.add(make_sample(5.0, 0.002, "QUEUE_FULL"))
    defaults: dict[str, Any] = {
        "ending": "stable",
        "is_warm": True,
        "began_s": 0.0,
        "windows": (Window(3.0, 3, 2.0),),
        "tally": tally,
        "unfinished": 1,
        "oldest_unfinished_s": 0.5,
        "late_s": 0.01,
        "client_cpu": 0.25,
        "server_before": (0, 0),
        "server_after": None,
        "timeline": (Counter({OK: 2}), Counter({OK: 1, "QUEUE_FULL": 3}), Counter()),
    }
    return Step(load=load, **defaults | fields)


def make_report(*steps: Step, **fields: Any) -> Report:
    """A report of these steps, or of one ordinary step."""
    server = {"version": "1.2.3", "device": "cpu (<test> & more)", "precision": "fp32", "backbone": "vgg19"}
    defaults: dict[str, Any] = {
        "began": "2026-01-01T00:00:00+00:00",
        "client": "1.2.3",
        "machine": "Linux",
        "settings": {"seed": 0},
    }
    return Report(server=server, steps=steps or (make_step(),), **defaults | fields)


def parse_page(html: str) -> ET.Element:
    """Parses the page, which is also XML, and asserts that it refers to no other resource."""
    assert html.startswith("<!DOCTYPE html>\n")
    for reference in ("http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert reference not in html.replace("&lt;", "")
    return ET.fromstring(html.split("\n", 1)[1])
