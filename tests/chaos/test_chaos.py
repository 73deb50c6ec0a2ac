"""Each fault of the campaign once; `make chaos` plays them for minutes. And that a broken rule is found, which nobody saw yet."""

from __future__ import annotations

import asyncio
import re
import socket
import threading

import pytest
from rich.console import Console

from tests.chaos import __main__ as campaign
from tests.chaos.faults import FAULTS, Fault, begin_and_leave
from tests.chaos.stage import CONTENT, SMALL, STYLE
from tests.chaos.watch import Broken, Health, Usage


def test_every_fault_once_leaves_nothing_behind(capsys):
    code = campaign.main(["--seed", "1", "--minutes", "0", "--together"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "broken" not in told
    assert "1 rounds are too few to judge memory: that takes 4\n" in told
    for name, fault in FAULTS.items():
        assert re.search(rf"^  .*\b{name}\b.*: [0-9.]+ s, \d+ result", told, re.MULTILINE), "it was played"
        assert fault.play.__doc__, "a fault tells what must hold"


@pytest.mark.parametrize(("by_round", "told"), [
    ([500, 506, 511, 516], "grew by 21 MiB in 4 rounds"),
    ([500, 503, 501, 502], "memory: +2 MiB in 4 rounds, by a line; at most 16 are allowed\n"),
    ([500, 600, 700], "3 rounds are too few to judge memory: that takes 4\n"),
])  # fmt: skip
def test_it_is_told_whether_memory_was_judged(by_round, told, capsys):
    played = campaign.Campaign([], 1, Console(width=200))
    played.usages = [Usage(10, 10, float(mib)) for mib in by_round]
    try:
        played.check_memory()
    except Broken as error:
        assert told in str(error)
    else:
        assert capsys.readouterr().out == told


PAGES = {"not HTTP": b"what?\r\n\r\n", "not numbers": b"HTTP/1.0 200 OK\r\n\r\ngramophone_jobs many\n"}


@pytest.mark.parametrize("page", PAGES)
def test_metrics_that_cannot_be_read_are_trouble(page):
    """Whatever is wrong with them: a thread that asks no more must not look like one that has no complaints."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
        health = Health("127.0.0.1:9", url)

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(PAGES[page])

        answering = threading.Thread(target=answer)
        answering.start()
        health._kept(health._probe)
        answering.join()
    with pytest.raises(Broken, match=rf"^health: {url}: "):
        health.check()


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
