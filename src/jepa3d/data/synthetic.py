"""Generate the built-in labelled shapes: random everyday objects with part labels.

A *builder* is a function that makes one random shape, with z up. For each part of the shape, the
builder yields a tuple `(part name, *lofts)`. A loft is a surface (see lofts.py). The front of
furniture is at -y. The unit of length does not matter, since shapes are normalised afterwards.

Similar classes have builders made by the same function (`_slab`, `_cabinet` or `_vessel`). These
classes differ in a few parts or in the ranges of their sizes, and many of the ranges overlap. There
are three groups of similar classes (see `_CLASSES`):

- stool, chair, bench, sofa, table and desk;
- bowl, cup, mug and bathtub;
- dresser and wardrobe.
"""

from collections.abc import Callable, Iterator

import numpy as np

from jepa3d.data.cloud import sample_triangles
from jepa3d.data.lofts import (
    CORNERS,
    Loft,
    Rng,
    bezier,
    box,
    lathe,
    normalise,
    triangles_of,
    tube,
    turn,
)

MAX_STRETCH = 0.1  # each axis is scaled by a random factor from 0.9 to 1.1
# Each shape, scaled to radius 1, gets noise on every coordinate. The standard deviation of this
# noise is drawn once per shape, from this range.
NOISE = (0.002, 0.006)
OCCLUDED_SHAPES = 0.3  # probability that a shape loses a region
MAX_OCCLUSION = 0.25  # largest share of its points that a shape loses with this region

Draw = Callable[[float, float], float]  # rng.uniform: low, high -> random number
Range = tuple[float, float]
# tuples (part name, loft, loft, ...); if there are no lofts, the shape lacks this part
Parts = Iterator[tuple]

_SIDES = np.array([-1, 1])


def _legs(rng: Rng, width: float, depth: float, height: float) -> list[Loft]:
    """Make four legs under a top of `width` x `depth`: straight or splayed, tapering downwards."""
    thick, taper = rng.uniform(0.03, 0.08), rng.uniform(1, 2)
    splay = max(1, rng.uniform(0.8, 1.2))
    size = (thick / taper, thick / taper, height)
    tops = CORNERS * (0.45 * width, 0.45 * depth)
    return [box((*top * splay, 0), size, taper, top * (1 - splay)) for top in tops]


def _support(rng: Rng, width: float, depth: float, height: float, column: bool) -> list[Loft]:
    """Make a support: four legs, two end panels or, if `column` is True, perhaps a central column.

    The column stands on a round foot or on a star of five feet.
    """
    kind = rng.integers(6 if column else 4)
    thick, radius = rng.uniform(0.03, 0.06), rng.uniform(0.3, 0.5) * depth
    if kind < 3:
        return _legs(rng, width, depth, height)
    if kind == 3:
        panel = (thick, 0.9 * depth, height)
        return [box((side * 0.45 * width, 0, 0), panel) for side in _SIDES]
    if kind == 4:
        round_foot = [(0, 0), (radius, 0), (radius / 2, 0.05), (thick, 0.06)]
        return [lathe([*round_foot, (thick, height)])]
    foot = tube([(0, 0, height / 8), (radius, 0, 0)], 0.03)
    feet = [turn(foot, i * 2 * np.pi / 5) for i in range(5)]
    return [tube([(0, 0, 0), (0, 0, height)], thick), *feet]


def _back(
    rng: Rng, width: float, rear: float, foot: float, height: float, thick: float
) -> list[Loft]:
    """Make an upright or leaning backrest at y = `rear`: a panel, or posts with a rail.

    foot: height of the lower edge above the ground. height: from the lower to the upper edge.
    thick: thickness of the panel, or of the posts and the rail.
    """
    posts, lean = rng.integers(0, 7), max(0, rng.uniform(-0.2, 0.25)) * height
    low = rng.uniform(0.5, 0.9)
    if posts < 2 or thick > 0.1:
        taper = rng.uniform(0.7, 1)
        return [box((0, rear, foot), (width, thick, height), taper, (0, lean))]
    at = (0, rear + low * lean, foot + low * height)
    rail = box(at, (width, thick, (1 - low) * height))
    xs = np.linspace(-0.46, 0.46, posts) * width
    post = (0.05, thick, height)
    return [rail, *(box((x, rear, foot), post, 1, (0, lean)) for x in xs)]


def _slab(
    top: str, *size: Range, soft: float = 0, back: float = 0, boxes: int = 0
) -> Callable[[Rng, Draw], Parts]:
    """Return a builder of seats and tables: a slab on a support.

    top: part name of the slab. size: ranges of width, depth and height. soft: extra thickness of
    the slab. back: probability of a backrest. boxes: largest number of drawers.
    """

    def build(rng: Rng, u: Draw) -> Parts:
        thick = soft + u(0.03, 0.12)
        width, depth, height = (u(*limits) for limits in size)
        compact = width < 1.4 * depth
        profile = [(0, 0), (1, 0), (1, thick), (0, thick)]
        power = rng.choice([2, 20, 20]) if compact else 20
        yield top, lathe(profile, (0, 0, height), (width / 2, depth / 2), power)
        yield "leg", *_support(rng, width, depth, height, compact)
        if rng.random() < back:
            pad = 0.02 + thick / 2
            tall = thick + u(0.25, 0.8)
            yield "back", *_back(rng, width, 0.48 * depth, height, tall, pad)
            arm = (pad, depth, thick + u(0.1, 0.25))
            xs = 0.48 * width * _SIDES[: rng.choice([0, 2])]
            yield "arm", *(box((x, 0, height), arm) for x in xs)
        if boxes:
            chest = (u(0.2, 0.4) * width, 0.9 * depth, u(0.3, 1) * height)
            xs, low = 0.3 * width * _SIDES[: rng.integers(1, boxes + 1)], height - chest[2]
            yield "drawer", *(box((x, 0, low), chest) for x in xs)

    return build


def _bed(rng: Rng, u: Draw) -> Parts:
    width, length = u(0.8, 1.9), u(1.6, 2.1)
    leg, frame, soft = u(0.02, 0.35), u(0.08, 0.3), u(0.1, 0.3)
    top = leg + frame + soft
    base = box((0, 0, leg), (width, length, frame))
    yield "frame", base, *_legs(rng, width, length, leg)
    yield "mattress", box((0, 0, leg + frame), (0.95 * width, 0.97 * length, soft))
    if rng.random() < 0.8:
        yield "headboard", *_back(rng, width, length / 2, 0, top + u(0.1, 0.6), 0.06)
    pillow = (0.4 * width, 0.4, u(0.05, 0.15))
    xs = ((), (0,), (-0.25, 0.25))[rng.integers(3)]
    yield "pillow", *(box((x * width, 0.36 * length, top), pillow, 0.8) for x in xs)


def _cabinet(
    front: str, heights: Range, columns: tuple[int, int], rows: tuple[int, int]
) -> Callable[[Rng, Draw], Parts]:
    """Return a builder of a chest of width 1 on legs, with a grid of drawers or doors at -y.

    front: part name of the drawers or doors; each has a knob. heights: range of the height.
    columns, rows: ranges of the numbers of columns and rows; the upper end of a range is excluded.
    """

    def build(rng: Rng, u: Draw) -> Parts:
        height, nx, nz = u(*heights), rng.integers(*columns), rng.integers(*rows)
        depth, leg, out = u(0.3, 0.7), u(0.02, 0.25), u(0.02, 0.06)
        gap, knob = u(0.03, 0.07), u(0.03, 0.06)
        w, h, y = 1 / nx, height / nz, -(depth + out) / 2
        xs, zs = (np.arange(nx) + 0.5) * w - 0.5, leg + np.arange(nz) * h + gap / 2
        spots = [(x, y, z) for x in xs for z in zs]
        yield "body", box((0, 0, leg), (1, depth, height))
        yield "leg", *_legs(rng, 1, depth, leg)
        yield front, *(box(spot, (w - gap, out, h - gap)) for spot in spots)
        knobs = [(x, y - out, z + h / 2) for x, y, z in spots]
        yield "knob", *(box(at, (knob, 2 * knob, knob)) for at in knobs)

    return build


def _bookshelf(rng: Rng, u: Draw) -> Parts:
    height, depth, leg = u(0.7, 2.2), u(0.25, 0.6), u(0.02, 0.2)
    count = rng.integers(3, 7)
    levels, step = np.linspace(leg, leg + height, count, retstep=True)
    yield "board", *(box((0, 0, z), (1, depth, 0.04)) for z in levels)
    size = (0.04, depth, leg + height + 0.04)
    yield "side", *(box((side / 2, 0, 0), size) for side in _SIDES)
    if rng.random() < 0.6:
        yield "back", box((0, depth / 2, leg), (1, 0.02, height))
    filled = levels[:-1][rng.random(count - 1) < 0.5]
    row = (u(0.2, 0.5), 0.7 * depth, u(0.6, 0.9) * step)
    yield "book", *(box((u(-0.2, 0.2), 0, z), row) for z in filled)


def _vessel(
    tall: Range, long: Range = (1, 1), foot: float = 0, dish: float = 0, ear: float = 0
) -> Callable[[Rng, Draw], Parts]:
    """Return a builder of open vessels. The rim has radius 1 before the body is stretched in x.

    tall: range of the height. long: range of the factor by which the body is stretched in x. foot:
    probability of a foot. dish: probability of a saucer if there is no foot. ear: probability of a
    handle.
    """

    def build(rng: Rng, u: Draw) -> Parts:
        height, base = u(*tall), u(0.4, 0.9)
        outer = bezier((base, 0), (u(0.7, 1.2), u(0.2, 0.6) * height), (1, height))
        inner = [(0, 0.06), (base - 0.06, 0.06), *outer[1:] - (0.06, 0)][::-1]
        scale, power = (u(*long), 1), rng.choice([2, 2, 4])
        yield "body", lathe([(0, 0), *outer, *inner], scale=scale, power=power)
        if rng.random() < foot:
            drop = u(0.1, 0.8)
            curve = (u(0.5, 0.9), -drop), (0, -drop), (0.15, -drop / 2), (0.8 * base, 0)
            yield "foot", lathe(bezier(*curve))
        elif rng.random() < dish:
            rim = (u(1.2, 1.7), 0.1)
            yield "saucer", lathe([(0, -0.05), (0.7, -0.05), rim, (0.7, 0), (0, 0)])
        if rng.random() < ear:
            low, high, reach = u(0.15, 0.4) * height, u(0.6, 0.9) * height, u(1.5, 2.2)
            path = (0.85, 0, low), (reach, 0, low), (reach, 0, high), (0.85, 0, high)
            yield "handle", tube(bezier(*path), u(0.08, 0.16))

    return build


def _vase(rng: Rng, u: Draw) -> Parts:
    height, neck, slim, belly = u(1.2, 2.4), u(0.2, 0.9), u(0.3, 0.7), u(0.8, 1.8)
    side = bezier((u(0.4, 0.9), 0), (belly, u(0.3, 0.8) * height), (slim, height))
    yield "body", lathe([(0, 0), *side])
    curve = (slim, 0), (slim, neck / 2), (u(0.9, 1.8) * slim, neck)
    yield "neck", lathe(bezier(*curve), (0, 0, height))


def _bottle(rng: Rng, u: Draw) -> Parts:
    wide, slim, body, neck = u(0.3, 0.55), u(0.12, 0.28), u(0.7, 1.6), u(0.1, 0.6)
    shoulder, end = body + 0.3, body + 0.3 + neck
    bend = (slim, body + u(0, 0.2))
    side = bezier((wide, body), (wide, body + 0.15), bend, (slim, shoulder))
    base = (u(0.8, 1) * wide, 0)
    yield "body", lathe([(0, 0), base, *side], power=rng.choice([2, 2, 6]))
    yield "neck", lathe([(slim, shoulder), (u(0.8, 1.1) * slim, end), (0, end)])
    if rng.random() < 0.5:
        path = [(0, 0, end - 0.05), (0, 0, end + u(0.05, 0.2))]
        yield "cap", tube(path, u(1, 1.3) * slim)


def _airplane(rng: Rng, u: Draw) -> Parts:
    radius, x, chord = u(0.07, 0.18), u(-0.2, 0.3), u(0.2, 0.5)
    span, sweep = u(0.5, 1.3), u(-0.6, 0.1)
    hull = radius * np.array([0.2, 0.6, 0.9, 1, 1, 1, 1, 0.8, 0.2])
    yield "body", tube(np.linspace((-1, 0, 0), (1, 0, 0), 9), hull)
    at, size, taper = (x, u(-0.8, 0.8) * radius, 0), (chord, 0.04, span), u(0.3, 1)
    # `box` extends from its base along z; swapping y and z makes wing and tail extend along y
    wing = box(at, size, taper, (sweep, u(-0.05, 0.15)))[..., [0, 2, 1]]
    yield "wing", wing, wing * (1, -1, 1)
    height, level = u(0.2, 0.5), rng.choice([0, 0.9])
    size = (u(0.15, 0.3), 0.03, u(0.2, 0.5))
    tail = box((-0.9, level * height, 0), size, 0.7, (-0.1, 0))[..., [0, 2, 1]]
    fin = box((-0.85, 0, 0), (u(0.2, 0.4), 0.03, height), 0.6, (-0.15, 0))
    yield "tail", tail, tail * (1, -1, 1), fin
    pod = tube([(0, 0, -0.08), (0.3, 0, -0.08)], u(0.05, 0.09))
    places = (0.35, 0.65)[: rng.integers(3)]
    spots = [(x + sweep * t, side * t * span, 0) for t in places for side in _SIDES]
    yield "engine", *(pod + spot for spot in spots)


def _rocket(rng: Rng, u: Draw) -> Parts:
    radius, body, nose, chord = u(0.1, 0.3), u(1, 2), u(0.2, 0.8), u(0.2, 0.7)
    span = u(0.15, 0.6)
    yield "body", tube([(0, 0, 0), (0, 0, body)], [u(0.7, 1.1) * radius, radius])
    curve = (radius, body), (radius, body + nose / 2), (0, body + nose)
    yield "nose", lathe(bezier(*curve))
    size, taper = (chord, 0.04, radius + span), u(0.3, 1)
    fin = box((chord / 2, 0, 0), size, taper, (u(-0.4, 0.1), 0))[..., [2, 1, 0]]
    angles = np.linspace(0, 2 * np.pi, rng.integers(4, 7))[1:]
    yield "fin", *(turn(fin, angle) for angle in angles)


def _car(rng: Rng, u: Draw) -> Parts:
    length, width, height = u(1.6, 2.2), u(0.7, 1), u(0.25, 0.5)
    wheel, axle = u(0.13, 0.24), u(0.27, 0.38)
    yield "body", box((0, 0, 0.8 * wheel), (length, width, height), u(0.85, 1))
    cabin = (u(0.3, 0.9) * length, 0.85 * width, u(0.2, 0.5))
    at = (u(-0.5, 0.5) * (length - cabin[0]), 0, 0.8 * wheel + height)
    yield "cabin", box(at, cabin, u(0.6, 0.95), (u(-0.1, 0.1), 0))
    tire = tube([(0, -0.07, wheel), (0, 0.07, wheel)], wheel)
    places = [(x * axle * length, y * width / 2, 0) for x, y in CORNERS]
    yield "wheel", *(tire + place for place in places)


def _lamp(rng: Rng, u: Draw) -> Parts:
    height, radius, foot = u(0.5, 2), u(0.2, 0.5), u(0.04, 0.3)
    bend = max(0, u(-0.7, 0.7))
    power, wide, tall = rng.choice([2, 8]), u(0.25, 0.6), u(0.15, 0.3)
    over = height + bend
    rows = [(0, 0), (radius, 0), (u(0.2, 1) * radius, foot), (0, foot)]
    yield "base", lathe(rows, power=power)
    path = (0, 0, 0), (0, 0, over), (bend, 0, over), (bend, 0, height)
    yield "pole", tube(bezier(*path), u(0.02, 0.06))
    yield "shade", lathe([(wide, -tall), (u(0.2, 1) * wide, tall)], (bend, 0, height))


def _laptop(rng: Rng, u: Draw) -> Parts:
    depth, thick, screen = u(0.55, 0.9), u(0.02, 0.08), u(0.5, 0.85)
    angle = u(-0.3, 0.7)
    size, lean = (1, u(0.02, 0.05), screen * np.cos(angle)), (0, screen * np.sin(angle))
    yield "base", box((0, 0, 0), (1, depth, thick))
    yield "screen", box((0, depth / 2, thick), size, lean=lean)


_SEAT = "arm back leg seat"
# class -> its part names, and its builder, which is called with (rng, rng.uniform)
_CLASSES: dict[str, tuple[str, Callable[[Rng, Draw], Parts]]] = {
    "airplane": ("body engine tail wing", _airplane),
    "bathtub": ("body foot", _vessel((0.7, 1.4), long=(1.5, 2.5), foot=0.3)),
    "bed": ("frame headboard mattress pillow", _bed),
    "bench": (_SEAT, _slab("seat", (0.9, 2), (0.3, 0.5), (0.3, 0.6), back=0.5)),
    "bookshelf": ("back board book side", _bookshelf),
    "bottle": ("body cap neck", _bottle),
    "bowl": ("body foot", _vessel((0.4, 1), foot=0.5)),
    "car": ("body cabin wheel", _car),
    "chair": (_SEAT, _slab("seat", (0.4, 0.8), (0.4, 0.6), (0.3, 0.7), back=1)),
    "cup": ("body foot saucer", _vessel((0.9, 2.4), foot=0.5, dish=0.7)),
    "desk": ("drawer leg top", _slab("top", (1, 2), (0.5, 0.9), (0.5, 0.9), boxes=2)),
    "dresser": ("body drawer knob leg", _cabinet("drawer", (0.5, 1.4), (1, 4), (2, 6))),
    "lamp": ("base pole shade", _lamp),
    "laptop": ("base screen", _laptop),
    "mug": ("body handle", _vessel((0.9, 2.4), ear=1)),
    "rocket": ("body fin nose", _rocket),
    "sofa": (_SEAT, _slab("seat", (0.8, 2), (0.6, 1), (0.1, 0.2), soft=0.2, back=1)),
    "stool": ("leg seat", _slab("seat", (0.3, 0.6), (0.3, 0.5), (0.4, 1))),
    "table": ("leg top", _slab("top", (0.7, 2), (0.6, 1.1), (0.4, 0.9))),
    "vase": ("body neck", _vase),
    "wardrobe": ("body door knob leg", _cabinet("door", (1.1, 2.4), (1, 5), (1, 2))),
}
CLASS_NAMES: tuple[str, ...] = tuple(_CLASSES)
PART_NAMES: tuple[str, ...] = tuple(
    f"{name}/{part}" for name, (parts, _) in _CLASSES.items() for part in parts.split()
)


def make_shape(label: int, num_points: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Make a random shape of class `label`, with a random yaw, a mild stretch and noise.

    Returns two arrays: the points [num_points, 3] float32 (z up, centroid 0, farthest point at
    distance 1), and their parts [num_points] int16 (indices into `PART_NAMES`). Some shapes are
    occluded: all points beyond a plane or in a ball are removed. For such a shape, more points are
    sampled at first, so that `num_points` remain.
    """
    name, triangles, parts = CLASS_NAMES[label], [], []
    for part, *lofts in _CLASSES[name][1](rng, rng.uniform):
        for loft in lofts:
            number = PART_NAMES.index(f"{name}/{part}")
            triangles.append(triangles_of(loft))
            parts.append(np.full(len(triangles[-1]), number, np.int16))

    lost = rng.uniform(0, MAX_OCCLUSION) if rng.random() < OCCLUDED_SHAPES else 0
    count = int(np.ceil(num_points / (1 - lost)))
    points, chosen = sample_triangles(np.concatenate(triangles), count, rng)
    points = normalise(points * rng.uniform(1 - MAX_STRETCH, 1 + MAX_STRETCH, 3))
    plane = points @ rng.normal(size=3)
    ball = -np.linalg.norm(points - points[0], axis=1)
    near = np.argsort(plane if rng.random() < 0.5 else ball)[:num_points]
    kept = np.sort(near)  # in the order of sampling

    points = turn(points[kept], rng.uniform(0, 2 * np.pi))
    noise = rng.normal(scale=rng.uniform(*NOISE), size=points.shape)
    points = normalise(points + noise)
    return points.astype(np.float32), np.concatenate(parts)[chosen[kept]]


def make_shapes(num_shapes: int, num_points: int = 1024, seed: int = 0) -> dict[str, np.ndarray]:
    """Make a balanced data set; the class of shape i is i modulo the number of classes.

    Returns a dict of arrays: "points" [n, num_points, 3] float32, "labels" [n] int64, and "parts"
    [n, num_points] int16. For a given `num_points`, shape i depends only on (seed, i), so a longer
    set begins with the shapes of a shorter set.
    """
    labels = np.arange(num_shapes) % len(CLASS_NAMES)
    points = np.empty((num_shapes, num_points, 3), np.float32)
    parts = np.empty((num_shapes, num_points), np.int16)
    for i, label in enumerate(labels.tolist()):
        rng = np.random.default_rng([seed, i])
        points[i], parts[i] = make_shape(label, num_points, rng)
    return {"points": points, "labels": labels, "parts": parts}
