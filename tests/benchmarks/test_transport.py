"""How the transport benchmark counts streams that are open at the same time."""

from __future__ import annotations

import pytest

from benchmarks import transport


@pytest.mark.parametrize(
    ("parts", "counted"),
    [
        ([(250, 500), (250, 498)], 500),
        ([(250, 250), (250, 250)], 250),  # the streams of one client after those of the other
        ([(250, 500), (240, 500)], 490),
    ],
)
def test_the_count_is_the_highest_number_of_simultaneous_streams(parts: list[tuple[int, int]], counted: int) -> None:
    assert transport.at_once(parts) == counted


@pytest.mark.parametrize(("iteration_ms", "running", "counted"), [("5", "256", 40), ("0", "1", None)])
async def test_streams_that_end_before_others_start_are_not_counted_together(
    iteration_ms: str, running: str, counted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STREAMS", 80)  # of two clients; the test is one of them
    flags = ("--engine", "fake", "--iter-ms", iteration_ms, "--max-running", running, "--max-queued", "1024")
    with transport.serving(flags) as (address, _):
        results, most = await transport.open_streams(address, 2.0 if counted else 0.0101, 0)
    assert results == 40
    assert most == counted if counted else most < 40
