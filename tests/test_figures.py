"""Contact sheets: they show the whole cloud whatever the order of its points, keep the start of
each caption, and are small files.
"""

import io

import numpy as np
import pytest
from PIL import Image

from jepa3d import figures
from jepa3d.evaluation.curve import Curve
from jepa3d.figures import draw_contact_sheet

RNG = np.random.default_rng(0)


def sheet(clouds: list[np.ndarray], titles: list[str]) -> bytes:
    file = io.BytesIO()
    draw_contact_sheet(clouds, titles, file)
    return file.getvalue()


def extent(png: bytes) -> np.ndarray:
    """Return the first and last row and column that contain the drawn cloud."""
    ink = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[:190] < 240).any(2)
    return np.concatenate([np.flatnonzero(ink.any(axis))[[0, -1]] for axis in (0, 1)])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("count", [300, 8192, 50_000])
def test_a_sorted_scan_is_drawn_whole(axis, count):
    cloud = RNG.uniform(-1, 1, (count, 3)) * [1, 0.7, 0.5]
    in_order = cloud[np.argsort(cloud[:, axis])]
    some, all_of_it = extent(sheet([in_order], ["a"])), extent(sheet([cloud], ["a"]))
    assert np.abs(some - all_of_it).max() <= 12  # in pixels; the picture has 190


@pytest.mark.parametrize(
    "cloud", [np.zeros((5, 3)), np.eye(3)[:1], np.arange(6.0).reshape(2, 3), np.full((9, 3), 1e8)]
)
def test_clouds_without_extent_are_drawn(cloud):
    assert Image.open(io.BytesIO(sheet([cloud], ["a"]))).size == (190, 236)


@pytest.mark.parametrize(
    "name",
    ["scan.ply", "very_long_" * 20, "scan of a tree\n\x1b[31m", "a" * 300, "$x_1$ 鉢.ply", ""],
)
def test_a_caption_keeps_its_cosine_and_few_lines(name, capfd):
    said = figures._caption(f"0.9312 {name}")
    lines = said.split("\n")
    assert lines[0].startswith("0.9312")
    assert len(lines) <= 3
    assert max(map(len, lines)) <= 28 + 2  # $ is escaped as \$, so a line may be longer
    assert all(line.isprintable() for line in lines)
    sheet([RNG.normal(size=(50, 3))], [f"0.9312 {name}"])
    assert capfd.readouterr() == ("", "")


def test_a_curve_is_in_the_legend_under_any_name(monkeypatch):
    figure = figures._new(4, 3)
    monkeypatch.setattr(figures, "_new", lambda *size, **options: figure)
    curve = Curve("_a$x$", [0], [0, 1], np.array([[0.0, 1]]), np.array([[50.0, 60]]))
    figures.draw_learning_curves([curve], io.BytesIO(), "$x$")
    (text,) = figure.axes[0].get_legend().get_texts()
    assert text.get_text() == r" _a\$x\$ (1 seeds)"
    assert figure.axes[0].get_title() == r"\$x\$"


def test_a_query_and_ten_neighbours_are_a_hundred_kilobytes_at_most():
    clouds = [
        RNG.uniform(size=(20_000, 3)) for _ in range(11)
    ]  # a full cube needs more bytes than any surface
    assert (
        len(sheet(clouds, [f"0.9{i:03} {'long name ' * 9}" for i in range(11)])) * 4 / 3 < 100_000
    )
