"""Feed thousands of damaged files to every reader of `jepa3d.data.io`, which may raise only
ReadError (with a message of one line) and OSError.

    python benchmarks/fuzz.py --inputs 100000 --seconds 300            # at most 300 s per reader
    python benchmarks/fuzz.py --readers off,las --inputs 2000 --seed 1

Input i of a reader depends only on --seed and i. Each reader runs in its own process, with a memory
limit and a time limit per input; the process is restarted after a crash. An input does harm if it
raises another error, crashes the process or reaches the time limit. Such inputs are stored in the
folder --keep; if there are any, the exit status is 1. This needs the extras `io` and `dev`.
"""

import argparse
import io as streams
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np

READERS = (
    "off",
    "obj",
    "stl",
    "ply",
    "glb",
    "gltf",
    "npy",
    "npz",
    "h5",
    "xyz",
    "csv",
    "pts",
    "pcd",
    "ptx",
    "las",
    "laz",
    "e57",
)
TEXT = ("off", "obj", "stl", "ply", "gltf", "xyz", "csv", "pts", "pcd", "ptx")
FIELDS = ("next input", "accepted", "refused")
# words that replace a word of a text file
TOKENS = [
    b"0",
    b"-1",
    b"3",
    b"1e300",
    b"nan",
    b"-inf",
    b"99999999999",
    b"1000000000000",
    b"0x10",
    b"x",
    b"",
    b"1e",
    b'"',
]
# bytes that are written into a file
WORDS = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\0\0\xc0\x7f",
    b"\0" * 8,
    b"\xff" * 8,
    b"\n",
    b",",
]


def seeds(reader: str, folder: Path) -> list[bytes]:
    """Make small valid files for a reader."""
    import trimesh

    points = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    rgb = np.arange(36, dtype=np.uint16).reshape(12, 3) * 1000
    box, path = trimesh.creation.box((1, 2, 3)), folder / f"seed.{reader}"

    def kept(write) -> bytes:
        write(path)
        return path.read_bytes()

    def las(file) -> None:
        import laspy

        for version, kind in (("1.4", 7), ("1.2", 3)):
            made = laspy.create(file_version=version, point_format=kind)
            made.x, made.y, made.z = points.T
            made.classification = np.arange(12) % 3
            made.red, made.green, made.blue = rgb.T
            made.write(str(file.with_name(f"{version}.{reader}")))
        shutil.copy(file.with_name(f"1.4.{reader}"), file)

    def e57(file) -> None:
        import pye57

        with pye57.E57(str(file), "w") as made:
            made.write_scan_raw(
                {
                    f"cartesian{axis}": points[:, i].astype(np.float64)
                    for i, axis in enumerate("XYZ")
                }
            )

    def h5(file, **options) -> None:
        import h5py

        with h5py.File(file, "w") as made:
            made.create_dataset(
                "data", data=np.stack([points] * 3) if options else points, **options
            )
            made.create_dataset("label", data=np.arange(3) if options else np.arange(1))

    def pcd(encoding: str) -> bytes:
        import pypcd4

        columns, kinds = [*points.T, np.arange(12, dtype=np.uint32)], [np.float32] * 3 + [np.uint32]
        made = pypcd4.PointCloud.from_points(columns, ("x", "y", "z", "label"), kinds)
        return kept(lambda file: made.save(file, encoding=pypcd4.Encoding(encoding)))

    def table(head: str, mark: str) -> bytes:
        return (
            head + "\n".join(mark.join(f"{v:.4f}" for v in row) + f"{mark}2" for row in points)
        ).encode()

    if reader in ("off", "glb", "obj"):
        cloud = trimesh.PointCloud(points)
        return [kept(box.export)] + (
            [kept(cloud.export)] if reader != "off" else [b"COFF\n3 0 0\n0 0 0 1 1 1 1\n" * 2]
        )
    if reader == "stl":
        return [kept(box.export), kept(lambda file: box.export(file, file_type="stl_ascii"))]
    if reader == "ply":
        both, ways = (box, trimesh.PointCloud(points, np.uint8(rgb % 255))), ("ascii", "binary")
        return [
            kept(lambda file, s=shape, w=way: s.export(file, encoding=w))
            for shape in both
            for way in ways
        ]
    if reader == "gltf":
        made = trimesh.exchange.gltf.export_gltf(trimesh.Scene(box), embed_buffers=True)
        return [made["model.gltf"]]
    if reader == "npy":
        return [
            kept(lambda file: np.save(file, points)),
            kept(lambda file: np.save(file, np.stack([points] * 2))),
        ]
    if reader == "npz":
        zipped = kept(
            lambda file: np.savez_compressed(
                file, points=np.stack([points] * 2), label=np.arange(2)
            )
        )
        return [
            kept(lambda file: np.savez(file, points=points, normals=points, seg=np.arange(12))),
            zipped,
        ]
    if reader == "h5":
        return [kept(h5), kept(lambda file: h5(file, compression="gzip", chunks=True))]
    if reader == "pcd":
        return [pcd(encoding) for encoding in ("ascii", "binary", "binary_compressed")]
    if reader == "ptx":
        head = "4\n3\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n1 0 0 0\n0 1 0 0\n0 0 1 0\n5 6 7 1\n"
        return [(table(head, " ") + b"\n") * scans for scans in (1, 2)]
    if reader in ("las", "laz"):
        return [kept(las), path.with_name(f"1.2.{reader}").read_bytes()]
    if reader == "e57":
        return [kept(e57)]
    mark = "," if reader == "csv" else " "
    return [
        table("", mark),
        table(mark.join(("x", "y", "z", "label")) + "\n", mark),
        table("//X Y Z R\n", mark),
        table("12\n", mark),
    ]


def mutate(content: bytes, others: list[bytes], text: bool, rng: random.Random) -> bytes:
    """Damage a file in one to four ways."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        size, kind = len(content), rng.randrange(10 if text else 8)
        at = (
            rng.randrange(size + 1) if rng.random() < 0.5 else rng.randrange(min(size, 400) + 1)
        )  # the header, at the start of a file, is damaged more often than the rest
        end = min(size, at + rng.choice((1, 4, 16, 200)))
        if kind == 0:
            content = content[:at]
        elif kind in (1, 2) and at < size:
            content = (
                content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
            )
        elif kind == 3:
            content = content[:at] + content[end:]
        elif kind == 4:
            content = content[:end] + content[at:end] * rng.choice((1, 1, 3, 50)) + content[end:]
        elif kind == 5:
            other = rng.choice(others)
            content = content[:at] + other[rng.randrange(len(other)) :]
        elif kind == 6:
            word = rng.choice(WORDS)
            content = content[:at] + word + content[at + rng.choice((0, len(word))) :]
        elif kind == 7:
            content = (
                content[:at] + rng.randbytes(end - at) + content[end:]
                if rng.random() < 0.95
                else rng.randbytes(size)
            )
        elif places := list(re.finditer(rb"[\w.+-]+", content[:4000])):
            place, other = rng.choice(places), rng.choice(places)
            word = rng.choice(TOKENS) if kind == 8 else other.group()
            content = content[: place.start()] + word + content[place.end() :]
    return content


def rezip(archive: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Damage one array of an NPZ, and zip the arrays again with correct checksums."""
    made = streams.BytesIO()
    with zipfile.ZipFile(streams.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        hit = rng.choice(old.namelist())
        for name in old.namelist():
            new.writestr(
                name, mutate(old.read(name), others, True, rng) if name == hit else old.read(name)
            )
    return made.getvalue()


# lookup table for the checksum CRC-32C, with one entry per byte value
CRC32C = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    CRC32C.append(byte)


def resum(content: bytes) -> bytes:
    """Correct the page checksums of an E57 file, so that the reader gets as far as the damage."""
    pages = []
    for at in range(0, len(content) - 1023, 1024):
        crc = 0xFFFFFFFF
        for byte in content[at : at + 1020]:
            crc = crc >> 8 ^ CRC32C[(crc ^ byte) & 255]
        pages.append(content[at : at + 1020] + struct.pack(">I", crc ^ 0xFFFFFFFF))
    return b"".join(pages)


def child(reader: str, arguments) -> None:
    """Read damaged inputs until their number or the time is used up.

    The file `counts` is shared with the parent process. It holds the number of the next input and
    how many inputs were accepted and refused, so that a restarted process can continue. The current
    input is stored as input.READER.
    """
    from jepa3d.data import arrays, io

    folder, keep = Path(arguments.folder), Path(arguments.keep)
    originals, path = seeds(reader, folder), folder / f"input.{reader}"
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(folder / "counts", "r+b") as file:
        counts = memoryview(mmap.mmap(file.fileno(), 24)).cast("q")
    until = time.monotonic() + arguments.seconds
    while counts[0] < arguments.inputs and time.monotonic() < until:
        rng = random.Random(f"{arguments.seed} {reader} {counts[0]}")
        original = rng.choice(originals)
        if reader == "npz" and rng.random() < 0.6:
            content = rezip(original, originals, rng)
        else:
            content = mutate(original, originals, reader in TEXT, rng)
            content = resum(content) if reader == "e57" and rng.random() < 0.8 else content
        path.write_bytes(content)
        counts[0] += 1
        signal.setitimer(signal.ITIMER_REAL, arguments.limit)
        try:
            many = arrays.clouds_in(path)
            if many is not None:
                arrays.facts_in(path)
            cloud = io.read(path, row=None if many is None else 0)
            assert np.isfinite(cloud.points).all(), "not finite"
            assert cloud.points.any(), "no extent"
            counts[1] += 1
        except (io.ReadError, OSError) as error:
            counts[2] += 1
            if isinstance(error, io.ReadError) and (
                "\n" in str(error) or not str(error).startswith(f"{path}: ")
            ):
                escape(keep, path, counts[0] - 1, error)
        except BaseException as error:
            escape(keep, path, counts[0] - 1, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            arrays._count.cache_clear()
            arrays.array_block.cache_clear()


def escape(keep: Path, path: Path, index: int, error: BaseException) -> None:
    """Store an input that raised a forbidden error, and append the error to escapes.jsonl."""
    saved = keep / f"{path.suffix[1:]}-{index}{path.suffix}"
    shutil.copy(path, saved)
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = {
        "what": f"{type(error).__name__}: {str(error)[:150]} ({where.filename}:{where.lineno})",
        "file": str(saved),
    }
    with open(keep / "escapes.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def fuzz(reader: str, arguments) -> bool:
    """Read the inputs of a reader in child processes, and print the reader's row of the table.

    Returns True if no input did harm.
    """
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        counts, keep, ended, begin = (
            Path(folder, "counts"),
            Path(arguments.keep),
            {"crash": [], "time-out": []},
            time.monotonic(),
        )
        counts.write_bytes(bytes(24))
        log = keep / "escapes.jsonl"
        log.write_text("")
        command = [
            sys.executable,
            __file__,
            "--child",
            reader,
            "--folder",
            folder,
            "--keep",
            str(keep),
        ]
        command += [
            "--inputs",
            str(arguments.inputs),
            "--seed",
            str(arguments.seed),
            "--limit",
            str(arguments.limit),
        ]
        while (left := arguments.seconds - (time.monotonic() - begin)) > 0:
            status = subprocess.run([*command, "--seconds", str(left)], check=False).returncode
            done, accepted, refused = struct.unpack("3q", counts.read_bytes())
            if status == 0:
                break
            if status > 0 or not done:
                sys.exit(f"{reader}: the child itself failed")
            saved = keep / f"{reader}-{done - 1}.{reader}"
            shutil.copy(Path(folder, f"input.{reader}"), saved)
            ended["time-out" if -status == signal.SIGALRM else "crash"].append(
                f"signal {-status} {saved}"
            )
        took = time.monotonic() - begin
    escapes = [json.loads(line) for line in log.read_text().splitlines()]
    bad = [len(escapes), len(ended["crash"]), len(ended["time-out"])]
    print(
        "".join(
            f"{cell:>10}" for cell in (reader, done, accepted, refused, *bad, round(done / took))
        ),
        flush=True,
    )
    for what, file in sorted({re.sub(r"\d+", "#", e["what"]): e["file"] for e in escapes}.items()):
        print(f"    {what}: {file}")
    for kind, files in ended.items():
        print("".join(f"    {kind}: {file}\n" for file in files[:5]), end="")
    return not any(bad)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=3000, help="number of inputs per reader")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="largest number of seconds per reader"
    )
    parser.add_argument(
        "--limit", type=float, default=10, help="seconds after which an input counts as a hang"
    )
    parser.add_argument(
        "--keep", default=tempfile.gettempdir() + "/fuzz", help="folder for inputs that do harm"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments)
    Path(arguments.keep).mkdir(parents=True, exist_ok=True)
    columns = (
        "reader",
        "inputs",
        "accepted",
        "refused",
        "escapes",
        "crashes",
        "time-outs",
        "inputs/s",
    )
    print("".join(f"{column:>10}" for column in columns))
    return sys.exit(not all([fuzz(reader, arguments) for reader in arguments.readers.split(",")]))


if __name__ == "__main__":
    main()
