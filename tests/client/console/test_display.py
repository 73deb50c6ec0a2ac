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
        "job j1: 24x18, 300 iterations, seed 7, waits at place 1 of the queue, about 0:05",
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
    assert "server lost at iteration 40, going on as job j2 from iteration 38" in console.file.getvalue()


def test_the_preview_fits_the_terminal():
    for width, height, columns, rows in ((40, 60, 40, 10), (20, 60, 20, 5), (200, 6, 16, 4)):
        lines = drawn(blocks(), width, height, None).splitlines()
        assert (len(lines), {len(line.rstrip("\n")) for line in lines}) == (rows, {columns})


def test_the_preview_uses_the_colours_of_the_terminal():
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in drawn(blocks())
    assert "\x1b[38;5;196;48;5;196m▀" in drawn(blocks(), colours="256")
    for grey in (drawn(blocks(), colours=None), drawn(blocks(), NO_COLOR="1")):
        assert not re.search(r"\x1b\[[34]8", grey)
        assert "▀" not in grey
        assert grey.splitlines()[0] != grey.splitlines()[-1]  # red is brighter than blue


@pytest.mark.parametrize("width", [100, 60, 30, 12])
def test_the_progress_line_is_one_line_at_every_width(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)
    display = LiveDisplay(console, preview=False)
    display.show(update(progress(150)))
    lines = drawn(display.renderable(), width, colours=None).splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width
    assert "150/300" in lines[0]
    assert ("loss 3" in lines[0]) == (width > 12)
    assert ("━" in lines[0]) == (width >= 60)
    assert ("12x9" in lines[0]) == (width >= 60)


def test_the_live_display_draws_picture_and_numbers():
    console = Console(
        file=io.StringIO(), force_terminal=True, width=60, height=20, color_system="256", legacy_windows=False
    )
    with LiveDisplay(console, preview=True) as display:
        for event in (accepted(queue_position=2), frame(1), progress(1), result()):
            display.show(update(event))
    out = console.file.getvalue()
    assert "▀" in out
    assert "24x18, 300 iterations in 2.2 s, loss 0.5" in out
