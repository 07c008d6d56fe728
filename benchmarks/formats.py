"""Make the table of formats in docs/data.md: write a file of each format and read it back.

    python benchmarks/formats.py            # print the table
    python benchmarks/formats.py --update   # also write the table into docs/data.md

This needs the extras `io` and `dev`.
"""

import argparse
import re
import tempfile
from pathlib import Path

import h5py
import laspy
import numpy as np
import pye57
import pypcd4
import trimesh

from jepa3d.data.cloud import ATTRIBUTES, PointCloud
from jepa3d.data.io import SUFFIXES, read

DOCUMENT = Path(__file__).parents[1] / "docs" / "data.md"
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(200, 3))
NORMALS = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
COLORS, PARTS = RNG.integers(0, 256, (200, 3)).astype(np.uint8), np.arange(200) % 4
BOX = trimesh.creation.box((1, 2, 3))
PLY = """ply\nformat ascii 1.0\nelement vertex 200\nproperty uchar label\nproperty float z\nproperty float y
property float x\nproperty uchar red\nproperty uchar green\nproperty uchar blue\nproperty float nx\nproperty float ny
property float nz\nend_header\n"""


def _h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.update({"data": POINTS.astype(np.float32), "normal": NORMALS, "pid": PARTS})


def _pcd(path: Path) -> None:
    made = pypcd4.PointCloud.from_xyz_points(POINTS.astype(np.float32))
    made.save(path, encoding=pypcd4.Encoding(path.stem))


def _las(path: Path) -> None:
    made = laspy.create(file_version="1.4", point_format=7)
    made.header.scales = [0.001] * 3
    made.x, made.y, made.z = POINTS.T
    made.classification, made.red, made.green, made.blue = (
        PARTS,
        *(COLORS.T.astype(np.uint16) * 257),
    )
    made.write(str(path))


def _e57(path: Path) -> None:
    with pye57.E57(str(path), "w") as file:
        file.write_scan_raw(
            {f"cartesian{axis}": POINTS[:, i].copy() for i, axis in enumerate("XYZ")}
        )


def _ptx(path: Path) -> None:
    head = [
        "20",
        "10",
        "0 0 0",
        "1 0 0",
        "0 1 0",
        "0 0 1",
        *(" ".join(map(str, row)) for row in np.eye(4)),
    ]
    _text(path, "\n".join(head), " ", POINTS, np.ones(200), COLORS)


def _bin(path: Path) -> None:
    np.column_stack([POINTS, np.ones(200)]).astype("<f4").tofile(path)


def _text(path: Path, header: str, delimiter: str, *columns: np.ndarray) -> None:
    np.savetxt(
        path, np.column_stack(columns), header=header, delimiter=delimiter, comments="", fmt="%.6f"
    )


def _mesh(path: Path) -> None:
    BOX.export(path)


# Each case has a suffix, a description, the extra that the reader needs, and a function that writes
# the file. For meshes, the vertices are compared.
CASES = [
    (".off", "mesh", "", _mesh),
    (".obj", "mesh", "", _mesh),
    (".stl", "mesh, binary", "", _mesh),
    (".stl", "mesh, ascii", "", lambda path: BOX.export(path, file_type="stl_ascii")),
    (".ply", "mesh, binary", "", _mesh),
    (".ply", "mesh, ascii", "", lambda path: BOX.export(path, encoding="ascii")),
    (".ply", "cloud, binary", "", lambda path: trimesh.PointCloud(POINTS, COLORS).export(path)),
    (
        ".ply",
        "cloud, ascii, properties in any order",
        "",
        lambda path: _text(path, PLY.strip(), " ", PARTS, POINTS[:, ::-1], COLORS, NORMALS),
    ),
    (".glb", "scene of meshes", "", _mesh),
    (".gltf", "scene of meshes", "", lambda path: path.write_bytes(_gltf())),
    (".npy", "n x 3 or more", "", lambda path: np.save(path, POINTS)),
    (
        ".npz",
        "`points`, `normals`, `seg`",
        "",
        lambda path: np.savez(path, points=POINTS, normals=NORMALS, seg=PARTS),
    ),
    (".h5", "`data`, `normal`, `pid` (also `.hdf5`)", "io", _h5),
    (".xyz", "no header, spaces", "", lambda path: _text(path, "", " ", POINTS)),
    (
        ".asc",
        "CloudCompare's `//X Y Z R G B`",
        "",
        lambda path: _text(path, "//X Y Z R G B", " ", POINTS, COLORS),
    ),
    (
        ".csv",
        "header `x,y,z,nx,ny,nz,label`",
        "",
        lambda path: _text(path, "x,y,z,nx,ny,nz,label", ",", POINTS, NORMALS, PARTS),
    ),
    (
        ".txt",
        "header `X [m];Y [m];Z [m]`",
        "",
        lambda path: _text(path, "X [m];Y [m];Z [m]", ";", POINTS),
    ),
    (".pts", "count, then lines", "", lambda path: _text(path, "200", " ", POINTS)),
    *(
        (".pcd", way, "io" if "_" in way else "", _pcd)
        for way in ("ascii", "binary", "binary_compressed")
    ),
    (".ptx", "all scans, each placed by its matrix", "", _ptx),
    (".bin", "float32, `--columns x y z intensity`", "", _bin),
    (".las", "millimetres, colours, classification", "io", _las),
    (".laz", "the same, compressed", "io", _las),
    (".e57", "all scans, each placed by its pose", "io", _e57),
]


def _gltf() -> bytes:
    """Make a glTF file that contains its buffers, as data URIs."""
    files = trimesh.exchange.gltf.export_gltf(BOX.scene(), embed_buffers=True)
    return files["model.gltf"]


def _error(cloud: PointCloud, truth: np.ndarray) -> float:
    """Return the largest error of a coordinate, relative to the extent of the points.

    Each point that was read is compared with the nearest point of `truth`, and each point of
    `truth` with the nearest point that was read.
    """
    gaps = np.abs(cloud.file_coordinates()[:, None] - truth).max(2)
    return float(max(gaps.min(0).max(), gaps.min(1).max()) / np.ptp(truth, axis=0).max())


def table() -> str:
    """Make the table as Markdown."""
    lines = [
        "| suffix | content of the file | error below | also read | extra |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for suffix, what, extra, write in CASES:
            path = Path(folder) / f"{what if suffix == '.pcd' else 'a'}{suffix}"
            write(path)
            cloud = read(path, columns=("x", "y", "z", "intensity") if suffix == ".bin" else None)
            error = _error(cloud, BOX.vertices if cloud.faces is not None else POINTS)
            bound = next(bound for bound in (1e-6, 1e-5, 1e-4, 1e-3) if error < bound)
            kept = ", ".join(name for name in ATTRIBUTES if getattr(cloud, name) is not None)
            mesh = "mesh" in what
            assert mesh == (cloud.faces is not None), f"{path}: {what}"
            lines.append(f"| `{suffix}` | {what} | {bound:.0e} | {kept} | {extra} |")
    assert {case[0] for case in CASES} | {".hdf5"} == set(SUFFIXES), (
        "a format is missing from the table"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    made = table()
    print(made)
    if parser.parse_args().update:
        text = re.sub(
            r"(<!-- formats -->\n).*(<!-- /formats -->)",
            lambda m: m[1] + made + "\n" + m[2],
            DOCUMENT.read_text(),
            flags=re.DOTALL,
        )
        DOCUMENT.write_text(text)
