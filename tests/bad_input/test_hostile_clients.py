"""A sample of the hostile clients, and tests that violations are found."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter

import pytest

from tests.bad_input import playing, shapes
from tests.bad_input.inputs import REQUESTS
from tests.bad_input.playing import LIMITS, all_cases, describe, name_of, play_cases, select
from tests.bad_input.target import Case, failure_of, path_of
from tests.support.raw_http2 import Answer, prefixed
from tests.support.watched_server import StallWatch, watch_loop

SEED, PER_KIND = 20_260, 3
QUICK = ("repeated", "again", "filled", "unknown", "oversized", "compressed", "commands")
NAMED = (
    "unfinished: Stylize at every boundary",
    "unfinished: GetServerInfo with prefixes above the limit",
    "unfinished: UploadImage after a piece",
    "upload: of a checkpoint with an endless header",
    "upload: of one byte more than allowed",
    "readers: 15 that drip events",
    "encodings: a paused frame as JPEG of 40 qualities",
)


@pytest.mark.timeout(240)
async def test_a_sample_of_hostile_clients_takes_nothing_from_others():
    cases = [case for kind in QUICK for case in select(kind, PER_KIND, SEED)]
    cases += [case for name in NAMED for case in select(name)]
    assert len(cases) == PER_KIND * len(QUICK) + len(NAMED)
    findings = await play_cases(cases)
    assert not findings.failures, "\n".join(describe(findings))
    assert findings.played.total() == len(cases)


def test_every_case_has_its_own_name():
    names = Counter(name_of(case) for case in all_cases())
    assert len(names) > 700 and names.most_common(1)[0][1] == 1


def test_every_repeated_field_of_every_request_is_played():
    """A new one needs its limit in `shapes.limit_of`."""
    names = [case.name for case in select("repeated")]
    for method, kind in REQUESTS.items():
        for path in shapes.paths(kind.DESCRIPTOR):
            if path[-1].is_repeated:
                full = shapes.name_of(method, path)
                for count in (1, shapes.limit_of(path, LIMITS), shapes.limit_of(path, LIMITS) + 1):
                    assert f"{full} x {count}" in names
                assert f"{full} empty as often as fits" in names


async def _answered_as_expected(target):
    async with target.connection() as raw:
        await target.call(raw, path_of("GetServerInfo"), [prefixed(b"")], allowed=("INVALID_REQUEST",))


async def _never_answered(target):
    async with target.connection() as raw:
        await raw.open_stream("/grpc.health.v1.Health/Watch").answer(within_s=0.2)


async def test_violations_are_found_and_can_be_repeated(monkeypatch):
    monkeypatch.setattr(playing, "MAX_STALL_S", -1.0)
    monkeypatch.setattr(playing, "NOISE_BYTES", -(10**12))
    monkeypatch.setattr(playing, "MAX_JOB_S", -1.0)
    monkeypatch.setattr(playing, "memory_bytes", lambda _: 2**20)
    wrong, silent = Case("kind", "wrong", _answered_as_expected), Case("kind", "silent", _never_answered)
    findings = await play_cases([wrong, silent])
    failures = describe(findings)
    assert failures[0].startswith("kind: wrong: OK  () instead of ('INVALID_REQUEST',)\n    repeat with: python -m")
    assert failures[0].endswith("tests.bad_input --only 'kind: wrong'")
    texts = "\n".join(failures)
    for words in ("was not answered within", "the event loop was blocked for", "are allowed", "a bystander's job took"):
        assert words in texts
    assert re.search(r"the server with the fake engine took \d+ MiB of memory, at most 1 follow from its", texts)


@pytest.mark.parametrize(("answer", "words"), [
    (Answer("OK"), ""),
    (Answer("INTERNAL", "x"), "INTERNAL: x"),
    (Answer("UNKNOWN", "x"), "UNKNOWN: x"),
    (Answer("CLOSED", "x"), "CLOSED: x"),
    (Answer("NOT_FOUND", "no job", "JOB_NOT_FOUND"), ""),
    (Answer("NOT_FOUND", "no job"), "without a reason"),
    (Answer("RESOURCE_EXHAUSTED", "x", "SERVER_BUSY"), "without a time to come back"),
    (Answer("RESOURCE_EXHAUSTED", "x", "SERVER_BUSY", 1.0), ""),
    (Answer("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (2 vs. 1)"), ""),
    (Answer("INVALID_ARGUMENT", "x", "INVALID_REQUEST", None, (("spec.size", ""),)), "without a field"),
    (Answer("INVALID_ARGUMENT", "<PIL.Image>", "INVALID_REQUEST", None, (("spec", "x"),)), "exposes internals"),
])  # fmt: skip
def test_answers_must_explain_themselves(answer, words):
    failure = failure_of(answer)
    assert words in failure and bool(words) == bool(failure)


async def test_a_stall_of_the_loop_is_measured_with_its_stack(tmp_path):
    stalls = StallWatch(tmp_path)
    watching = asyncio.create_task(watch_loop(tmp_path))
    await asyncio.sleep(0.05)
    stalls.take_s()
    time.sleep(0.2)  # noqa: ASYNC251 - the stall
    await asyncio.sleep(0.05)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert 0.1 < stalls.take_s() < 5 and stalls.take_s() == 0
    assert "test_a_stall_of_the_loop_is_measured_with_its_stack" in stalls.take_stacks()
