"""CHANGELOG.md: its releases, their versions and dates."""

from __future__ import annotations

import re
from datetime import date
from itertools import pairwise
from typing import NamedTuple


class Release(NamedTuple):
    """A heading such as "## [0.1.0] - 2026-11-23"."""

    version: str
    date: str  # empty if it has none


def released(text: str) -> list[Release]:
    """The releases in the order of the file. Exits with a message if there is none."""
    found = re.findall(r"^## \[(\d+\.\d+\.\d+)\](?: - (.*))?$", text, re.MULTILINE)
    if not found:
        raise SystemExit("release_check: CHANGELOG.md has no release, a heading such as '## [0.1.0] - 2026-11-23'")
    return [Release(*each) for each in found]


def unreleased(text: str) -> int:
    """The number of entries below the heading [Unreleased]."""
    section = re.search(r"^## \[Unreleased\]$(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return len(re.findall(r"^- ", section[1], re.MULTILINE)) if section else 0


def problems(text: str, today: date) -> list[str]:
    """What is wrong with the headings."""
    found = []
    for heading in re.findall(r"^## .*$", text, re.MULTILINE):
        if not re.fullmatch(r"## \[(Unreleased|\d+\.\d+\.\d+)\]( - .*)?", heading):
            found.append(f"'{heading}' is neither '## [Unreleased]' nor like '## [0.1.0] - 2026-11-23'")
    dated = []
    for release in released(text):
        try:
            day = date.fromisoformat(release.date)
        except ValueError:
            found.append(f"release {release.version} needs a date such as 2026-11-23, got '{release.date}'")
            continue
        if day > today:
            found.append(f"release {release.version} is dated {day}, and today is {today}")
        dated.append((tuple(map(int, release.version.split("."))), day, release.version))
    for (number, day, name), (older_number, older_day, older_name) in pairwise(dated):
        if number <= older_number or day < older_day:
            found.append(f"release {name} of {day} is above {older_name} of {older_day}; the newest must be first")
    return found
