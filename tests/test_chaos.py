"""Each fault of the campaign once; `make chaos` plays them for minutes. And that a broken rule is found, which nobody saw yet."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.chaos import __main__ as campaign
from tests.chaos.faults import FAULTS, Fault, begin_and_leave
from tests.chaos.stage import CONTENT, SMALL, STYLE


def test_every_fault_once_leaves_nothing_behind(capsys):
    code = campaign.main(["--seed", "1", "--minutes", "0", "--together"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "broken" not in told
    for name, fault in FAULTS.items():
        assert re.search(rf"^  .*\b{name}\b.*: [0-9.]+ s, \d+ result", told, re.MULTILINE), "it was played"
        assert fault.play.__doc__, "a fault tells what must hold"


async def _abandons(stage):
    """A fault that does not clean up: its job goes on for 25 s."""
    async with stage.client() as client:
        await begin_and_leave(client, grace_s=60.0)


async def _unforgiven(stage):
    """A fault whose victims must not be."""
    async with stage.client() as client, asyncio.TaskGroup() as group:
        group.create_task(stage.end(client.stream(CONTENT, STYLE, **SMALL)))
        await stage.break_engine("advance.exception")


@pytest.mark.parametrize(
    ("play", "why"),
    [
        (_abandons, "_abandons: 1 jobs instead of 0, "),
        (_unforgiven, "_unforgiven: a job ended in ServerFailed (StatusCode.INTERNAL): the server failed"),
    ],
)
def test_a_broken_rule_is_told_with_what_repeats_it(play, why, monkeypatch, capsys):
    monkeypatch.setitem(FAULTS, play.__name__, Fault(play))
    monkeypatch.setattr("tests.chaos.watch.SETTLED_WITHIN_S", 4.0)
    assert campaign.main(["--seed", "7", "--minutes", "0", "--only", play.__name__]) == 1
    told = capsys.readouterr().out
    assert f"broken: {why}" in told
    assert f"again: python -m tests.chaos --seed 7 --only {play.__name__}" in told
