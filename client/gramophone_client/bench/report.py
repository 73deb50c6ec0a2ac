"""What a bench found, and its way to a JSON file and back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gramophone_client.bench.arrivals import ClosedLoop, Load, OpenLoop
from gramophone_client.bench.measure import LEFT, OK, Tally
from gramophone_client.bench.schema import REPORT, Value, check
from gramophone_client.types.picture import write_whole

__all__ = ["BadReport", "Report", "Step", "Window", "read_report"]

FORMAT = 1  # of the file; grows when an older reader would misunderstand it

BUSY_CLIENT = 0.8  # cores; above it the measurement may be of the client, whose Python uses one
LATE_SHARE = 0.1  # of a median result


class BadReport(Exception):
    """A file that is not a report of a bench; the text names it."""


@dataclass(frozen=True)
class Window:
    """One of the spans of time that were compared."""

    seconds: float
    jobs: int  # that are OK
    p50_s: float  # to their results


@dataclass(frozen=True, kw_only=True)
class Step:
    """One load, and what came of it."""

    load: Load
    ending: str  # "stable", "time is up" or "interrupted"
    is_warm: bool  # False: the warm-up had not ended, and its figures are all there is
    began_s: float  # since the bench began
    windows: tuple[Window, ...]
    tally: Tally
    unfinished: int  # jobs on their way when the step ended, which no latency counts
    oldest_unfinished_s: float
    late_s: float  # most that a job was sent after it was due
    client_cpu: float  # cores that this process kept busy
    server_before: tuple[int, int] | None  # (running, waiting) jobs; None if the server did not say
    server_after: tuple[int, int] | None
    timeline: tuple[Mapping[str, int], ...]  # statuses of each second of the step

    def notes(self) -> list[str]:
        """What a reader has to know before the figures are believed."""
        notes = []
        if not self.tally.ok and self.tally.ended:  # more time would change nothing
            since = " since the warm-up" if any(second.get(OK) for second in self.timeline) else ""
            notes.append(f"no job has ended well{since}: {', '.join(_fates(self.tally.statuses))}")
        elif not self.is_warm:
            advice = "; allow more --duration" if self.ending == "time is up" else ""
            notes.append(f"the warm-up had not ended, so these are its figures{advice}")
        elif self.ending != "stable":
            p50s = " ".join(f"{window.p50_s:.3g}" for window in self.windows[-3:])
            said = f" (medians of the last ones: {p50s} s)" if p50s else ""
            notes.append(f"{self.ending} before three windows agreed within 10 %{said}")
        if self.oldest_unfinished_s > self.tally.result_s.max_s:  # so the figures leave out the longest
            notes.append(f"not ended in time: {self.unfinished}, the oldest after {self.oldest_unfinished_s:.3g} s")
        if self.client_cpu > BUSY_CLIENT:
            notes.append(f"this client kept {self.client_cpu:.2g} cores busy and may be what was measured")
        if isinstance(self.load, OpenLoop) and self.late_s > LATE_SHARE * (self.tally.result_s.quantile(0.5) or 1.0):
            notes.append(f"a job was sent {self.late_s:.3g} s late; its latency counts from when it was due")
        if self.server_before is None:
            notes.append("the server did not say what others had there before this step")
        elif any(self.server_before):
            running, waiting = self.server_before
            notes.append(f"others had {running} running and {waiting} waiting at the server before this step")
        return notes

    def as_json(self) -> dict[str, Any]:
        """For `from_json`."""
        told = {"concurrency": self.load.concurrency} if isinstance(self.load, ClosedLoop) else {"rate": self.load.rate}
        return {
            "load": told,
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
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """What `as_json` said, of which `check` has seen that it is there. Raises ValueError if it does not add up."""
        load = told["load"]
        return cls(
            load=ClosedLoop(load["concurrency"]) if "concurrency" in load else OpenLoop(float(load["rate"])),
            ending=told["ending"],
            is_warm=told["is_warm"],
            began_s=told["began_s"],
            windows=tuple(Window(w["seconds"], w["jobs"], w["p50_s"]) for w in told["windows"]),
            tally=Tally.from_json(told),
            unfinished=told["unfinished"],
            oldest_unfinished_s=told["oldest_unfinished_s"],
            late_s=told["late_s"],
            client_cpu=told["client_cpu"],
            server_before=_pair(told["server_before"]),
            server_after=_pair(told["server_after"]),
            timeline=tuple(told["timeline"]),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole bench."""

    began: str  # date and time, ISO 8601 in UTC
    client: str  # version of this package
    machine: str  # of the client
    server: Mapping[str, Any]  # GetServerInfo without presets and layers
    settings: Mapping[str, Any]  # what makes two benches comparable: mix, seed, pictures, windows
    steps: tuple[Step, ...] = field(default=())

    @property
    def statuses(self) -> Counter[str]:
        """Of all steps, as far as they were measured."""
        return sum((step.tally.statuses for step in self.steps), Counter())

    def save(self, path: Path) -> None:
        """Writes the report as JSON, whole or not at all."""
        told = {
            "format": FORMAT,
            "began": self.began,
            "client": self.client,
            "machine": self.machine,
            "server": self.server,
            "settings": self.settings,
            "steps": [step.as_json() for step in self.steps],
        }
        write_whole(path, (json.dumps(told, indent=1) + "\n").encode())


def read_report(path: Path) -> Report:
    """What `Report.save` wrote. Raises `BadReport`, or OSError if there is no file."""
    data = path.read_bytes()
    try:
        told = json.loads(data)
        check(told, {"format": Value("a number", lambda value: isinstance(value, int))})
        if told["format"] != FORMAT:  # and so of another form
            raise BadReport(f"{path}: a report of format {told['format']}, and this version reads {FORMAT}")
        check(told, REPORT)
        return Report(
            began=told["began"],
            client=told["client"],
            machine=told["machine"],
            server=told["server"],
            settings=told["settings"],
            steps=tuple(map(Step.from_json, told["steps"])),
        )
    except (ValueError, RecursionError) as error:  # also of what is no text, or no JSON
        raise BadReport(f"{path}: not a report that `gramophone bench --json` wrote: {error}") from None


def _fates(statuses: Counter[str]) -> Iterator[str]:
    """What became of jobs that have no result, most frequent first, and what to do if that was asked for."""
    for status, count in statuses.most_common():
        if status != LEFT:
            yield f"{count} failed with {status}"
        elif len(statuses) > 1:
            yield f"{count} left on purpose"
        else:
            yield f"{count} left on purpose, as the mix asks; a cancel below 1 lets some come to a result"


def _pair(told: list[int] | None) -> tuple[int, int] | None:
    return None if told is None else (told[0], told[1])
