"""The goals of the GPU check and whether the measurements meet them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmarks.measure import Row

__all__ = ["Goal", "goals"]

SIZES = {256: "sizes", 512: "iteration", 1024: "iteration", 2048: "sizes"}  # sides in pixels, and the section of each
WHOLE_JOBS = ("fast, 512 px", "quality, 1024 px")  # rows of the section `service`


class Goal(NamedTuple):
    """A goal and its measurement."""

    section: str  # that measures it
    what: str
    wanted: float
    at_most: bool  # `wanted` is an upper bound, else a lower one
    measured: float | None  # None: not measured

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    @property
    def bound(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.wanted:.3g}"

    @property
    def verdict(self) -> str:
        """ "met", "missed by 1.20 times", or "not measured"."""
        if self.measured is None:
            return "not measured"
        factor = self.measured / self.wanted if self.at_most else self.wanted / max(self.measured, 1e-9)
        return "met" if self.met else f"missed by {factor:.2f} times"

    def __str__(self) -> str:
        measured = "" if self.measured is None else f"{self.measured:.3g}, "
        return f"{self.verdict}: {self.what}: {measured}{self.bound}"


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All goals. Those of an iteration are for our engine in float16, with graphs and Adam."""
    return [*_iteration(rows), *_style(rows), *_service(rows), *_memory(rows)]


def _iteration(rows: Sequence[Row]) -> Iterator[Goal]:
    for size, section in SIZES.items():
        row = _first(rows, section, name="ours fp16", size=size, batch=1)
        yield Goal(section, f"{size} px: ours / eager fp32", 1 / 4, True, row.get("ratio_vs_eager"))
        sixteen = 1 / 3 if size == 256 else 1 / 1.6
        yield Goal(section, f"{size} px: ours / eager 16-bit channels_last", sixteen, True, row.get("ratio_vs_eager16"))
        if size >= 512:
            yield Goal(section, f"{size} px: ours / FLOP floor", 1.8, True, row.get("ratio_vs_floor"))


def _style(rows: Sequence[Row]) -> Iterator[Goal]:
    row = _first(rows, "style", name="ours graph", layer="all five", size=512)
    yield Goal("style", "style op, 512 px: torch / ours", 4, False, _inverse(row.get("ratio_vs_eager")))
    yield Goal("style", "style op, 512 px: the same, both as graphs", 4, False, _inverse(row.get("ratio_vs_graph")))


def _service(rows: Sequence[Row]) -> Iterator[Goal]:
    warm = _first(rows, "service", name="warm", size=512)
    yield Goal("service", "`fast` at 512 px through the server, warm: ms", 1000, True, warm.get("ms"))
    yield Goal("service", "its first frame: ms", 150, True, warm.get("first_frame_ms"))
    for name in WHOLE_JOBS:
        row = _first(rows, "service", name=name)
        yield Goal("service", f"{name}: through the server / in process", 1.03, True, row.get("ratio_vs_engine"))
    crowd = _first(rows, "service", name="16 jobs together", size=256)
    what = "16 jobs of 256 px through the server: throughput together / in turn"
    yield Goal("service", what, 1.8, False, crowd.get("throughput_vs_in_turn"))


def _memory(rows: Sequence[Row]) -> Iterator[Goal]:
    """One goal for all shapes: the one whose estimate is the worst."""
    found = [row for row in rows if row["section"] == "memory" and row.get("ratio")]
    worst = max(found, key=lambda row: _factor(row["ratio"]), default=None)
    at = f" (the worst of {len(found)}: {worst['size']} px x {worst['batch']})" if worst else ""
    measured = _factor(worst["ratio"]) if worst else None
    yield Goal("memory", f"memory: factor between peak and estimate{at}", 1.1, True, measured)


def _factor(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def _first(rows: Iterable[Row], section: str, **wanted: object) -> Row:
    """The first row of a section with these values, empty if there is none."""
    for row in rows:
        if row["section"] == section and all(row.get(key) == value for key, value in wanted.items()):
            return row
    return {}
