"""A short film made from the frames of a stream."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

from PIL import Image

from gramophone_client.types.picture import Picture, write_atomically

__all__ = ["Timelapse", "film_format"]

MAX_SIDE = 360  # pixels: 120 frames take 47 MB in memory, and about 10 MB as a GIF
MAX_FRAMES = 120
FILM_MS = 6000  # without the last picture
FRAME_MS = (40, 200)  # shortest, longest; many viewers slow down GIFs with less than 20 ms
LAST_MS = 2500


def film_format(path: str | os.PathLike[str]) -> Literal["gif", "webp"]:
    """The format of a film's file name, by its suffix. Raises ValueError for any other suffix."""
    match Path(path).suffix.lower():
        case ".gif":
            return "gif"
        case ".webp":
            return "webp"
        case suffix:
            raise ValueError(f"{os.fspath(path)}: the name must end in .gif or .webp, got {suffix or 'no suffix'!r}")


class Timelapse:
    """Collects frames in bounded memory. When it is full, it drops every second frame, and from then on adds half as
    many.

    `size` is the result's (width, height) in pixels. The film has the same proportions, with at most `max_side` pixels.
    """

    def __init__(self, size: tuple[int, int], *, max_side: int = MAX_SIDE, max_frames: int = MAX_FRAMES) -> None:
        scale = min(1.0, max_side / max(size))
        self.size: tuple[int, int] = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        self.frames: list[Image.Image] = []
        self._max_frames = max_frames
        self._every = 1  # 2: every second frame is added
        self._seen = 0

    def add(self, picture: Picture) -> None:
        """Adds the next frame, in the size of any scale."""
        if self._seen % self._every == 0:
            if len(self.frames) == self._max_frames:
                del self.frames[1::2]
                self._every *= 2
            if self._seen % self._every == 0:
                self.frames.append(self._reduced(picture))
        self._seen += 1

    def save(self, path: str | os.PathLike[str], last: Picture) -> None:
        """Writes the film atomically. It ends with `last`, shown for `LAST_MS`, and repeats."""
        frames = [*self.frames, self._reduced(last)]
        shortest, longest = FRAME_MS
        each_ms = min(longest, max(shortest, FILM_MS // len(frames) // 10 * 10))  # GIF has units of 10 ms
        durations = [each_ms] * (len(frames) - 1) + [LAST_MS]
        out = io.BytesIO()
        if film_format(path) == "gif":
            palette = _palette(frames)
            frames = [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
            # Without `palette`, Pillow would store the same one with every frame.
            frames[0].save(
                out,
                "gif",
                save_all=True,
                append_images=frames[1:],
                duration=durations,
                loop=0,
                palette=palette.palette,
            )
        else:
            frames[0].save(
                out, "webp", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80, method=2
            )
        write_atomically(path, out.getvalue())

    def _reduced(self, picture: Picture) -> Image.Image:
        image = Image.open(io.BytesIO(picture.data))
        image.draft("RGB", self.size)  # lets JPEG decode at a fraction of its size
        return image.convert("RGB").resize(self.size, Image.Resampling.LANCZOS)


def _palette(frames: list[Image.Image]) -> Image.Image:
    """256 colours for the whole film, because a palette per frame would flicker.

    Chosen from a sheet of eight frames. Half of them are the last picture, which is shown longest.
    """
    width, height = (max(1, side // 2) for side in frames[0].size)
    chosen = [frames[i * (len(frames) - 1) // 4] for i in range(4)] + [frames[-1]] * 4
    sheet = Image.new("RGB", (4 * width, 2 * height))
    for i, frame in enumerate(chosen):
        sheet.paste(frame.resize((width, height)), (i % 4 * width, i // 4 * height))
    return sheet.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
