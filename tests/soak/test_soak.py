"""Runs the soak for a few seconds, and tests that it detects growth."""

import json
import random
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.soak import __main__ as soak
from tests.soak.users import ACTIONS
from tests.support import monitoring
from tests.support.monitoring import RuleViolation
from tests.support.trend import MAX_POINTS, chart, slope


def test_a_few_seconds_of_mixed_load_leave_nothing_behind(tmp_path, capsys):
    code = soak.main(["--minutes", "0.1", "--engine", "fake", "--seed", "1", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert code == 0, output
    assert re.search(
        r"^\| fake \| 0 \| \d+ \| \d+ \| [+-][\d.]+ \| \d+ / \d+ \| \d+ / \d+ \| \d+ / \d+ \| \d+ \|$",
        output,
        re.MULTILINE,
    )
    saved = json.loads((tmp_path / "soak-fake.json").read_text())
    assert saved["ends"] and saved["samples"] and saved["rests"]
    ElementTree.parse(tmp_path / "soak-fake.svg")


def test_every_action_is_documented():
    assert all(action.perform.__doc__ for action in ACTIONS.values())


def test_outliers_do_not_change_the_slope():
    rng = random.Random(1)
    line = [(x, 3.0 * x + rng.gauss(0, 1)) for x in range(100)]
    with_outliers = [(x, 1e6 if x % 5 == 0 else y) for x, y in line]
    assert slope(line) == pytest.approx(3, rel=0.01)
    assert slope(with_outliers) == pytest.approx(3, rel=0.05)
    assert slope([(x, -2.0 * x) for x in range(10 * MAX_POINTS)]) == -2
    assert slope([]) == slope([(1, 1)]) == 0


@pytest.mark.parametrize(
    ("mib_per_h", "minutes", "is_growth"),
    [
        *((1500, 20, True), (300, 20, False), (-300, 20, False), (5000, 1, False)),
        *((60, 120, True), (0, 120, False), (40, 240, True), (5, 240, False)),
    ],
)
def test_growth_of_memory_is_detected_in_its_noise(mib_per_h, minutes, is_growth, capsys):
    """752 MiB/h can be detected in the last ten of 20 minutes, and 24 is the limit."""
    max_mib_per_h = {20: 752, 120: 24, 240: 24}
    rng, run = random.Random(1), soak.Soak("fake", 1, Console(width=200))
    for minute in range(1, minutes + 1):
        filling = min(minute, 10) * 5  # of caches
        resident = 500 + filling + mib_per_h / 60 * minute + rng.gauss(0, 30)
        run.rests.append(soak.Rest(60 * minute, resident))
    if minutes == 1:
        run.check_memory()
        assert capsys.readouterr().out == "memory: not judged; this needs 5 minutes after the warm-up\n"
        return
    limit = rf"at most {max_mib_per_h[minutes]} are allowed"
    limit += "$" if minutes > 20 else ", the least that so short a run can detect$"
    if is_growth:
        with pytest.raises(RuleViolation, match=rf"^memory grows by \+[\d.]+ MiB/h in the last \d+ minutes; {limit}"):
            run.check_memory()
    else:
        run.check_memory()
        assert re.search(rf"^memory: [+-][\d.]+ MiB/h in the last \d+ minutes; {limit}", capsys.readouterr().out)


def test_a_failed_sample_ends_the_run_and_is_reported(monkeypatch, tmp_path, capsys):
    """Otherwise a run without samples would look like one that is too short."""
    scrape_metrics, urls = monitoring.scrape_metrics, []

    def fail_at_the_third_scrape(url):
        urls.append(url)
        if len(urls) > 2:
            raise RuleViolation(f"{url}: no metrics")
        return scrape_metrics(url)

    monkeypatch.setattr(soak, "scrape_metrics", fail_at_the_third_scrape)
    code = soak.main(["--minutes", "5", "--engine", "fake", "--seed", "1", "--out", str(tmp_path)])
    assert code == 1
    assert re.search(r"^failed: http://\S+/metrics: no metrics$", capsys.readouterr().out, re.MULTILINE)


def test_the_chart_is_a_standalone_svg():
    svg = ElementTree.fromstring(chart([(x / 60, 500.0) for x in range(2000)], "minutes", "MiB"))
    (line,) = [element for element in svg.iter() if element.tag.endswith("polyline")]
    assert len(line.attrib["points"].split()) <= MAX_POINTS
    assert any(element.tag == "{http://www.w3.org/2000/svg}style" for element in svg)
