"""The tools that the pictures are painted with: pixel coordinates, palettes, noise, light, and a brush."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Random = np.random.Generator
HEIGHT = 0.78  # of each picture, in widths


def canvas(width: int) -> tuple[Array, Array]:
    """The coordinates x and y of all pixels, in widths."""
    y, x = (np.mgrid[0 : round(width * HEIGHT), 0:width] + 0.5) / width
    return x, y


def ramps(*rows: str) -> Array:
    """Colours written as RRGGBB, a row of them per ramp from dark to light: [ramp, colour, channel] in [0, 1]."""
    table: Array = np.array([[list(bytes.fromhex(colour)) for colour in row.split()] for row in rows]) / 255
    return table


def mixed(ramps: Array, which: Array, tone: Array) -> Array:
    """The colours of one of the ramps at each tone in [0, 1]."""
    place = tone.clip(0, 0.999) * (ramps.shape[1] - 1)
    row, low, rest = which.astype(int), place.astype(int), (place % 1)[..., None]
    colours: Array = ramps[row, low] * (1 - rest) + ramps[row, low + 1] * rest
    return colours


def resized(field: Array, shape: Sequence[int]) -> Array:
    image = Image.fromarray(field.astype(np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC), np.float64)


def noise(random: Random, shape: Sequence[int], rows: int, columns: int, octaves: int = 1) -> Array:
    """Smooth noise of mean 0 and deviation 1, from a grid of rows x columns that doubles with each octave."""
    grids = [random.standard_normal((rows << k, columns << k)) for k in range(octaves)]
    total: Array = np.sum([resized(grid, shape) * 0.55**k for k, grid in enumerate(grids)], axis=0)
    total = total - total.mean()
    return np.asarray(total / total.std())


def softened(field: Array, passes: int) -> Array:
    for axis in [0, 1] * passes:
        field = (np.roll(field, 1, axis) + 2 * field + np.roll(field, -1, axis)) / 4
    return field


def inside(field: Array) -> Array:
    """The part of each pixel where the field is positive: a mask with smooth edges."""
    down, right = np.gradient(field)
    return np.asarray((0.5 + field / (np.hypot(down, right) + 1e-9)).clip(0, 1))


def lit(colour: Array, relief: Array, gloss: float) -> Array:
    """A surface with light from the upper left."""
    down, right = np.gradient(relief)
    slope = np.expand_dims(right + down, -1)
    return np.asarray(colour * (1 + slope.clip(-0.5, 0.4)) + gloss * (slope - 0.12).clip(0, 0.5))


def rolled(x: Array, y: Array, curls: Sequence[tuple[float, float, float, float]]) -> tuple[Array, Array]:
    """The coordinates, turned around each curl's (x, y, radius, angle); the turn fades beyond the radius."""
    for cx, cy, radius, turn in curls:
        u, v = x - cx, y - cy
        a = turn * np.exp(-(u**2 + v**2) / radius**2)
        x, y = cx + np.cos(a) * u - np.sin(a) * v, cy + np.sin(a) * u + np.cos(a) * v
    return x, y


class Coat(NamedTuple):
    """A layer of brush strokes."""

    strokes: int
    breadth: float
    length: float
    lift: float  # added to the tone
    least: float = -9  # smallest tone of the places that are painted


def apply_coat(random: Random, colour: Array, relief: Array, guide: Array, ramps: Array, coat: Coat) -> None:
    """Paints strokes into `colour` and `relief`. Each is a ribbon of bristles with two tones.

    `guide` has five values per pixel: the index of its ramp of colours, the angle of a stroke, the tone, the index of a
    second ramp, and the share of strokes in colours of that one.
    """
    (rows, width), points, batch = relief.shape, 33, 40
    along, across = round(1.5 * coat.length * width), round(1.6 * coat.breadth * width) + 2
    s, t = np.linspace(-1, 1, along)[:, None], np.linspace(-1, 1, across)

    def guide_at(xy: Array) -> Array:
        column, row = xy.astype(int).T
        return guide[:, row.clip(0, rows - 1), column.clip(0, width - 1)]

    for _ in range(coat.strokes // batch):
        start = random.uniform(-0.03, [1.03, HEIGHT + 0.03], (batch, 2)) * width
        size, (home, _, tone, guest, chance) = random.uniform(0.65, 1.15, batch), guide_at(start)
        paint = np.where(random.random(batch) < chance, guest, home)
        path, reach = np.empty((batch, points, 2)), np.zeros((2, batch))
        for way in (-1, 1):  # from the middle to both ends, or to the edge of another ramp's area
            xy, going = start, np.full(batch, True)
            for k in range(points // 2 + 1):
                path[:, points // 2 + way * k] = xy
                there, angle = guide_at(xy)[:2]
                going &= there == home
                reach[max(way, 0)] += going / (points // 2)
                step = way * size * coat.length * width / points
                xy = xy + np.stack([np.cos(angle) * step, np.sin(angle) * step], axis=1)
        kept = (tone + 0.05 * random.standard_normal(batch) > coat.least) & (reach.sum(0) > 0.5)
        size, tone, paint, first, last = (z[kept, None, None] for z in (size, tone, paint, *reach))
        path, n = path[kept], int(kept.sum())
        at = np.linspace(0, points - 1.001, along)
        centre = path[:, at.astype(int)] * (1 - at % 1)[:, None] + path[:, at.astype(int) + 1] * (at % 1)[:, None]
        way = np.gradient(centre, axis=1)
        way /= np.hypot(way[..., :1], way[..., 1:]) + 1e-9
        side = 0.5 * coat.breadth * width * size * np.minimum(1, 2.5 + 2 * s) * (1 - 0.12 * (s + 1) ** 2) * t
        px, py = centre[..., :1] - way[..., 1:] * side, centre[..., 1:] + way[..., :1] * side
        bristle = np.array([resized(random.standard_normal((2, 9)), (along, across)) for _ in range(n)])
        ragged = np.array([resized(random.standard_normal((2, 12)), (1, across)) for _ in range(n)])
        cap = coat.breadth / coat.length * (1 - np.sqrt(1 - t**2))
        wet = (s > cap - first) & (s < last * (0.9 + 0.12 * ragged) - cap)
        wet &= (px >= 0) & (px < width) & (py >= 0) & (py < rows)
        load = (0.6 * t * random.choice([-1, 1], (n, 1, 1)) + 0.35 * bristle).clip(-0.5, 0.5)
        tone = tone + coat.lift + 0.09 * random.standard_normal((n, 1, 1)) + 0.26 * load + 0.035 * bristle
        body = (0.55 + 0.25 * bristle + 0.5 * t**2) * (1 - t**8) * (0.85 - 0.25 * s) + 0.2 * random.random((n, 1, 1))
        spots = py[wet].astype(int), px[wet].astype(int)
        colour[spots] = mixed(ramps, np.broadcast_to(paint, wet.shape)[wet], tone[wet])
        relief[spots] = body[wet]
