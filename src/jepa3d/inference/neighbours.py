"""What people read of a search: lines, JSON or a page of neighbours, and how a cosine stands among
random pairs.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import printable
from jepa3d.data.io import enough_points
from jepa3d.figures import draw_contact_sheet, even_sample
from jepa3d.inference import mapped
from jepa3d.inference.clouds import open_cloud
from jepa3d.inference.search import Hit, open_index
from jepa3d.inference.vectors import Making, Vectors, to_numpy
from jepa3d.page import facts, note, page, picture, section, table
from jepa3d.plain import write_bytes

SAMPLE = 1000  # vectors of an index that are paired
DRAWN, LISTED, PICTURED = (
    10,
    100,
    100,
)  # neighbours drawn and listed of a query in a page, and queries drawn
_GROUPS = 32  # of a large file, read for the sample


def random_cosines(index: Path, seed: int = 0) -> np.ndarray:
    """Cosines of pairs of vectors of an index, ascending: of all pairs of up to 1,000 vectors, or
    of 1,000 drawn.
    """
    x = _sample(index, np.random.default_rng(seed)).astype(np.float64)
    length = np.linalg.norm(x, axis=1)
    x = x[length > 0] / length[length > 0, None]
    return np.sort((x @ x.T)[np.triu_indices(len(x), 1)])


def _sample(index: Path, rng: np.random.Generator) -> np.ndarray:
    """At most SAMPLE vectors n E of an index; of a large file from 32 row groups, as evenly spread
    as they can be.
    """
    vectors = open_index(index)
    if not isinstance(vectors, Vectors):
        rows = np.sort(rng.permutation(len(vectors))[:SAMPLE]).tolist()
        return to_numpy(
            vectors.table.take_offsets(rows).select(["vector"]).to_arrow().column("vector")
        )
    count = sum(1 for _ in mapped.groups(vectors))
    chosen = set(np.linspace(0, count - 1, _GROUPS).round().astype(int).tolist())
    groups = enumerate(mapped.groups(vectors))
    found = [to_numpy(group.read(["vector"]).column(0)) for i, group in groups if i in chosen]
    rows = np.sort(rng.permutation(sum(map(len, found)))[:SAMPLE])
    return np.concatenate(found)[rows]


def percentile(cosine: float, pairs: np.ndarray) -> float | None:
    """Per cent of pairs (ascending) whose cosine is less; None of no pairs."""
    return (
        round(100 * int(np.searchsorted(pairs, cosine - 1e-6)) / len(pairs), 1)
        if len(pairs)
        else None
    )


def show(name: str, hits: list[Hit], pairs: np.ndarray) -> None:
    """A line a neighbour: cosine, path, label, and the per cent of random pairs that are less
    alike.
    """
    print(f"{display(name)}:" + ("" if hits else " nothing found"))
    for hit in hits:
        label = f"  [{printable(hit.label)}]" if hit.label else ""
        standing = f"  (above {_standing(hit, pairs)} of random pairs)" if len(pairs) else ""
        print(f"  {hit.cosine:.4f}  {display(hit.path)}{label}{standing}")


def _standing(hit: Hit, pairs: np.ndarray) -> str:
    found = percentile(hit.cosine, pairs)
    return "-" if found is None else f"{found:.1f} %"


def to_json(name: str, hits: list[Hit], pairs: np.ndarray) -> str:
    """A line of JSON a query; percentile: of random pairs of the index that are less alike."""
    rows = [
        {"rank": i, **vars(hit), "percentile": percentile(hit.cosine, pairs)}
        for i, hit in enumerate(hits, 1)
    ]
    return json.dumps({"query": name, "hits": rows})


@lru_cache(maxsize=4096)  # 100 KiB each; the neighbours of many queries are often the same
def drawn_points(path: str, up_axis: str) -> np.ndarray:
    """Points n 3 of a cloud as they are drawn, z-up. Raises ReadError and OSError."""
    cloud, z_up = open_cloud(path)
    points = enough_points(cloud, 1, 0).points
    return even_sample(
        points if z_up else points @ cloud.to_z_up("z" if up_axis == "none" else up_axis).T
    )


def draw(paths: Sequence[str], titles: Sequence[str], up_axis: str, caption: str) -> list[str]:
    """HTML of clouds side by side; those that are no longer there are said."""
    clouds, shown, missing = [], [], []
    for path, title in zip(paths, titles, strict=True):
        try:
            clouds.append(drawn_points(path, up_axis))
            shown.append(title)
        except (ReadError, OSError) as error:
            missing.append(note(f"not drawn: {printable(str(error))}", "warning"))
    return [
        *([picture(partial(draw_contact_sheet, clouds, shown), caption)] if clouds else []),
        *missing,
    ]


def write_page(
    found: list[tuple[str, list[Hit]]], making: Making, index: Path, pairs: np.ndarray, out: Path
) -> None:
    """A page of every query and its neighbours; pictures of the first ten of each, and of the first
    100 queries.
    """
    sections = []
    for number, (name, hits) in enumerate(found):
        rows = [
            (i, f"{hit.cosine:.4f}", _standing(hit, pairs), hit.label, display(hit.path))
            for i, hit in enumerate(hits, 1)
        ]
        parts = []
        if number < PICTURED:
            titles = [
                "query",
                *(f"{hit.cosine:.4f} {printable(Path(hit.path).name)}" for hit in hits[:DRAWN]),
            ]
            caption = f"{display(name)} and its neighbours" + (
                f", the first {DRAWN} of {len(hits):,}" if len(hits) > DRAWN else ""
            )
            parts += draw(
                [name, *(hit.path for hit in hits[:DRAWN])], titles, making.up_axis, caption
            )
        parts.append(table(("", "cosine", "pairs less alike", "label", "file"), rows[:LISTED]))
        if len(rows) > LISTED:
            parts.append(
                note(
                    f"{len(rows) - LISTED:,} more are not listed here; jepa3d search --json has them"
                )
            )
        sections.append(section(display(name), *parts))
    meaning = (
        f"Beside each cosine: how many of {len(pairs):,} random pairs of the index are less alike. "
    )
    meaning += "A cosine that many pairs reach is no match, however near 1."
    meaning += (
        f" Pictures are of the first {PICTURED} of {len(found):,} queries."
        if len(found) > PICTURED
        else ""
    )
    settings = facts(
        {"index": str(index), "encoder": making.model, "fingerprint": making.fingerprint}
    )
    parts = [note(meaning), *sections, settings]
    write_bytes(
        out,
        page("Nearest shapes", f"{len(found)} queries", "by cosine", parts).encode(
            errors="backslashreplace"
        ),
    )


def display(path: str) -> str:
    """A path as seen from here, where it lies below, on one line."""
    return printable(path.removeprefix(f"{Path.cwd()}/"))
