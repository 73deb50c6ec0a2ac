"""Shows a job while it runs: a live line with the picture above it on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, TextIO

from PIL import Image
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gramophone_client.types.picture import Picture
from gramophone_client.types.updates import Accepted, Changed, Frame, Paused, Progress, Result, Resumed, Update, Waiting

__all__ = ["HalfBlocks", "LiveDisplay", "PlainDisplay", "print_errors"]

LINES_EVERY_S = 2.0
REFRESHES_PER_S = 5
BAR_COLUMNS = (8, 40)  # fewest, most
CURSOR_LINES = 1  # below a live display
ECHO_COLUMNS = 2  # behind a progress line: where a terminal writes ^C; in a new line, it would move the display


def print_errors(*lines: str) -> None:
    """Prints each line to standard error, after the name of the command."""
    for line in lines:
        print(f"gramophone: {line}", file=sys.stderr)


class PlainDisplay:
    """Prints whole lines, for logs and pipes: the job's start and end, and progress at most every `every_s` seconds."""

    def __init__(self, stream: TextIO, every_s: float = LINES_EVERY_S) -> None:
        self._stream = stream
        self._every_s = every_s
        self._next_s = 0.0
        self._iteration: int | None = None  # the last one shown; None before `Accepted`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Does nothing: the terminal was not changed."""

    def show(self, update: Update) -> None:
        """Prints the update; progress and waiting only if the last line is `every_s` old."""
        if isinstance(update, Progress):
            self._iteration = update.iteration
        match update:
            case Accepted():
                self.print_line(": ".join(_accepted(update, self._iteration)))
                self._next_s = time.monotonic() + self._every_s
            case Waiting():
                self.set_status(_waiting(update))
            case Progress():
                self.set_status(", ".join(text for text, _ in _progress(update)))
            case Paused() | Resumed() | Changed():
                self.print_line(_controlled(update))
            case Result():
                self.print_line(_result(update))
        if isinstance(update, Accepted):
            self._iteration = update.resumed_at

    def print_line(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)

    def set_status(self, text: str) -> None:
        """Prints the text if the last line is `every_s` old."""
        if time.monotonic() >= self._next_s:
            self.print_line(text)
            self._next_s = time.monotonic() + self._every_s


class LiveDisplay:
    """The job's id and a line that changes, in place, and with `preview` the intermediate picture above them.

    It fits the width and the colours of the terminal, also after they change.
    """

    def __init__(self, console: Console, *, preview: bool) -> None:
        self._console = console
        self._preview = preview
        self._picture: HalfBlocks | None = None
        self._status = "waiting for the server"
        self._job = ""  # its id, which stays on the screen for `gramophone watch`
        self._progress: Progress | None = None
        self._iteration: int | None = None  # the last one shown; None before `Accepted`
        self._live = Live(console=console, get_renderable=self.renderable, refresh_per_second=REFRESHES_PER_S)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Nothing that was only waited for stays on the screen.
        self._live.transient = error is not None and self._iteration is None
        self._live.__exit__(kind, error, traceback)

    def show(self, update: Update) -> None:
        """Shows the update at the next refresh."""
        match update:
            case Accepted():
                job, details = _accepted(update, self._iteration)
                if self._iteration is not None:
                    self.print_line(job)
                self._job = f"job {update.job_id}"
                self.set_status(details)
                self._iteration = update.resumed_at
            case Waiting():
                self.set_status(_waiting(update))
            case Progress():
                self._progress, self._iteration = update, update.iteration
            case Paused() | Resumed() | Changed():
                self.set_status(_controlled(update))
            case Frame():
                self._set_picture(update.picture)
            case Result():
                self._set_picture(update.picture)
                self.set_status(_result(update))

    def set_status(self, text: str) -> None:
        """Replaces the progress line by a text."""
        self._status, self._progress = text, None

    def print_line(self, text: str) -> None:
        """Prints a permanent line above the one that changes."""
        self._console.print(Text(text))

    def renderable(self) -> RenderableType:
        """What the display shows at the next refresh."""
        status = _ProgressLine(self._progress) if self._progress is not None else Text(self._status, overflow="fold")
        lines = Group(Text(self._job, overflow="fold"), status) if self._job else status
        return lines if self._picture is None else _Screen(self._picture, lines)

    def _set_picture(self, picture: Picture) -> None:
        if self._preview:
            self._picture = HalfBlocks(picture)


class _Screen:
    """A picture, and below it the other lines, as many as they need."""

    def __init__(self, picture: HalfBlocks, lines: RenderableType) -> None:
        self._picture = picture
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = console.size.height - len(console.render_lines(self._lines, options)) - CURSOR_LINES
        yield from console.render(self._picture, options.update_height(rows))
        yield self._lines


class _ProgressLine:
    """Bar and numbers of a `Progress`, as many as fit into the width."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = dict(_progress(self._progress))
        shown = list(parts)
        room = options.max_width - ECHO_COLUMNS
        while len(shown) > 1 and cell_len(self._line(shown)) > room:
            shown.remove(max(shown, key=lambda part: parts[part]))
        text = Text(self._line(shown), no_wrap=True, overflow="ellipsis")
        fewest, most = BAR_COLUMNS
        columns = min(most, room - text.cell_len - 2)
        line = Table.grid(padding=(0, 2, 0, 0))
        if columns >= fewest:
            bar = ProgressBar(self._progress.iterations, self._progress.iteration, width=columns)
            line.add_row(bar, text)
        else:
            line.add_row(text)
        yield line

    def _line(self, parts: Sequence[str]) -> str:
        # The first has a constant width: otherwise the bar would shrink at iterations 10, 100, ...
        return "  ".join([parts[0].rjust(2 * len(str(self._progress.iterations)) + 1), *parts[1:]])


class HalfBlocks:
    """A picture in character cells, two pixels per cell, as large as the terminal allows.

    Without 256 colours, or with NO_COLOR, each cell shows its brightness only.
    """

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._cells: tuple[object, list[Segment]] | None = None  # (the properties of the terminal, the cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system in ("truecolor", "256") and not console.no_color
        room = (options.max_width, max(1, options.height or console.size.height - CURSOR_LINES))
        drawn_for = (room, coloured, options.encoding)
        if self._cells is None or self._cells[0] != drawn_for:  # the live display draws the same picture many times
            image = self._fitted(*room)
            cells = _coloured(image) if coloured else _shaded(image, options.encoding)
            self._cells = drawn_for, list(cells)
        yield from self._cells[1]

    def _fitted(self, columns: int, rows: int) -> Image.Image:
        """The picture with at most `columns` x 2 `rows` pixels and an even height."""
        image = Image.open(io.BytesIO(self._picture.data))
        scale = min(columns / image.width, 2 * rows / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2)) * 2
        image.draft("RGB", size)
        return image.convert("RGB").resize(size, Image.Resampling.BOX)


def _coloured(image: Image.Image) -> Iterable[Segment]:
    pixels = list(zip(*[iter(image.tobytes())] * 3, strict=True))
    for y in range(0, image.height, 2):
        upper = pixels[y * image.width : (y + 1) * image.width]
        lower = pixels[(y + 1) * image.width : (y + 2) * image.width]
        for above, below in zip(upper, lower, strict=True):
            yield Segment("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        yield Segment.line()


def _shaded(image: Image.Image, encoding: str) -> Iterable[Segment]:
    ramp = " ░▒▓█" if encoding.startswith("utf") else " .:-=+*#%@"
    grey = image.convert("L").resize((image.width, image.height // 2), Image.Resampling.BOX).tobytes()
    for start in range(0, len(grey), image.width):
        yield Segment("".join(ramp[value * len(ramp) // 256] for value in grey[start : start + image.width]))
        yield Segment.line()


def _accepted(accepted: Accepted, lost_at: int | None) -> tuple[str, str]:
    """(the job's id, its properties). `lost_at` is the last reported iteration of the job that this one continues; None
    for a new job."""
    wait = f", {_wait(accepted.queue_position, accepted.estimated_wait_s)}" if accepted.queue_position else ""
    if lost_at is not None:
        start = f"from iteration {accepted.resumed_at}" if accepted.resumed_at else "from its beginning"
        return f"server lost at iteration {lost_at}, going on as job {accepted.job_id}", f"{start}{wait}"
    resumed = f", from iteration {accepted.resumed_at}" if accepted.resumed_at else ""
    size = f"{accepted.width}x{accepted.height}"
    return f"job {accepted.job_id}", f"{size} px, {accepted.iterations} iterations, seed {accepted.seed}{resumed}{wait}"


def _waiting(waiting: Waiting) -> str:
    return _wait(waiting.queue_position, waiting.estimated_wait_s)


def _wait(position: int, seconds: float | None) -> str:
    about = f", about {_clock(seconds)}" if seconds is not None else ""
    return f"waits at place {position} of the queue{about}"


def _controlled(update: Paused | Resumed | Changed) -> str:
    match update:
        case Paused():
            return f"paused after iteration {update.iteration}"
        case Resumed():
            return f"goes on after iteration {update.iteration}"
        case Changed():
            recipe = update.recipe
            return (
                f"changed from iteration {update.iteration} of {update.iterations} on: alpha {recipe.alpha:g}, "
                f"beta {recipe.beta:g}, tv-weight {recipe.tv_weight:g}, step {recipe.step:g}"
            )


def _progress(progress: Progress) -> Iterable[tuple[str, int]]:
    """The parts of a progress line, each with its rank: where there is too little room, the last rank goes first."""
    yield f"{progress.iteration}/{progress.iterations}", 0
    if progress.scales > 1:  # 0: the server is too old to report it
        yield f"scale {progress.scale}/{progress.scales}", 1
    yield f"{progress.width}x{progress.height} px", 3
    if progress.time_left_s is not None:
        yield f"{_clock(progress.time_left_s)} left", 2
    yield f"loss {progress.losses.total:.4g}", 4
    if progress.iterations_per_second > 0:
        yield f"{progress.iterations_per_second:.3g} it/s", 5


def _result(result: Result) -> str:
    size = f"{result.picture.width}x{result.picture.height} px"
    return f"{size}, {result.iterations} iterations in {result.elapsed_s:.1f} s, loss {result.losses.total:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
