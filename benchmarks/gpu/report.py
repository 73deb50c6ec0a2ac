"""The results of a GPU check as a part of RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import records
from benchmarks.gpu.goals import goals
from benchmarks.gpu.records import Results

if TYPE_CHECKING:
    from benchmarks.measure import Row

__all__ = ["NOT_YET", "placed", "section"]

NOT_YET = "No GPU has been measured yet.\n"  # in RESULTS.md until then
COMMAND = "make gpu-check"
SHOWN = 10  # kernels of each profile


def placed(text: str, name: str, part: str) -> str:
    """``text`` with ``part`` between the markers of ``name``, which are added at its end if it has none."""
    begin, end = f"<!-- gpu:begin {name} -->", f"<!-- gpu:end {name} -->"
    block = f"{begin}\n{part.strip()}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(text):
        return found.sub(lambda _: block, text)
    return text.replace(NOT_YET, "").rstrip() + f"\n\n{block}\n"


def section(results: Results, expected: Sequence[str]) -> str:
    """The results as Markdown: the machine, the goals, a table for each section that has rows, and which of the
    ``expected`` sections are missing."""
    rows: Sequence[Row] = results["rows"]
    parts = [_head(results), _goals(rows), _ceilings(rows), _iterations(rows), _style(rows), _convolutions(rows)]
    parts += [_jobs(rows), _memory(rows), _profile(results["facts"].get("profile", {})), _correct(rows)]
    parts += [_lessons(results), _missing(results, expected)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Results) -> str:
    m = results["machine"]
    known = [("compute capability", "compute_capability"), ("driver", "driver"), ("CUDA", "cuda"), ("cuDNN", "cudnn")]
    known += [("torch", "torch"), ("Python", "python")]
    facts = [f"{word} {m[key]}" for word, key in known if m.get(key)]
    facts.append(f"{m.get('date', 'no date')}. `{COMMAND}`")
    text = f"### {m.get('gpu', 'no GPU')}\n\n{', '.join(facts)}"
    if m.get("network"):
        text += f"\n\nThe network is {m['network']}."
    if results["runs"] and all(run["device"] != "cuda" for run in results["runs"]):
        text += "\n\n**A dry run on tiny pictures: its figures mean nothing.**"
    runs = [f"{', '.join(run['sections'])} ({run['started'][:16]} UTC)" for run in results["runs"]]
    if len(runs) > 1:
        text += "\n\nThese runs were put together: " + "; ".join(runs) + "."
    for line in results.get("differences", []):
        text += f"\n\nThey differ in {line}."
    return text


# Tables ---------------------------------------------------------------------------------------------------------------


def _goals(rows: Sequence[Row]) -> str:
    lines = []
    for goal in goals(rows) if rows else []:
        verdict = goal.verdict if goal.met or goal.measured is None else goal.verdict.replace("missed", "**missed**")
        lines.append([goal.what, goal.bound, _number(goal.measured), verdict])
    return _table("Goals", ["", "goal", "measured", ""], lines)


def _ceilings(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["section"].startswith("ceilings")]
    sections = list(dict.fromkeys(row["section"] for row in found))
    lines = []
    for (name, unit), group in _groups(found, "name", "unit"):
        rates = {row["section"]: f"{row['rate']:.4g} {unit}" for row in group}
        lines.append([name, *(rates.get(one, "") for one in sections)])
    about = "Each call has its own, because calls may run on different machines."
    return _table("Ceilings", ["", *sections], lines, about)


def _iterations(rows: Sequence[Row]) -> str:
    found = [*_of(rows, "iteration"), *_of(rows, "sizes")]
    found += [r for name in ("searching", "compile") for r in _of(rows, name) if not r["name"].startswith("eager")]
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
    keys = ("ms", "first_frame_ms", "throughput_vs_in_turn", "ratio_vs_engine")
    lines = [
        [where, row["name"], f"{row['size']} px", *(_number(row.get(key)) for key in keys)]
        for where, name in (("server", "service"), ("engine", "job"))
        for row in _of(rows, name)
    ]
    head = ["", "", "size", "ms", "first frame, ms", "throughput / in turn", "server / engine"]
    about = (
        "Cold, second and warm: the preset `fast` with up to ten JPEG frames a second; cold is the first of its shape. "
        "16 jobs: through the server single-scale jobs, by the engine `fast` in one batch."
    )
    return _table("Whole jobs", head, lines, about)


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
    found = [row for name in ("tests", "engine_tests") for row in _of(rows, name)]
    lines = [[r["name"], str(r["passed"]), str(r["skipped"]), str(r["failed"]), _number(r["seconds"])] for r in found]
    tests = _table("Tests on the GPU", ["", "passed", "skipped", "failed", "s"], lines)
    checks = [f"compute-sanitizer {row['name']}: {row['found']} found." for row in _of(rows, "sanitizer")]
    for row in _of(rows, "self_test"):
        fallen = ", ".join(row["by_library"]) or "none"
        checks.append(
            f"Self-test in {row['name']}: {row['ms']:.0f} ms; ops that run through torch's library: {fallen}."
        )
    return "\n\n".join(part for part in (tests, *checks) if part)


def _lessons(results: Results) -> str:
    """The table that the section of the switches has written: this module must not import torch, which takes seconds of
    the time limit."""
    text = results["facts"].get("switches", {}).get("lessons")
    return f"#### Table of lessons\n\n{text}" if text else ""


def _missing(results: Results, expected: Sequence[str]) -> str:
    lines = [f"- Failed: {f['section']}, {f['what']}: {f['why']}" for f in results["failed"]]
    lines += [f"- Left out: {f['section']}, {f['what']}: {f['why']}" for f in results["left_out"]]
    absent = records.absent(results, expected)
    lines += [f"- {'Cut off' if name in results['sections'] else 'Missing'}: {name}" for name in absent]
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
