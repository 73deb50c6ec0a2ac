"""The report of a bench, and its JSON file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gramophone_client.bench.arrivals import ClosedLoop, LoadProfile, OpenLoop
from gramophone_client.bench.measure import LEFT, OK, Tally
from gramophone_client.bench.schema import REPORT, Value, check
from gramophone_client.types.picture import write_atomically

__all__ = ["InvalidReport", "Report", "Step", "Window", "read_report"]

FORMAT = 1  # version of the file format; incremented if an older reader would misread it

BUSY_CLIENT = 0.8  # cores; above this the client itself may be the bottleneck, because its Python uses one core
LATE_SHARE = 0.1  # of the median latency; jobs that are sent later than this are reported


class InvalidReport(Exception):
    """A file is not the report of a bench; the message names it."""


@dataclass(frozen=True)
class Window:
    """One of the spans of time whose measurements are compared."""

    seconds: float
    jobs: int  # with status OK
    p50_s: float  # median latency of these jobs


@dataclass(frozen=True, kw_only=True)
class Step:
    """The measurement of one load profile."""

    load: LoadProfile
    ending: str  # "stable", "time is up" or "interrupted"
    is_warm: bool  # False: the step ended during the warm-up, so its values are those of the warm-up
    began_s: float  # since the start of the bench
    windows: tuple[Window, ...]
    tally: Tally
    unfinished: int  # jobs in flight at the end of the step, which are in no latency
    oldest_unfinished_s: float
    late_s: float  # longest delay between the due time of a job and its sending
    client_cpu: float  # average number of cores that this process used
    server_before: tuple[int, int] | None  # (running, waiting) jobs; None if the server did not answer
    server_after: tuple[int, int] | None
    timeline: tuple[Mapping[str, int], ...]  # statuses in each second of the step

    def notes(self) -> list[str]:
        """Sentences about what limits the value of the measurement."""
        notes = []
        if not self.tally.ok and self.tally.ended:  # a longer step would not help
            since = " since the warm-up" if any(second.get(OK) for second in self.timeline) else ""
            notes.append(f"no job succeeded{since}: {', '.join(_outcomes(self.tally.statuses))}")
        elif not self.is_warm:
            advice = "; use a longer --duration" if self.ending == "time is up" else ""
            notes.append(f"the step ended during its warm-up, so the values are those of the warm-up{advice}")
        elif self.ending != "stable":
            p50s = " ".join(f"{window.p50_s:.3g}" for window in self.windows[-3:])
            medians = f" (medians of the last windows: {p50s} s)" if p50s else ""
            notes.append(f"{self.ending} before three windows agreed within 10 %{medians}")
        if self.oldest_unfinished_s > self.tally.result_s.max_s:  # the latencies lack the longest job
            notes.append(
                f"{self.unfinished} jobs had not ended when the step ended, the oldest after "
                f"{self.oldest_unfinished_s:.3g} s"
            )
        if self.client_cpu > BUSY_CLIENT:
            notes.append(f"this client used {self.client_cpu:.2g} cores and may have been the bottleneck")
        if isinstance(self.load, OpenLoop) and self.late_s > LATE_SHARE * (self.tally.result_s.quantile(0.5) or 1.0):
            notes.append(f"a job was sent {self.late_s:.3g} s late; its latency counts from the time it was due")
        if self.server_before is None:
            notes.append("the server did not report its load before this step")
        elif any(self.server_before):
            running, waiting = self.server_before
            notes.append(f"the server already had {running} running and {waiting} waiting jobs before this step")
        return notes

    def as_json(self) -> dict[str, Any]:
        """The JSON form that `from_json` reads."""
        load = {"concurrency": self.load.concurrency} if isinstance(self.load, ClosedLoop) else {"rate": self.load.rate}
        return {
            "load": load,
            "ending": self.ending,
            "is_warm": self.is_warm,
            "began_s": self.began_s,
            "windows": [{"seconds": w.seconds, "jobs": w.jobs, "p50_s": w.p50_s} for w in self.windows],
            **self.tally.as_json(),
            "unfinished": self.unfinished,
            "oldest_unfinished_s": self.oldest_unfinished_s,
            "late_s": self.late_s,
            "client_cpu": self.client_cpu,
            "server_before": self.server_before,
            "server_after": self.server_after,
            "timeline": [dict(second) for second in self.timeline],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Reads the output of `as_json`, which must match the schema. Raises ValueError if it is inconsistent."""
        load = data["load"]
        return cls(
            load=ClosedLoop(load["concurrency"]) if "concurrency" in load else OpenLoop(float(load["rate"])),
            ending=data["ending"],
            is_warm=data["is_warm"],
            began_s=data["began_s"],
            windows=tuple(Window(w["seconds"], w["jobs"], w["p50_s"]) for w in data["windows"]),
            tally=Tally.from_json(data),
            unfinished=data["unfinished"],
            oldest_unfinished_s=data["oldest_unfinished_s"],
            late_s=data["late_s"],
            client_cpu=data["client_cpu"],
            server_before=_pair(data["server_before"]),
            server_after=_pair(data["server_after"]),
            timeline=tuple(data["timeline"]),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a bench with all of its steps."""

    began: str  # date and time, ISO 8601 in UTC
    client: str  # version of this package
    machine: str  # of the client
    server: Mapping[str, Any]  # GetServerInfo without presets and layers
    settings: Mapping[str, Any]  # must be equal for two benches to be comparable: mix, seed, pictures, windows
    steps: tuple[Step, ...] = field(default=())

    @property
    def statuses(self) -> Counter[str]:
        """The statuses of all measured jobs of all steps."""
        return sum((step.tally.statuses for step in self.steps), Counter())

    def save(self, path: Path) -> None:
        """Writes the report as JSON, atomically."""
        data = {
            "format": FORMAT,
            "began": self.began,
            "client": self.client,
            "machine": self.machine,
            "server": self.server,
            "settings": self.settings,
            "steps": [step.as_json() for step in self.steps],
        }
        write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def read_report(path: Path) -> Report:
    """Reads a file that `Report.save` wrote. Raises `InvalidReport`, or OSError if the file cannot be read."""
    content = path.read_bytes()
    try:
        data = json.loads(content)
        check(data, {"format": Value("a number", lambda value: isinstance(value, int))})
        if data["format"] != FORMAT:  # its schema may differ
            raise InvalidReport(f"{path}: the report has format {data['format']}, but this version reads {FORMAT}")
        check(data, REPORT)
        return Report(
            began=data["began"],
            client=data["client"],
            machine=data["machine"],
            server=data["server"],
            settings=data["settings"],
            steps=tuple(map(Step.from_json, data["steps"])),
        )
    except (ValueError, RecursionError) as error:  # also if the file is not UTF-8 or not JSON
        raise InvalidReport(f"{path}: not a report written by `gramophone bench --json`: {error}") from None


def _outcomes(statuses: Counter[str]) -> Iterator[str]:
    """Describes how the jobs ended if none succeeded, most frequent status first."""
    for status, count in statuses.most_common():
        if status != LEFT:
            yield f"{count} failed with {status}"
        elif len(statuses) > 1:
            yield f"{count} cancelled on purpose"
        else:
            yield f"{count} cancelled on purpose, as the mix requests; set cancel below 1 so that some can succeed"


def _pair(values: list[int] | None) -> tuple[int, int] | None:
    return None if values is None else (values[0], values[1])
