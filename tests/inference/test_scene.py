"""Features of all points of a scene: the coordinates are those of the file, there are no seams
between tiles, and no temporary files remain.
"""

import itertools
import sys

import laspy
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trimesh
from tqdm import tqdm

from jepa3d import load
from jepa3d.cli import main
from jepa3d.data import cloud as clouds
from jepa3d.data.cloud import ReadError
from jepa3d.data.io import chunks
from jepa3d.inference import cells as sorting
from jepa3d.inference import scene as module
from jepa3d.inference.cells import Grid, choose_tile, median_count, sort_points
from jepa3d.inference.scene import Features, write_features
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm

SIZES = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 16,
    "group_size": 8,
    "num_points": 128,
}
FAR = np.array([500_000.0, 4_000_000.0, 100.0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    encoder = PointEncoder(**SIZES, tokenizer_dim=16)
    calibrate_batchnorm(encoder, torch.randn(32, 128, 3))
    folder = tmp_path_factory.mktemp("model")
    encoder.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def xyz() -> np.ndarray:
    """Sample ground, a ball and, far away, a box: 20,000 shuffled points with map coordinates."""
    rng = np.random.default_rng(0)
    ground = np.c_[rng.uniform(0, 60, (14_000, 2)), rng.normal(scale=0.05, size=14_000)]
    ball = rng.normal(size=(3_000, 3))
    ball = 2 * ball / np.linalg.norm(ball, axis=1, keepdims=True) + [10, 10, 2]
    box = rng.uniform(-1, 1, (3_000, 3))
    box = 2 * box / np.abs(box).max(1, keepdims=True) + [45, 40, 2]
    return rng.permutation(np.concatenate([ground, ball, box])) + FAR


@pytest.fixture
def scan(tmp_path, xyz):
    np.save(tmp_path / "scan.npy", xyz)
    return tmp_path / "scan.npy"


def rows(path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a Parquet file. Returns coordinates and features sorted by index, and the indices in the
    order of the file.
    """
    table = pq.read_table(path)
    index = table["index"].to_numpy()
    at = np.argsort(index)
    assert (index[at] == np.arange(len(index))).all()
    features = table["feature"].combine_chunks().flatten().to_numpy().reshape(len(index), -1)
    return np.stack([table[axis].to_numpy() for axis in "xyz"], 1)[at], features[at], index


def colors_of(path) -> tuple[np.ndarray, np.ndarray]:
    if path.suffix == ".ply":
        data = trimesh.load(path, process=False)
        raw = data.metadata["_ply_raw"]["vertex"]["data"]
        return np.stack([raw[axis] for axis in "xyz"], 1), np.stack(
            [raw[name] for name in ("red", "green", "blue")], 1
        )
    las = laspy.read(path)
    return np.asarray(las.xyz), np.stack([las.red, las.green, las.blue], 1) // 257


# ------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_has_every_point_s_feature_and_coordinates(model, scan, xyz, dtype):
    write_features(scan, scan.with_name("o.parquet"), model, dtype=dtype)
    found, features, _ = rows(scan.with_name("o.parquet"))
    assert (found == xyz).all()
    assert features.shape == (len(xyz), 24)
    assert features.dtype == dtype
    assert np.isfinite(features).all()
    assert features.std(0).min() > 1e-3
    assert sorted(p.name for p in scan.parent.iterdir()) == ["o.parquet", "scan.npy"]


@pytest.mark.parametrize("suffix", [".ply", ".las", ".laz"])
def test_colours_keep_the_order_of_the_file_and_its_millimetres(model, scan, xyz, suffix):
    out = scan.with_name(f"o{suffix}")
    write_features(scan, out, model)
    found, colors = colors_of(out)
    assert np.abs(found - xyz).max() < 1e-3
    assert ((colors == 0) | (colors == 255)).mean() < 0.2
    ground = np.abs(xyz[:, 2] - FAR[2]) < 0.3
    spread = np.abs(colors[ground].mean(0) - colors[~ground].mean(0)).max()
    assert spread > 30  # objects get other colours than the ground
    assert sorted(p.name for p in scan.parent.iterdir()) == [out.name, "scan.npy"]


def test_a_tiny_scan_far_from_whole_numbers_fits_into_las(model, tmp_path, xyz):
    tiny = 0.5 + 1e-6 * (xyz - xyz.min(0))
    np.save(tmp_path / "tiny.npy", tiny)
    write_features(tmp_path / "tiny.npy", tmp_path / "o.las", model)
    assert np.abs(colors_of(tmp_path / "o.las")[0] - tiny).max() < 1e-9


def test_a_tile_s_features_are_the_encoder_s_own(model, tmp_path):
    """If a scene is one tile with as many points as the encoder takes, a patch centre gets its
    token.
    """
    points = np.random.default_rng(1).normal(size=(128, 3))
    # On a sphere there are no stray points, which would be replaced by copies of other points.
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    np.save(tmp_path / "one.npy", points)
    write_features(tmp_path / "one.npy", tmp_path / "o.parquet", model)
    _, features, _ = rows(tmp_path / "o.parquet")
    encoder, unit = load(model), torch.from_numpy(points)[None]
    with torch.inference_mode():
        tokens, centers = encoder.tokens(unit)
    at = torch.cdist(torch.from_numpy(encoder.frame(points).place(points)), centers[0]).argmin(0)
    assert np.abs(features[at] - tokens[0].numpy()).max() < 1e-3


def test_y_up_and_z_up_scans_of_one_scene_have_the_same_features(model, scan, xyz):
    np.save(scan.with_name("y.npy"), xyz[:, [0, 2, 1]] * [1, 1, -1])
    write_features(scan, scan.with_name("z.parquet"), model, 12)
    write_features(scan.with_name("y.npy"), scan.with_name("y.parquet"), model, 12, "y")
    near = np.load(scan.with_name("y.npy")) - FAR[[0, 2, 1]] * [1, 1, -1]  # a GLB has float32
    trimesh.PointCloud(near).export(scan.with_name("y.glb"))
    write_features(scan.with_name("y.glb"), scan.with_name("glb.parquet"), model, 12)
    (_, z, _), (found, y, _) = rows(scan.with_name("z.parquet")), rows(scan.with_name("y.parquet"))
    assert (found == np.load(scan.with_name("y.npy"))).all()
    for other in (y, rows(scan.with_name("glb.parquet"))[1]):
        assert np.abs(z - other).mean() < 0.02 * z.std()


def test_the_result_does_not_depend_on_chunks_or_buckets(model, scan, monkeypatch):
    write_features(scan, scan.with_name("a.parquet"), model)
    monkeypatch.setattr(clouds, "CHUNK", 777)
    monkeypatch.setattr(sorting, "BUCKET", 3000)
    monkeypatch.setattr(module, "BATCH", 5)
    write_features(scan, scan.with_name("b.parquet"), model)
    (_, a, order), (_, b, other) = (
        rows(scan.with_name("a.parquet")),
        rows(scan.with_name("b.parquet")),
    )
    assert (order == other).all()
    assert np.abs(a - b).max() < 1e-4


# -------------------------------------------------------------------------------------------- tiles


def features_of(xyz, model, grid, folder) -> tuple[Features, np.ndarray]:
    sample = np.c_[xyz, np.arange(len(xyz))]
    folder.mkdir()
    features = Features(
        load(model),
        sort_points(iter([xyz]), "z", grid, sample, len(xyz), folder, tqdm(disable=True)),
    )
    out = np.full((len(xyz), features.encoder.width), np.nan, np.float32)
    for records, values in module._stream(features, tqdm(disable=True)):
        out[records["index"]] = values
    return features, out


@pytest.fixture(scope="module")
def hills() -> np.ndarray:
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 40, (16_000, 2))
    return np.c_[xy, np.sin(xy[:, 0] / 2) + np.cos(xy[:, 1] / 3)]


class Unblended(Grid):
    """Gives all weight to the tile whose centre is nearest."""

    def cells(self, xyz):
        cells, place = super().cells(xyz)
        return cells, np.where(self.split, place > 0.5, place).astype(float)


class Averaged(Grid):
    """Gives all tiles the same weight."""

    def cells(self, xyz):
        cells, place = super().cells(xyz)
        return cells, np.where(self.split, 0.5, place)


def unevenness(hills, features) -> float:
    """Measure how much the features of near points differ across planes at the borders, quarters
    and middles of cells of side 4. Returns the largest mean difference divided by the smallest.
    """
    place, jumps = (hills[:, 0] - hills[:, 0].min()) / 4 % 1, []
    for middle in (0.0, 0.25, 0.5, 0.75):
        offset = (place - middle + 0.5) % 1 - 0.5
        left, right = (
            np.flatnonzero((offset > -0.02) & (offset < 0)),
            np.flatnonzero((offset > 0) & (offset < 0.02)),
        )
        near = np.argwhere(np.linalg.norm(hills[left, None] - hills[right], axis=-1) < 0.3)
        assert len(near) > 50
        jumps.append(
            np.linalg.norm(features[left[near[:, 0]]] - features[right[near[:, 1]]], axis=1).mean()
        )
    return max(jumps) / min(jumps)


def test_there_is_no_seam_at_the_borders_of_tiles(model, hills, tmp_path):
    box = hills.min(0), hills.max(0)
    found = {
        kind: features_of(hills, model, kind(*box, 8.0), tmp_path / kind.__name__)[1]
        for kind in (Grid, Unblended, Averaged)
    }
    uneven = {kind: unevenness(hills, features) for kind, features in found.items()}
    assert uneven[Grid] < 1.3
    assert min(uneven[Unblended], uneven[Averaged]) > 1.5  # the measure does detect seams


def test_another_origin_of_the_tiles_gives_much_the_same_features(model, hills, tmp_path):
    """They are correlated, but not equal: an untrained encoder also encodes a point's position in
    its tile.
    """

    def correlation(kind) -> float:
        low, high, made = hills.min(0), hills.max(0), []
        for shift in (0, np.array([1.7, 2.9, 0])):
            folder = tmp_path / f"{kind.__name__}{len(made)}{np.sum(shift)}"
            made.append(features_of(hills, model, kind(low - shift, high, 8.0), folder)[1])
            made[-1] -= made[-1].mean(0)
        one, two = made
        return (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())

    blended = correlation(Grid)
    assert blended > 0.6
    assert blended > correlation(Unblended) + 0.25


def test_cells_are_whole_random_parts_and_tiles_hold_their_cells(hills, tmp_path, monkeypatch):
    monkeypatch.setattr(sorting, "BUCKET", 1000)
    monkeypatch.setattr(sorting, "_STRIP", 1)  # gives the smallest strips, of 8 cells
    grid = Grid(hills.min(0), hills.max(0), 2.0)
    sample = np.c_[hills, np.arange(len(hills))]
    cells = sort_points(
        iter(np.array_split(hills, 7)), "z", grid, sample, len(hills), tmp_path, tqdm(disable=True)
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "sorted"]
    seen = []
    for i in range(len(cells.keys)):
        records = cells.read(i)
        assert (records["xyz"] == hills[records["index"]]).all()
        assert (grid.cells(records["xyz"])[0] == cells.coords[i]).all()
        seen.append(records["index"])
    assert (np.sort(np.concatenate(seen)) == np.arange(len(hills))).all()
    assert (np.diff(cells.keys) > 0).all()
    tiles, counts, of_cell = sorting.tiles_of(grid, cells.coords, cells.counts)
    for tile in range(0, len(tiles), 17):
        low = grid.low + (tiles[tile] - 1) * 1.0
        inside = ((hills >= low) & (hills < low + 2.0)).all(1)
        members = cells.find(tiles[tile] + grid.corners)
        assert counts[tile] == cells.counts[members].sum()
        # They may differ by one, since the last point lies on the upper border.
        assert abs(int(inside.sum()) - int(counts[tile])) <= 1
        assert (of_cell[members] == tile).any(1).all()


def test_points_in_sparse_places_have_features_too(model, hills, tmp_path):
    """Lone points, copies of one point, and a sparse patch between them all get features."""
    rng = np.random.default_rng(4)
    lone = np.r_[
        [[400, 400, 50], [-90, 10, 0], [401, 400, 50]], rng.uniform(60, 160, (40, 3)) * [1, 1, 0.1]
    ]
    copies = np.repeat([[200.0, 20, 3]], 300, 0)
    points = np.concatenate([hills, lone, copies])
    features, out = features_of(
        points, model, Grid(points.min(0), points.max(0), 4.0), tmp_path / "a"
    )
    assert len(features.alone) > 20
    assert np.isfinite(out).all()
    assert all(
        features.cells.counts[features._members(len(features.coords) + i)].sum() >= 16
        for i in range(len(features.alone))
    )


def test_the_median_tile_holds_what_was_asked_for(hills):
    low, high = hills.min(0), hills.max(0)
    part = hills[np.random.default_rng(0).permutation(len(hills))[:4000]]
    tile = choose_tile(low, high, part, len(hills), 256)
    assert 128 < median_count(Grid(low, high, tile), hills) < 512
    assert choose_tile(low, high, part, 200, 256) == (high - low).max()


# -------------------------------------------------------------------------------------------- files


def variants(folder, xyz) -> dict:
    las = laspy.create(file_version="1.2", point_format=1)
    las.header.scales, las.header.offsets = [0.001] * 3, FAR
    las.x, las.y, las.z = xyz.T
    las.gps_time, las.classification = np.arange(len(xyz)), np.arange(len(xyz)) % 7
    las.add_extra_dim(laspy.ExtraBytesParams("height", "f4"))
    las.height = np.arange(len(xyz), dtype=np.float32)
    las.write(folder / "a.las")
    las.write(folder / "a.laz")
    np.savetxt(folder / "a.xyz", xyz, fmt="%.4f")
    np.savetxt(
        folder / "a.csv",
        np.c_[np.arange(len(xyz)), xyz],
        fmt="%.4f",
        delimiter=",",
        header="id,x,y,z",
        comments="",
    )
    head = f"element vertex {len(xyz)}\nproperty uchar label\n" + "".join(
        f"property double {a}\n" for a in "zxy"
    )
    table = np.empty(len(xyz), [("label", "u1"), *((axis, "f8") for axis in "zxy")])
    for i, axis in enumerate("xyz"):
        table[axis] = xyz[:, i]
    table["label"] = 3
    for name, order in (("little", "<"), ("big", ">")):
        header = f"ply\nformat binary_{name}_endian 1.0\ncomment made\n{head}end_header\n".encode()
        (folder / f"{name}.ply").write_bytes(
            header + table.astype(table.dtype.newbyteorder(order)).tobytes()
        )
    lines = "\n".join(f"3 {z:.4f} {x:.4f} {y:.4f}" for x, y, z in xyz)
    (folder / "ascii.ply").write_text(f"ply\nformat ascii 1.0\n{head}end_header\n{lines}\n")
    np.savez(folder / "a.npz", points=xyz)
    return {path.name: path for path in folder.iterdir()}


def test_every_kind_of_file_is_read_in_order_in_chunks(tmp_path, xyz, monkeypatch):
    monkeypatch.setattr(clouds, "CHUNK", 1999)
    found = variants(tmp_path, xyz[:5000])
    assert len(found) == 8
    for name, path in found.items():
        parts = list(chunks(path))
        assert len(parts) == (1 if name == "a.npz" else 3), name
        assert np.abs(np.concatenate(parts) - xyz[:5000]).max() < 6e-4, name


def test_a_las_scan_keeps_its_header_and_its_fields(model, tmp_path, xyz):
    variants(tmp_path, xyz)
    for name, out in (("a.las", "o.laz"), ("a.laz", "o.las")):
        write_features(tmp_path / name, tmp_path / out, model, tile=15)
        old, new = laspy.read(tmp_path / name), laspy.read(tmp_path / out)
        assert (new.header.scales == old.header.scales).all()
        assert (new.header.offsets == old.header.offsets).all()
        assert new.header.point_format.id == 3
        for field in ("X", "Y", "Z", "gps_time", "classification", "height"):
            assert (np.asarray(new[field]) == np.asarray(old[field])).all(), field
        assert np.ptp(new.red) > 10_000


def test_unusable_scans_are_one_line_that_names_the_file(model, tmp_path, xyz):
    bad = xyz.copy()
    bad[7000, 1] = np.inf
    np.save(tmp_path / "far.npy", bad)
    np.save(tmp_path / "few.npy", xyz[:12])
    np.save(tmp_path / "equal.npy", np.ones((300, 3)))
    np.save(tmp_path / "flat.npy", np.ones(300))
    (tmp_path / "empty.xyz").touch()
    (tmp_path / "words.xyz").write_text("1 2 3\n4 five 6\n")
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "mesh.ply")
    found = variants(tmp_path, xyz[:1000])
    for name in ("a.las", "little.ply", "ascii.ply"):
        content = found[name].read_bytes()
        found[name].with_name(f"cut-{name}").write_bytes(content[: len(content) // 2])
    before = set(tmp_path.iterdir())
    reasons = {
        "far.npy": "infinite coordinates, the first in point 7,000",
        "few.npy": "12 points, at least 16 are needed",
        "equal.npy": "all points are equal",
        "flat.npy": "expected an array",
        "empty.xyz": "empty file",
        "words.xyz": "damaged",
        "mesh.ply": "a mesh",
        "cut-a.las": "truncated",
        "cut-little.ply": "truncated",
        "cut-ascii.ply": "truncated|damaged",
        "gone.las": "cannot be read",
        "a.docx": "unknown kind|cannot be read",
    }
    for name, reason in reasons.items():
        with pytest.raises(ReadError, match=reason) as error:
            write_features(tmp_path / name, tmp_path / "o.ply", model)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tile": 0.01}, "too few points per tile; try "),
        ({"tile": 1e-9}, "too small for a scene"),
        ({"tile": -1.0}, "a length above 0"),
        ({"up_axis": "w"}, "use x, y, z"),
        ({"dtype": "int8"}, "use float32 or float16"),
        ({"out": "o.obj"}, "must end in"),
        ({"out": "none/o.ply"}, "in a folder that exists"),
        ({"out": "scan.npy.ply/../scan.npy"}, "must end in"),
    ],
)
def test_wrong_options_are_told_and_leave_nothing(model, scan, options, reason):
    out = scan.parent / options.pop("out", "o.ply")
    with pytest.raises(ValueError, match=reason):
        write_features(scan, out, model, **options)
    assert list(scan.parent.iterdir()) == [scan]


def test_a_tile_that_one_far_point_makes_too_small_is_not_called_an_option(model, tmp_path, xyz):
    np.save(tmp_path / "far.npy", np.concatenate([xyz, np.zeros((1, 3))]))
    with pytest.raises(ValueError, match="remove points far from all others, or give"):
        write_features(tmp_path / "far.npy", tmp_path / "o.parquet", model)
    write_features(tmp_path / "far.npy", tmp_path / "o.parquet", model, 100)


def test_a_missing_package_is_told_before_the_work(model, scan, monkeypatch):
    monkeypatch.setitem(sys.modules, "laspy", None)
    monkeypatch.setattr(module, "chunks", lambda *_: pytest.fail("the scan was read"))
    with pytest.raises(ReadError, match="needs laspy"):
        write_features(scan, scan.with_name("o.las"), model)


def test_a_full_disk_is_told_before_the_work(model, scan, monkeypatch):
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(OSError, match="GB are needed there"):
        write_features(scan, scan.with_name("o.ply"), model)
    assert list(scan.parent.iterdir()) == [scan]


# Both calls happen while features are being written.
@pytest.mark.parametrize(("suffix", "call"), [(".ply", 70), (".parquet", 6)])
def test_an_interrupted_run_leaves_the_old_result_alone(model, scan, monkeypatch, suffix, call):
    out, calls = scan.with_name(f"o{suffix}"), itertools.count()
    out.write_text("old")
    blend = Features._blend

    def interrupted(self, blocks):
        if next(calls) == call:
            raise KeyboardInterrupt
        return blend(self, blocks)

    monkeypatch.setattr(Features, "_blend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_features(scan, out, model, 12)
    assert out.read_text() == "old"
    assert sorted(scan.parent.iterdir()) == sorted([scan, out])


def test_the_command(model, scan, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(
            [
                "scene",
                str(scan),
                "--out",
                str(scan.with_name("o.ply")),
                "--model",
                model,
                "--tile",
                "15",
            ]
        )
    printed = capsys.readouterr().out
    assert "tile 15: " in printed
    assert "20,000 points, 24 features each" in printed
