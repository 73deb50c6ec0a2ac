"""A few seconds of the soak, and that it finds what grows."""

import json
import random
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.chaos import watch
from tests.chaos.watch import Broken
from tests.soak import __main__ as soak
from tests.soak.load import HABITS
from tests.soak.trend import MOST_POINTS, chart, slope


def test_some_seconds_of_everything_leave_nothing_behind(tmp_path, capsys):
    code = soak.main(["--minutes", "0.1", "--engine", "fake", "--seed", "1", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert code == 0, told
    assert re.search(
        r"^\| fake \| 0 \| \d+ \| \d+ \| [+-][\d.]+ \| \d+ / \d+ \| \d+ / \d+ \| \d+ / \d+ \| \d+ \|$",
        told,
        re.MULTILINE,
    )
    saved = json.loads((tmp_path / "soak-fake.json").read_text())
    assert saved["ends"] and saved["samples"]
    ElementTree.parse(tmp_path / "soak-fake.svg")


def test_every_habit_says_what_it_is():
    assert all(habit.act.__doc__ for habit in HABITS.values())


def test_a_slope_is_of_the_line_and_not_of_the_outliers():
    chance = random.Random(1)
    line = [(x, 3.0 * x + chance.gauss(0, 1)) for x in range(100)]
    wild = [(x, 1e6 if x % 5 == 0 else y) for x, y in line]
    assert slope(line) == pytest.approx(3, rel=0.01)
    assert slope(wild) == pytest.approx(3, rel=0.05)
    assert slope([(x, -2.0 * x) for x in range(10 * MOST_POINTS)]) == -2
    assert slope([]) == slope([(1, 1)]) == 0


@pytest.mark.parametrize(
    ("mib_per_h", "minutes", "is_broken"),
    [
        *((100, 20, True), (42, 20, True), (30, 20, False), (20, 20, False), (-100, 20, False)),
        *((40, 12, False), (80, 12, True), (1000, 1, False)),
        *((30, 26, True), (18, 26, False), (30, 60, True), (18, 60, False)),
    ],
)
def test_memory_that_grows_is_found_in_its_noise(mib_per_h, minutes, is_broken, capsys):
    """36 MiB an hour can be told in the second ten of 20 minutes, 60 in the second six of 12, and 24 is the rule."""
    told_per_h = {12: 60, 20: 36, 26: 24, 60: 24}
    chance, found = random.Random(1), soak.Soak("fake", 1, Console(width=200))
    for second in range(60 * minutes):
        filling = min(second, 15 * minutes) / minutes  # caches, which are full after a quarter of the time
        resident = 500 + filling + mib_per_h / 3600 * second + chance.gauss(0, 2)
        found.samples.append(soak.Sample(second, resident, 16, 17, 17, 5))
    if minutes == 1:
        found.check_memory()
        assert capsys.readouterr().out == "too short to judge memory: that takes 5 minutes after the warm-up\n"
        return
    limit = rf"at most {told_per_h[minutes]} are allowed{'' if minutes > 20 else ', as so short a time tells no less'}$"
    if is_broken:
        with pytest.raises(Broken, match=rf"^memory grows by \+[\d.]+ MiB an hour in the last \d+ minutes; {limit}"):
            found.check_memory()
    else:
        found.check_memory()
        assert re.search(rf"^memory: [+-][\d.]+ MiB an hour in the last \d+ minutes; {limit}", capsys.readouterr().out)


def test_a_sample_that_fails_ends_the_run_and_is_told(monkeypatch, tmp_path, capsys):
    """Or a run without samples would be one that is too short."""
    scraped, asked = watch.scraped, []

    def soon_gone(url):
        asked.append(url)
        if len(asked) > 2:
            raise Broken(f"{url}: gone")
        return scraped(url)

    monkeypatch.setattr(soak, "scraped", soon_gone)
    code = soak.main(["--minutes", "5", "--engine", "fake", "--seed", "1", "--out", str(tmp_path)])
    assert code == 1
    assert re.search(r"^broken: http://\S+/metrics: gone$", capsys.readouterr().out, re.MULTILINE)


def test_the_chart_is_a_picture_by_itself():
    svg = ElementTree.fromstring(chart([(x / 60, 500.0) for x in range(2000)], "minutes", "MiB"))
    (line,) = [element for element in svg.iter() if element.tag.endswith("polyline")]
    assert len(line.attrib["points"].split()) <= MOST_POINTS
    assert any(element.tag == "{http://www.w3.org/2000/svg}style" for element in svg)
