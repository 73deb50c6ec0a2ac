import io
import re

import pytest
from PIL import Image
from rich.console import Console

from gramophone_client.console.display import HalfBlocks, LiveDisplay, PlainDisplay
from gramophone_client.transport.parsing import update
from gramophone_client.types.picture import Picture
from tests.support.fake_service import accepted, frame, progress, result, waiting


def drawn(renderable, width=40, height=20, colours="truecolor", **environment) -> str:
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system=colours,
        legacy_windows=False,
        _environ={"TERM": "xterm", **environment},
    )
    console.print(renderable)
    return console.file.getvalue()


def blocks() -> HalfBlocks:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 10, 40, 20))
    out = io.BytesIO()
    image.save(out, "png")
    return HalfBlocks(Picture("png", 40, 20, out.getvalue()))


def test_waiting_is_shown():
    out = io.StringIO()
    display = PlainDisplay(out, 0)
    for event in (waiting(2), waiting(1, wait_s=75), accepted(queue_position=1, estimated_wait={"seconds": 5})):
        display.show(update(event))
    assert out.getvalue().splitlines() == [
        "waits at place 2 of the queue",
        "waits at place 1 of the queue, about 1:15",
        "job j1: 24x18 px, 300 iterations, seed 7, waits at place 1 of the queue, about 0:05",
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None, legacy_windows=False)
    live = LiveDisplay(console, preview=False)
    live.show(update(waiting(2)))
    assert "waits at place 2 of the queue" in drawn(live.renderable(), 60, colours=None)


def test_a_terminal_keeps_the_line_about_a_resent_job():
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with LiveDisplay(console, preview=False) as display:
        for event in (accepted(), progress(40), accepted(job_id="j2", resumed_at=38), progress(39)):
            display.show(update(event))
    assert "server lost at iteration 40, going on as job j2\n" in console.file.getvalue()


def test_the_preview_fits_the_terminal():
    for width, height, columns, rows in ((40, 60, 40, 10), (20, 60, 20, 5), (200, 6, 20, 5)):
        lines = drawn(blocks(), width, height, None).splitlines()
        assert (len(lines), {len(line.rstrip("\n")) for line in lines}) == (rows, {columns})


def test_the_preview_uses_the_colours_of_the_terminal():
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in drawn(blocks())
    assert "\x1b[38;5;196;48;5;196m▀" in drawn(blocks(), colours="256")
    for grey in (drawn(blocks(), colours=None), drawn(blocks(), NO_COLOR="1")):
        assert not re.search(r"\x1b\[[34]8", grey)
        assert "▀" not in grey
        assert grey.splitlines()[0] != grey.splitlines()[-1]  # red is brighter than blue


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (100, "━━━ 150/300 scale 1/2 12x9 px 1:30 left loss 3 8 it/s"),
        (80, "━━━ 150/300 scale 1/2 12x9 px 1:30 left loss 3 8 it/s"),
        (60, "150/300 scale 1/2 12x9 px 1:30 left loss 3 8 it/s"),
        (40, "150/300 scale 1/2 12x9 px 1:30 left"),
        (32, "150/300 scale 1/2 1:30 left"),
        (20, "150/300 scale 1/2"),
        (9, "150/300"),
    ],
)
def test_the_progress_line_is_one_line_at_every_width(width, shown):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    display = LiveDisplay(console, preview=False)
    display.show(update(progress(150)))
    (line,) = drawn(display.renderable(), width, colours=None).splitlines()
    assert len(line) <= width
    assert " ".join(re.sub("[━╸╺ ]+", lambda m: "━━━ " if "━" in m[0] else " ", line).split()) == shown


def test_a_server_that_does_not_report_scales_has_none_in_its_line():
    event = progress(150)
    event.progress.scale = event.progress.scales = 0
    out = io.StringIO()
    PlainDisplay(out, 0).show(update(event))
    assert out.getvalue() == "150/300, 12x9 px, 1:30 left, loss 3, 8 it/s\n"


JOB_ID = "5d3cbd2e-7a8b-4c59-a3f5-0f6f2a1f3f11"


@pytest.mark.parametrize("width", [80, 40, 20])
def test_the_id_of_the_job_stays_on_the_screen(width):
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=12, color_system=None, legacy_windows=False
    )
    with LiveDisplay(console, preview=True) as display:
        for event in (accepted(job_id=JOB_ID, seed=2**64 - 1), frame(1), progress(1), result()):
            display.show(update(event))
            lines = drawn(display.renderable(), width, 12, None).splitlines()
            assert len(lines) < 12 and max(map(len, lines)) <= width
            assert f"job{JOB_ID}" in "".join(lines).replace(" ", "")
    last = "".join(console.file.getvalue().splitlines()[-8:]).replace(" ", "")
    assert f"job{JOB_ID}" in last and "loss0.5" in last  # it is there at the end, with the result


def test_a_preview_leaves_room_for_all_lines_of_the_status():
    display = LiveDisplay(Console(file=io.StringIO()), preview=True)
    display.show(update(frame(1)))
    display.set_status("word " * 20)
    lines = drawn(display.renderable(), 20, 12, None).splitlines()
    assert len(lines) == 11 and sum("word" in line for line in lines) == 5


def test_the_live_display_draws_picture_and_numbers():
    console = Console(
        file=io.StringIO(), force_terminal=True, width=60, height=20, color_system="256", legacy_windows=False
    )
    with LiveDisplay(console, preview=True) as display:
        for event in (accepted(queue_position=2), frame(1), progress(1), result()):
            display.show(update(event))
    out = console.file.getvalue()
    assert "▀" in out
    assert "24x18 px, 300 iterations in 2.2 s, loss 0.5" in out
