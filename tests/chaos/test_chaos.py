"""Injects each fault of the campaign once (`make chaos` does so for minutes), and tests that violations are found."""

from __future__ import annotations

import asyncio
import re
import socket
import threading

import pytest
from rich.console import Console

from tests.chaos import __main__ as campaign
from tests.chaos.actions import start_and_detach
from tests.chaos.environment import CONTENT, SMALL, STYLE
from tests.chaos.faults import FAULTS, Fault
from tests.support.monitoring import HealthProbe, ProcessUsage, RuleViolation


def test_every_fault_once_leaves_nothing_behind(capsys):
    code = campaign.main(["--seed", "1", "--minutes", "0", "--together"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "failed" not in output
    assert "memory: not judged, because 4 rounds are needed and 1 were run\n" in output
    for name, fault in FAULTS.items():
        assert re.search(rf"^  .*\b{name}\b.*: [0-9.]+ s, \d+ result", output, re.MULTILINE), "it was injected"
        assert fault.inject.__doc__, "the docstring of a fault states what must hold"


@pytest.mark.parametrize(("by_round", "message"), [
    ([500, 506, 511, 516], "grew by 21 MiB in 4 rounds"),
    ([500, 503, 501, 502], "memory: +2 MiB in 4 rounds (slope of a line); at most 16 are allowed\n"),
    ([500, 600, 700], "memory: not judged, because 4 rounds are needed and 3 were run\n"),
])  # fmt: skip
def test_growth_of_memory_is_judged_after_4_rounds(by_round, message, capsys):
    finished = campaign.Campaign([], 1, Console(width=200))
    finished.usages = [ProcessUsage(10, 10, float(mib)) for mib in by_round]
    try:
        finished.check_memory()
    except RuleViolation as error:
        assert message in str(error)
    else:
        assert capsys.readouterr().out == message


PAGES = {"not HTTP": b"what?\r\n\r\n", "not numbers": b"HTTP/1.0 200 OK\r\n\r\ngramophone_jobs many\n"}


@pytest.mark.parametrize("page", PAGES)
def test_metrics_that_cannot_be_read_are_a_problem(page):
    """Otherwise a thread that ended with an exception would look like one without complaints."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
        health = HealthProbe("127.0.0.1:9", url)

        def serve_page():
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(PAGES[page])

        serving = threading.Thread(target=serve_page)
        serving.start()
        health.guarded(health.check_http)
        serving.join()
    with pytest.raises(RuleViolation, match=rf"^health: {url}: "):
        health.check()


async def _leaves_a_job(env):
    """A fault that does not clean up: its job continues for 25 s."""
    async with env.client() as client:
        await start_and_detach(client, grace_s=60.0)


async def _fails_a_job(env):
    """A fault with an error that is not allowed."""
    async with env.client() as client, asyncio.TaskGroup() as group:
        group.create_task(env.read_to_end(client.stream(CONTENT, STYLE, **SMALL)))
        await env.inject("advance.exception")


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        (_leaves_a_job, "_leaves_a_job: 1 jobs instead of 0, "),
        (_fails_a_job, "_fails_a_job: a job ended in ServerFailedError (StatusCode.INTERNAL): the server failed"),
    ],
)
def test_a_violation_is_reported_with_the_command_that_repeats_it(inject, message, monkeypatch, capsys):
    monkeypatch.setitem(FAULTS, inject.__name__, Fault(inject))
    monkeypatch.setattr("tests.support.monitoring.SETTLE_TIMEOUT_S", 4.0)
    assert campaign.main(["--seed", "7", "--minutes", "0", "--only", inject.__name__]) == 1
    output = capsys.readouterr().out
    assert f"failed: {message}" in output
    assert f"repeat with: python -m tests.chaos --seed 7 --only {inject.__name__}" in output
