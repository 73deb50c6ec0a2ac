"""The table of lessons: what each switch was predicted to gain, what it gained, and what follows.

python -m benchmarks.gpu.lessons    # writes the table without measurements into benchmarks/RESULTS.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.predictions import ALONE, FRAME_EVERY, SWITCHES, WIDTHS, frame_ratio, largest_gain

if TYPE_CHECKING:
    from benchmarks.measure import Row

__all__ = ["SECTION", "placed", "table", "verdict"]

RESULTS = Path(__file__).parent.parent / "RESULTS.md"
SECTION = "switches"  # of the rows
BEGIN, END = "<!-- lessons:begin -->", "<!-- lessons:end -->"
# Ratios closer to 1 than this are no difference: two measurements of the same code differ by as much.
NOISE = 0.01
ABOUT = """\
Each value is the time of an iteration divided by that with the defaults: below 1, the switch is faster. Predictions are
computed in `benchmarks/gpu/predictions.py`, from bytes, operations and launches; `benchmarks/gpu/switches.py`
measures."""
MISTAKE = 0.03  # a prediction that is this far off is worth a sentence


def table(rows: Sequence[Row]) -> str:
    """The table as Markdown. ``rows`` of a GPU check; without those of its section `SECTION`, nothing was measured."""
    found = [row for row in rows if row["section"] == SECTION]
    lines = [
        ABOUT,
        "",
        "| switch | why | predicted | measured | verdict |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in _lines(found)),
    ]
    return "\n".join(lines) + "\n"


def _lines(found: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for size, widths in WIDTHS.items():
        predicted = [(f"{width} jobs", ratio) for width, ratio in widths.items()]
        measured = [
            (f"{r['batch']} jobs", r["ratio"]) for r in found if (r["name"], r["size"]) == ("batch width", size)
        ]
        why = "Small layers do not fill the GPU with one job. Per job, over one job alone."
        what = "the scheduler measures widths itself" if measured else verdict([], [])
        yield f"batch width, {size} px", why, _cell(predicted), _cell(measured), what
    for switch in sorted(SWITCHES, key=largest_gain):
        mine = [row for row in found if row["name"] == switch.name]
        predicted = [(_case(*case), switch.predicted(case)) for case in switch.cases]
        measured = [(_case(row["size"], row["batch"]), row["ratio"]) for row in mine]
        by_case = dict(predicted)
        judged = verdict([r for _, r in measured], [by_case[c] for c, _ in measured if c in by_case], _fault(mine))
        yield (
            f"{switch.name}{', same bits' * switch.same_bits}",
            switch.reasoning,
            _cell(predicted),
            _cell(measured),
            judged,
        )
    mine = [row for row in found if row["name"] == "frames"]
    predicted = [(_case(*case), frame_ratio(case[0])) for case in ALONE]
    measured = [(_case(row["size"], 1), row["ratio"]) for row in mine]
    why = f"A frame after every {FRAME_EVERY} iterations, over none: three launches and 63 bytes per pixel."
    yield "frames", why, _cell(predicted), _cell(measured), "the cost of frames" if mine else verdict([], [])


def verdict(measured: Sequence[float], predicted: Sequence[float], fault: str = "") -> str:
    """What follows from the measured ratios: whether the default changes, and how far the predictions were off."""
    if not measured:
        return "not measured"
    mean = _mean(measured)
    if fault:
        what = f"leave it: {fault}"
    elif mean < 1 - NOISE and max(measured) < 1 + NOISE:
        what = "**flip the default**"
    elif mean < 1 - NOISE:
        what = "flip it for the sizes that gain"
    else:
        what = "leave it: slower" if mean > 1 + NOISE else "leave it: no difference"
    if len(predicted) != len(measured):  # a dry run has other sizes
        return what
    off = mean / _mean(predicted) - 1
    return f"{what}; predicted {abs(off):.0%} too {'fast' if off > 0 else 'slow'}" if abs(off) > MISTAKE else what


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _fault(rows: Sequence[Row]) -> str:
    return next((row["fault"] for row in rows if row["fault"]), "")


def _case(size: int, batch: int) -> str:
    return f"{size} px" if batch == 1 else f"{size} px x {batch}"


def _cell(ratios: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{case}: {ratio:.3f}" for case, ratio in ratios)


def placed(text: str, lessons: str) -> str:
    """``text`` of RESULTS.md with the table between its markers. Raises `ValueError` if it has none."""
    found = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not found.search(text):
        raise ValueError(f"there is no place for the table of lessons: add {BEGIN} and {END}")
    return found.sub(lambda _: f"{BEGIN}\n{lessons.strip()}\n{END}", text)


if __name__ == "__main__":
    RESULTS.write_text(placed(RESULTS.read_text(), table([])))
