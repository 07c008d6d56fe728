"""Compute vectors of a folder of meshes with the script that people usually write.

`benchmarks/embed.py` compares `jepa3d embed` with this script.

    python benchmarks/embed_baseline.py FOLDER OUT
"""

import sys
from pathlib import Path

import numpy as np
import torch
import trimesh

import jepa3d


@torch.no_grad()
def main(folder: Path, out: Path) -> None:
    encoder, batch, vectors = jepa3d.load(), [], []
    paths = sorted(folder.rglob("*.off"))
    for path in paths:
        mesh = trimesh.load(path, force="mesh")
        batch.append(trimesh.sample.sample_surface(mesh, 2048, seed=0)[0])
        if len(batch) == 32 or path == paths[-1]:
            vectors.append(encoder.embed(torch.tensor(np.stack(batch))).numpy())
            batch = []
    np.save(out, np.concatenate(vectors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
