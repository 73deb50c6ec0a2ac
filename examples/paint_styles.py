"""Paints the three style pictures of the examples: a valley in brush strokes, a stained-glass window, a woodcut sea.

    python examples/paint_styles.py                                      # writes examples/styles again, bit for bit
    python examples/paint_styles.py --only woodcut --size 2048 --output /tmp

Positions and lengths are in widths of the picture, so that the composition is the same at every size. Each picture has
a fixed seed, is painted at twice its size, and is then reduced.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from brushes import (
    Array,
    Coat,
    Flags,
    Random,
    apply_coat,
    canvas,
    inside,
    lit,
    mixed,
    noise,
    ramps,
    resized,
    rolled,
    softened,
)
from PIL import Image

# ---------------------------------------------------------------------------------------------------------- brushwork

PAINTS = ramps(
    "0b1440 17297c 1f4ba6 2b7dc0 62b3cc aadace f6ecc8",
    "2a1a5e 552f8c 96489a d4697c f09a68 fac882 fff0c8",
    "7a1f2b c4431d ea7f1c f9ae2f fdd45f ffefa8 fffbe6",
    "0f1b3d 17414f 1f605c 33805f 74a45c b8bf66 e8da8a",
    "081426 0d2d3a 144a40 2a6c40 5a9045 9ab04e dcd274",
    "4a1d2a 85391f b5641f d8922c eebb4a f8da7e fff2c2",
)
NIGHT, DUSK, LAMP, HILL, TREE, WHEAT = range(6)
VORTICES = [(0.31, 0.21, 0.13, 2.6), (0.60, 0.30, 0.09, -2.4), (0.86, 0.30, 0.09, 2.3), (0.05, 0.37, 0.08, -2.0)]
LAMPS = [(0.74, 0.115, 0.062), (0.10, 0.12, 0.036), (0.45, 0.385, 0.026), (0.48, 0.07, 0.024), (0.95, 0.43, 0.028)]
TREES = [(0.02, 0.57, 0.05), (0.16, 0.585, 0.035), (0.09, 0.60, 0.058), (0.21, 0.615, 0.032), (0.66, 0.585, 0.026)]
TREES += [(0.93, 0.58, 0.06), (0.80, 0.585, 0.04), (0.73, 0.60, 0.030), (0.86, 0.61, 0.045), (0.99, 0.63, 0.05)]
COATS = [Coat(1000, 0.034, 0.15, -0.24), Coat(2200, 0.023, 0.12, -0.06), Coat(2400, 0.015, 0.095, 0.05)]
COATS += [Coat(1600, 0.010, 0.075, 0.20, least=0.45)]


def brushwork(random: Random, width: int) -> Array:
    """Evening wind over a valley, in coats of strokes, light over dark."""
    x, y = canvas(width)
    wobble = noise(random, x.shape, 5, 6, 3)
    # Sky: strokes and bands of light follow the level lines of a stream function, and turn inwards at the vortices.
    stream, turn, arms = y + 0.020 * np.sin(9 * x + 1.2) + 0.004 * wobble, 0 * x, 0 * x
    for cx, cy, r, spin in VORTICES:
        distance, around = np.hypot(x - cx, y - cy) / r, np.arctan2(y - cy, x - cx)
        near = np.exp(-(distance**2))
        stream, turn = stream + 0.5 * spin * r * near, turn + 0.5 * np.sign(spin) * near
        arms += near * np.sin(2 * np.sign(spin) * around + 7 * distance)
    down, right = np.gradient(stream)
    tone = 0.40 + 0.20 * np.sin(34 * stream + 0.5 * wobble) + 0.26 * arms + 0.05 * wobble
    dusk = np.interp(y + 0.03 * wobble + 0.03 * np.sin(7 * x), [0.29, 0.48], [0.08, 1])
    # The five values per pixel of `apply_coat`.
    guide = np.stack(np.broadcast_arrays(NIGHT, np.arctan2(-right, down) + turn, tone, DUSK, dusk))

    def lay(where: Flags, *layer: float | Array) -> None:
        guide[:] = np.where(where, np.stack(np.broadcast_arrays(*layer)), guide)

    for cx, cy, r in LAMPS:
        distance, around = np.hypot(x - cx, y - cy) / r * (1 + 0.05 * wobble), np.arctan2(y - cy, x - cx) + 1.67
        rings = 0.10 * np.cos(4.4 * np.pi * distance)
        lay(distance < 2.2 + 0.2 * wobble, NIGHT, around, 0.92 - 0.26 * distance + rings, LAMP, 1.5 - 0.7 * distance)
        lay(distance < 1, LAMP, around, 1.06 - 0.62 * distance + 1.3 * rings, LAMP, 0)
    # Land: two ridges, trees with light on one side, a field with rows that meet beyond the horizon.
    far = 0.50 + 0.035 * np.sin(6.3 * x + 0.6) + 0.018 * np.sin(15 * x)
    near = 0.575 + 0.045 * np.sin(4.4 * x + 3.6) + 0.010 * np.sin(19 * x)
    for edge, paint, guest in ((far, HILL, DUSK), (near, TREE, HILL)):
        below, slope = y - edge, np.gradient(edge, axis=1) * width
        angle = np.arctan(slope * np.exp(-5 * below)) + 0.5 * np.sin(8 * x + 30 * below)
        tone = 0.66 - 4 * below + 0.18 * np.sin(80 * below + 9 * x) + 0.08 * wobble
        lay(below > 0, paint, angle, tone, guest, 0.22)
    for cx, cy, r in TREES:
        around = np.arctan2(y - cy, x - cx)
        distance = np.hypot(x - cx, 1.15 * (y - cy)) / r * (1 + 0.10 * np.sin(5 * around + 90 * cx) + 0.05 * wobble)
        tone = 0.40 - 0.32 * (x - cx + y - cy) / r + 0.17 * np.sin(around + 8 * distance)
        lay(distance < 1, TREE, around + 1.9, tone, HILL, 0.25)
    rows = np.arctan2(y - 0.54, x - 0.56)
    tone = 0.50 + 0.22 * np.sin(30 * rows + 0.6 * wobble) + 0.10 * wobble
    poppies = 0.16 * noise(random, x.shape, 9, 12).clip(0, 1)
    furrow, field = tone < 0.36, y > 0.645 + 0.020 * np.sin(5 * x + 1.0)
    lay(field, WHEAT, rows, tone, np.where(furrow, DUSK, LAMP), np.where(furrow, 0.35, poppies))

    colour, relief = mixed(PAINTS, guide[0], guide[2] - 0.3), 0 * x
    for coat in COATS:
        apply_coat(random, colour, relief, guide, PAINTS, coat)
    return lit(colour, softened(relief, 2) * width / 1600, 0.55)


# ------------------------------------------------------------------------------------------------------ stained glass

GLASS = ramps(
    "a32a00 e86a00 ffa616 ffd95a fffbe0",
    "43001c 9c0026 e2182f ff6247 ffd6b4",
    "2c0a5e 6a1c9c b43cc0 ee84c4 ffe2f0",
    "06124f 0e3aa6 1c7ad6 62c2f0 dcf5ff",
    "013038 046674 12a49e 72e0c6 e8fff2",
    "022a1c 06603a 2a9a46 94d048 f4f8a6",
)
GOLD, RUBY, VIOLET, BLUE, SEA, GREEN = range(6)
SUN = (0.60, 0.25)
RINGS = [(0.056, 12, GOLD), (0.108, 12, GOLD), (0.160, 24, RUBY), (0.225, 24, GOLD), (0.305, 24, VIOLET)]
RINGS += [(0.385, 36, BLUE), (0.470, 36, BLUE), (0.560, 48, VIOLET), (0.650, 48, BLUE)]
FLOWERS = [(0.15, 0.545, 0.064, 7, RUBY), (0.365, 0.655, 0.050, 6, VIOLET), (0.585, 0.600, 0.046, 6, BLUE)]
FLOWERS += [(0.815, 0.600, 0.070, 8, RUBY), (0.965, 0.705, 0.050, 6, VIOLET)]


def panes(random: Random) -> Array:
    """For each pane: x and y of its centre, its kind of glass, and the number of its object."""
    made: list[tuple[float, float, int, int]] = [(*SUN, GOLD, 0)]

    def ring(x: float, y: float, radius: float, count: int, phase: float) -> list[tuple[float, float]]:
        angles = 2 * np.pi * (np.arange(count) + phase) / count
        return [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]

    def clear(x: float, y: float) -> bool:
        return all(np.hypot(x - cx, y - cy) > 2.1 * r for cx, cy, r, *_ in FLOWERS)

    def horizon(x: float) -> float:
        return 0.455 + 0.045 * math.sin(6 * x + 2.6)

    for thing, (x, y, r, petals, glass) in enumerate(FLOWERS, start=4):
        petal_spots = ring(x, y, 0.55 * r, petals, x) + ring(x, y, 1.06 * r, petals, x + 0.5)
        made += [(x, y, GOLD, thing), *((*spot, glass, thing) for spot in petal_spots)]
        made += [(*spot, GREEN, 3) for spot in ring(x, y, 1.72 * r, 2 * petals, x)]
    for k, (r, count, glass) in enumerate(RINGS):
        for x, y in ring(*SUN, r, count, 0.5 * (k % 2) + 0.03 * random.standard_normal()):
            odd = {BLUE: SEA, RUBY: VIOLET, VIOLET: BLUE, GOLD: RUBY}[glass]
            if y < horizon(x) - 0.018 and clear(x, y):
                made.append((x, y, random.choice([glass] * 4 + [odd]), 1 if k < 4 else 2))
    for row in range(11):
        for x in (np.arange(-1, 15) + 0.5 * (row % 2) + 0.15 * random.standard_normal(16)) / 12.5:
            y = horizon(x) + 0.020 + 0.036 * row + 0.010 * np.sin(11 * x + row)
            if clear(x, y):
                made.append((x, y, random.choice([GREEN] * 5 + [SEA, GOLD]), 3))
    return np.array(made)


def stained_glass(random: Random, width: int) -> Array:
    """The sun over a garden, in leaded glass."""
    pane, (x, y) = panes(random), canvas(width)
    bx, by = (z + 0.0045 * noise(random, x.shape, 8, 10, 2) for z in (x, y))
    (first, second), (own, other) = np.full((2, *x.shape), 9.0), np.zeros((2, *x.shape), int)
    for k, (px, py) in enumerate(pane[:, :2]):  # the nearest two panes of each pixel
        left, right, top, low = (int(max(z, 0) * width) for z in (px - 0.12, px + 0.12, py - 0.12, py + 0.12))
        box = np.s_[top:low, left:right]
        distance = np.hypot(bx[box] - px, by[box] - py)
        mine = distance < first[box]
        other[box] = np.where(mine, own[box], np.where(distance < second[box], k, other[box]))
        second[box] = np.where(mine, first[box], np.minimum(distance, second[box]))
        own[box], first[box] = np.where(mine, k, own[box]), np.where(mine, distance, first[box])
    gap = np.hypot(pane[own, 0] - pane[other, 0], pane[own, 1] - pane[other, 1])
    border = (second**2 - first**2) / (2 * gap)  # the distance to the middle of the lead
    half = 0.0030 + 0.0026 * (pane[own, 3] != pane[other, 3]) + 0.0007 * noise(random, x.shape, 24, 30)
    # Light: each pane has a gradient and streaks of its own, ripples, and paint that darkens it towards the lead.
    turn = random.uniform(0, 2 * np.pi, len(pane))[own]
    u, v = bx - pane[own, 0], by - pane[own, 1]
    u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    wisps = noise(random, (1024, 1024), 32, 32, 3)
    streak = wisps[(1500 * u + 99 * own).astype(int) % 1024, (7000 * v + 30 * np.sin(90 * u)).astype(int) % 1024]
    tone = random.normal(0.43, 0.14, len(pane))[own] + 3.2 * u - 0.06 * (first / 0.03) ** 2 + 0.075 * streak
    tone += 0.32 * np.exp(-6 * np.hypot(x - SUN[0], y - SUN[1])) - 0.36 * np.exp((half - border) / 0.005)
    light = lit(mixed(GLASS, pane[own, 2], tone), noise(random, x.shape, 90, 115, 2) * width / 3700, 0.5)
    # Lead: a dark rounded bar with a little light, and a halo of coloured light over it.
    rounded = softened(np.sqrt(1 - (border / half).clip(0, 1) ** 2), 3)
    lead, cover = lit(np.full(light.shape, [0.06, 0.055, 0.07]), 5 * rounded, 0.5), inside(border - half)[..., None]
    light = light * cover
    halo = np.stack([resized(resized(light[..., k], (50, 64)), x.shape) for k in range(3)], axis=-1)
    return lead * (1 - cover) + light + 0.14 * halo**2


# ------------------------------------------------------------------------------------------------------------ woodcut

PAPER, TINT, INK, RED = ramps("f4e7c9 6ea6b4 11264a d8432a")[0]
WAVES = [(0.385, 0.045, 0.130), (0.440, 0.065, 0.190), (0.525, 0.100, 0.290), (0.670, 0.150, 0.430)]
CLOUDS = [(0.17, 0.13, 0.085, 3.6), (0.36, 0.235, 0.055, -3.4), (0.93, 0.13, 0.075, -3.6), (0.40, 0.03, 0.05, 3.0)]


def woodcut(random: Random, width: int) -> Array:
    """Rolling waves under a red sun, printed from three blocks."""
    x, y = canvas(width)
    slow = noise(random, x.shape, 4, 5, 2)

    def carved(phase: Array, breadth: Array) -> Array:
        """Lines at the whole numbers of the phase; the breadth is a share of their period."""
        hand = 0.06 * noise(random, x.shape, 44, 56, 2)
        return inside(breadth + hand - 2 * np.abs(phase + hand - np.round(phase + hand)))

    # Sky: lines of wind that roll up into clouds, and a sun in stripes with its rays.
    px, py = rolled(x, y, CLOUDS)
    wind = py * 38 + 0.8 * np.sin(6 * px + 1) + 0.5 * slow
    sun = 0.112 - np.hypot(x - 0.655, y - 0.215) + 0.0012 * noise(random, x.shape, 30, 40)
    rays = carved(np.arctan2(y - 0.215, x - 0.655) * 36 / np.pi, 0.68 + 5 * sun) * inside(-0.014 - sun)
    red = inside(sun) * (1 - carved(y * 46 + 0.3 * slow, 0.05 + 6 * (y - 0.21))) + rays * inside(0.10 + sun)
    tint = carved(wind, 0.56 - 0.5 * py + 0.12 * slow + 0.10 * noise(random, x.shape, 8, 10)) * (1 - red)
    tint, ink = tint * inside(-0.012 - sun), 0 * x
    for base, rise, apart in WAVES:  # towards the viewer; each row covers the ones before
        crests = np.arange(-1, 1.4 / apart) * apart + random.uniform(0, apart)
        crests += 0.10 * apart * random.standard_normal(len(crests))
        heights = rise * random.uniform(0.8, 1.15, len(crests))
        curls = [(c + 0.10 * apart, base - 0.62 * h, 0.30 * apart, -3.6) for c, h in zip(crests, heights, strict=True)]
        px, py = rolled(x, y + 0.002 * noise(random, x.shape, 20, 26), curls)
        bumps = [h * np.exp(-(((px - c) / (0.30 * apart)) ** 2)) for c, h in zip(crests, heights, strict=True)]
        depth = py - base - 0.3 * rise + 1.3 * np.sum(bumps, axis=0)
        body, period = inside(depth), 0.10 * rise + 0.0075
        outline = inside(0.0025 + 0.02 * rise - np.abs(depth))
        shade = 0.10 + 0.55 * (depth / (7 * period)).clip(0, 1) + 0.14 * noise(random, x.shape, 10, 13)
        foam = inside(depth - 1.5 * period + 0.3 * period * noise(random, x.shape, 40, 50))
        ink = np.maximum(ink * (1 - body) + carved(depth / period, shade) * body, outline)
        tint, red = tint * (1 - body) + foam * body, red * (1 - body)
    picture, grain = np.full((*x.shape, 3), PAPER), 0.92 + 0.05 * noise(random, x.shape, 300, 24, 2)
    for block, colour in ((red, RED), (tint, TINT), (ink, INK)):
        printed = (block * grain.clip(0.6, 1))[..., None]
        picture = picture * (1 - printed) + printed * colour * (0.4 + 0.6 * picture)
    return picture


PICTURES = {"brushwork": (7, brushwork), "stained_glass": (3, stained_glass), "woodcut": (5, woodcut)}  # with seeds


def main() -> None:
    parser = argparse.ArgumentParser(description="Paint the style pictures.")
    parser.add_argument("--only", choices=PICTURES, help="paint this picture alone")
    parser.add_argument("--size", type=int, default=1024, help="longest side in pixels (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "styles", help="folder to write to")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else PICTURES:
        seed, paint = PICTURES[name]
        picture = paint(np.random.default_rng(seed), 2 * options.size).clip(0, 1) * 255
        image = Image.fromarray(picture.round().astype(np.uint8)).reduce(2)
        image.save(options.output / f"{name}.jpg", quality=90, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
