"""The hostile users of a soak, in a process of their own: `python -m tests.soak.hostile ADDRESS PID METRICS_URL SEED`.

Each plays one hostile client of `tests.bad_input` after another, of a random kind; one more opens silent connections to
the probes. They print a line of JSON for each: its kind and its end, or the rule that the server violated. They leave
when standard input ends, in the middle of what they do.

A call that is answered late is counted and no violation, because the machine is shared with the honest users.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from urllib.parse import urlsplit

from gramophone_server.config import Limits
from tests.bad_input import compressed, costly, shapes, streams, unfinished
from tests.bad_input.target import Case, Target
from tests.support.monitoring import RuleViolation
from tests.support.raw_http2 import StreamOver

USERS = 3
PAUSE_S = (0.5, 2.0)  # between two cases of a user
MAX_LATE_S = 60.0  # beyond the time of a case; only a server that hangs takes longer
PROBE_CONNECTIONS = 50  # silent ones, to the metrics port
# Of the limits of the soaked server: small enough that three users reach them.
SETTINGS = {
    "max_idle_s": 2, "max_blocked_s": 3, "max_receiving_bytes": 32 * 2**20, "max_sending_bytes": 64 * 2**20,
    "max_decoded_bytes": 256 * 2**20, "max_paused_s": 8, "max_size": 512, "max_calls_per_connection": 300,
    "max_queued": 64, "max_kept": 64,
    # So that uploads are evicted all the time. A checkpoint of 64 px has 1.2 MB.
    "max_uploads_bytes": 2**21, "max_image_bytes": 2**20, "max_checkpoint_bytes": 2**21,
}  # fmt: skip
LIMITS = Limits(**SETTINGS)
# Those that fill all places, and by design send others away, are not for a server that others use.
NOT_BESIDE_OTHERS = ("silent connections", "calls of one connection", "clients with dear styles")


def cases() -> dict[str, list[Case]]:
    """The hostile clients by kind."""
    by_kind: dict[str, list[Case]] = {}
    for module in (shapes, compressed, unfinished, streams, costly):
        for case in module.cases(LIMITS):
            if not case.name.endswith(NOT_BESIDE_OTHERS):
                by_kind.setdefault(case.kind, []).append(case)
    return by_kind


class HostileUser:
    """Plays one case after another."""

    def __init__(self, target: Target, rng: random.Random) -> None:
        self._target, self._rng = target, rng
        self._cases = cases()

    async def use_server(self) -> None:
        """Never returns."""
        while True:
            kind = self._rng.choice(list(self._cases))
            case = self._rng.choice(self._cases[kind])
            start, violation = time.monotonic(), ""
            try:
                async with asyncio.timeout(case.within_s + MAX_LATE_S):
                    await case.play(self._target)
                end = "played"
            except* TimeoutError:
                end = "late"
                if time.monotonic() - start > case.within_s + MAX_LATE_S - 1:
                    violation = f"no answer after {time.monotonic() - start:.0f} s"
            except* (StreamOver, OSError) as group:
                end = type(group.exceptions[0]).__name__
            except* RuleViolation as group:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                end, violation = "violation", str(error)
            _report(f"hostile: {kind}", end, f"{case.kind}: {case.name}: {violation}" if violation else "")
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))


async def silent_probes(url: str) -> None:
    """Opens connections to the metrics port that say nothing, and closes the oldest."""
    parts, held = urlsplit(url), []
    while True:
        with contextlib.suppress(OSError):
            held.append((await asyncio.open_connection(parts.hostname, parts.port))[1])
        if len(held) > PROBE_CONNECTIONS:
            held.pop(0).transport.abort()
            _report("hostile: silent probe", "left")
        await asyncio.sleep(0.1)


def _report(action: str, end: str, violation: str = "") -> None:
    print(json.dumps({"action": action, "end": end, "violation": violation}), flush=True)


async def _until_stdin_ends() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def use_server(address: str, pid: int, metrics_url: str, seed: str) -> None:
    """Runs all hostile users until standard input ends."""
    target = Target(address, pid, LIMITS, metrics_url, is_shared=True)
    users = [HostileUser(target, random.Random(f"{seed} {number}")) for number in range(USERS)]
    _report("hostile: all", "started")
    tasks = [asyncio.create_task(user.use_server()) for user in users]
    tasks.append(asyncio.create_task(silent_probes(metrics_url)))
    ended = asyncio.create_task(_until_stdin_ends())
    done, _ = await asyncio.wait({ended, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in (*tasks, ended):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done - {ended}:
        task.result()  # raises what a user should not have raised


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    address, pid, metrics_url, seed = argv
    asyncio.run(use_server(address, int(pid), metrics_url, seed))


def flags() -> list[str]:
    """The settings as flags of the server."""
    known = {each.name for each in fields(Limits)}
    assert set(SETTINGS) <= known
    return [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    main(sys.argv[1:])
