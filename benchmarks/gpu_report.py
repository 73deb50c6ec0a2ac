"""The results of a GPU check as a part of RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.measure import Row

__all__ = ["NOT_YET", "placed", "section"]

NOT_YET = "No GPU has been measured yet.\n"  # in RESULTS.md until then
COMMAND = "make gpu-check"
SHOWN = 10  # kernels of each profile


class Goal(NamedTuple):
    """A goal of the design, and its measurement."""

    what: str
    wanted: float
    at_most: bool  # `wanted` is an upper bound, else a lower one
    measured: float

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    @property
    def bound(self) -> str:
        return "at most" if self.at_most else "at least"

    @property
    def missed_by(self) -> float:
        """The factor by which the measurement is too large or too small."""
        return self.measured / self.wanted if self.at_most else self.wanted / self.measured


def placed(text: str, name: str, part: str) -> str:
    """``text`` with ``part`` between the markers of ``name``, which are added at its end if it has none."""
    begin, end = f"<!-- gpu:begin {name} -->", f"<!-- gpu:end {name} -->"
    block = f"{begin}\n{part.strip()}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(text):
        return found.sub(lambda _: block, text)
    return text.replace(NOT_YET, "").rstrip() + f"\n\n{block}\n"


def section(results: Mapping[str, Any]) -> str:
    """The results as Markdown: the machine, the goals, and a table for each section that has rows."""
    rows: Sequence[Row] = results["rows"]
    parts = [_head(results), _goals(goals(rows)), _ceilings(rows), _iterations(rows), _style(rows), _convolutions(rows)]
    parts += [_jobs(rows), _memory(rows), _profile(results["profile"]), _correct(rows), _missing(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    known = [("compute capability", "compute_capability"), ("driver", "driver"), ("CUDA", "cuda"), ("cuDNN", "cudnn")]
    known += [("torch", "torch"), ("Python", "python")]
    facts = [f"{word} {m[key]}" for word, key in known if m.get(key)]
    facts.append(f"{m.get('date', 'no date')}. `{COMMAND}`")
    text = f"### {m.get('gpu', 'no GPU')}\n\n{', '.join(facts)}"
    network = m.get("network")
    return f"{text}\n\nThe network is {network}." if network else text


# Goals ----------------------------------------------------------------------------------------------------------------


def goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """The goals that were measured, with our engine in float16, with graphs and Adam."""
    for row in _of(rows, "iteration", name="ours fp16", batch=1):
        at = f"{row['size']} px"
        yield Goal(f"{at}: ours / eager fp32", 1 / 4, True, row["ratio_vs_eager"])
        sixteen = 1 / 3 if row["size"] <= 256 else 1 / 1.6
        yield Goal(f"{at}: ours / eager 16-bit channels_last", sixteen, True, row["ratio_vs_eager16"])
        if row["size"] >= 512 and row["ratio_vs_floor"] is not None:
            yield Goal(f"{at}: ours / FLOP floor", 1.8, True, row["ratio_vs_floor"])
    for row in _of(rows, "style", name="ours graph", layer="all five", size=512):
        yield Goal("style op, 512 px: torch / ours", 4, False, 1 / row["ratio_vs_eager"])
        yield Goal("the same, both as graphs", 4, False, 1 / row["ratio_vs_graph"])
    for row in _of(rows, "job", name="16 jobs together"):
        what = f"16 jobs of {row['size']} px: throughput together / in turn"
        yield Goal(what, 1.8, False, row["throughput_vs_in_turn"])


def _goals(all_goals: Iterable[Goal]) -> str:
    lines = []
    for goal in all_goals:
        how = "met" if goal.met else f"**missed** by {goal.missed_by:.2f} times"
        lines.append([goal.what, f"{goal.bound} {goal.wanted:.3g}", f"{goal.measured:.3g}", how])
    return _table("Goals", ["", "goal", "measured", ""], lines)


# Tables ---------------------------------------------------------------------------------------------------------------


def _ceilings(rows: Sequence[Row]) -> str:
    lines = [[row["name"], f"{row['rate']:.4g} {row['unit']}"] for row in _of(rows, "ceilings")]
    return _table("Ceilings", ["", "measured"], lines)


def _iterations(rows: Sequence[Row]) -> str:
    found = [*_of(rows, "iteration"), *(r for r in _of(rows, "compile") if r["name"].startswith("torch.compile"))]
    found.sort(key=lambda row: (row["batch"], row["size"]))
    keys = ("ms", "ms_per_job", "ratio_vs_eager", "ratio_vs_eager16", "ratio_vs_floor")
    lines = [[f"{r['size']} px x {r['batch']}", r["name"], *(_number(r.get(key)) for key in keys)] for r in found]
    head = ["pictures", "", "ms", "ms / picture", "/ eager fp32", "/ eager 16-bit", "/ FLOP floor"]
    about = "Adam's step included. The floor is the convolutions' arithmetic at the measured fp16 matrix rate."
    return _table("One iteration", head, lines, about)


def _style(rows: Sequence[Row]) -> str:
    found = list(_of(rows, "style"))
    ways = list(dict.fromkeys(row["name"] for row in found))
    lines = []
    for (size, layer), group in _groups(found, "size", "layer"):
        us = {row["name"]: row["ms"] * 1e3 for row in group}
        ratio = us["torch"] / us["ours graph"] if "ours graph" in us and "torch" in us else None
        lines.append([f"{size} px", layer, *(_number(us.get(way)) for way in ways), _number(ratio)])
    head = ["picture", "layer", *(f"{way}, us" for way in ways), "torch / ours graph"]
    about = "Loss, gradient, sum with the gradient of deeper layers, and the ReLU's backward; bfloat16 unless stated."
    return _table("The style op", head, lines, about)


def _convolutions(rows: Sequence[Row]) -> str:
    lines = []
    for (size, layer, way), group in _groups(_of(rows, "convolutions"), "size", "layer", "way"):
        group = sorted(group, key=lambda row: row["ms"])
        kernels = ", ".join(f"{row['name']} {row['ms'] * 1e3:.0f}" for row in group)
        lines.append([f"{size} px", f"conv {layer}", way, kernels, _number(group[0].get("ratio_vs_floor"))])
    head = ["picture", "", "", "us, fastest first", "fastest / FLOP floor"]
    return _table("Convolutions, kernel by kernel", head, lines)


def _jobs(rows: Sequence[Row]) -> str:
    lines = [
        [row["name"], f"{row['size']} px", _number(row["ms"]), _number(row.get("first_frame_ms")),
         _number(row.get("throughput_vs_in_turn"))]
        for row in _of(rows, "job")
    ]  # fmt: skip
    about = "The preset `fast` through the engine, with ten JPEG frames a second; cold is the first of its shape."
    return _table("Whole jobs", ["", "size", "ms", "first frame, ms", "throughput / in turn"], lines, about)


def _memory(rows: Sequence[Row]) -> str:
    keys = ("needed_mb", "starting_mb", "iterating_mb", "reserved_mb", "ratio")
    lines = [[f"{r['size']} px x {r['batch']}", *(_number(r.get(key)) for key in keys)] for r in _of(rows, "memory")]
    head = [
        "pictures",
        "estimate, MB",
        "peak of the start, MB",
        "peak after it, MB",
        "reserved, MB",
        "peak / estimate",
    ]
    return _table("Memory", head, lines)


def _profile(profile: Mapping[str, str]) -> str:
    parts = []
    for name, text in profile.items():
        parts.append(f"#### {name.capitalize()}, each kernel launched by itself\n\n```")
        parts += [*text.splitlines()[: SHOWN + 1], "```\n"]
    return "\n".join(parts).strip()


def _correct(rows: Sequence[Row]) -> str:
    lines = [[r["name"], str(r["passed"]), str(r["skipped"]), str(r["failed"])] for r in _of(rows, "tests")]
    tests = _table("Tests on the GPU", ["", "passed", "skipped", "failed"], lines)
    checks = [f"compute-sanitizer {row['name']}: {row['found']} found." for row in _of(rows, "sanitizer")]
    return "\n\n".join(part for part in (tests, *checks) if part)


def _missing(results: Mapping[str, Any]) -> str:
    lines = [f"- Failed: {f['section']}, {f['what']}: {f['why']}" for f in results["failed"]]
    lines += [f"- Left out: {f['section']}, {f['what']}: {f['why']}" for f in results["left_out"]]
    return "#### Not measured\n\n" + "\n".join(lines) if lines else ""


def _of(rows: Iterable[Row], section_name: str, **wanted: object) -> Iterator[Row]:
    for row in rows:
        if row["section"] == section_name and all(row.get(key) == value for key, value in wanted.items()):
            yield row


def _groups(rows: Iterable[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Rows grouped by their values of ``keys``, in the order of the first row of each group."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from found.items()


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], about: str = "") -> str:
    if not lines:
        return ""
    table = [head, ["---"] * len(head), *lines]
    about = f"\n\n{about}" if about else ""
    return f"#### {title}{about}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in table)
