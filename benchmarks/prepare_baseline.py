"""Sample point clouds from a folder of meshes with the script that people usually write.

`benchmarks/prepare.py` compares `jepa3d prepare` with this script.

    python benchmarks/prepare_baseline.py FOLDER OUT
"""

import sys
from pathlib import Path

import numpy as np
import trimesh


def main(folder: Path, out: Path) -> None:
    for path in sorted(folder.rglob("*.off")):
        mesh = trimesh.load(path, force="mesh")
        points, _ = trimesh.sample.sample_surface(mesh, 2048, seed=0)
        points = points - points.mean(0)
        points /= np.linalg.norm(points, axis=1).max()
        target = out / path.relative_to(folder).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, points.astype(np.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
