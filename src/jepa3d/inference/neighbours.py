"""Show search results as text, JSON or an HTML page. Each cosine is compared with the cosines of
random pairs of vectors in the index, which is the file or database that was searched.
"""

import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from jepa3d.data.cloud import ReadError
from jepa3d.data.errors import printable
from jepa3d.data.io import sampled
from jepa3d.evaluation.descriptors import unit_length
from jepa3d.figures import draw_contact_sheet, even_sample
from jepa3d.inference.clouds import item_at
from jepa3d.inference.hits import Hit
from jepa3d.inference.search import groups, open_index
from jepa3d.inference.vectors import Vectors, to_numpy
from jepa3d.page import document, facts, note, picture, section, table
from jepa3d.plain import write_bytes

SAMPLE = 1000  # the random pairs are all pairs among this many random vectors
# Limits of a page: neighbours drawn per query, neighbours listed per query, queries with pictures.
DRAWN, LISTED, PICTURED = 10, 100, 100
# This many row groups (blocks of rows) of a large Parquet file are read for the sample.
_GROUPS = 32


def random_cosines(index: Path, seed: int = 0) -> np.ndarray:
    """Return the cosines of all pairs among 1,000 random vectors of an index, in ascending order.
    If the index has fewer vectors, all pairs among its vectors are used.
    """
    x = _sample(index, np.random.default_rng(seed)).astype(np.float64)
    x = unit_length(x[x.any(1)])  # without zero vectors, which have no cosine
    return np.sort((x @ x.T)[np.triu_indices(len(x), 1)])


def _sample(index: Path, rng: np.random.Generator) -> np.ndarray:
    """Sample at most SAMPLE vectors [n, E] of an index. From a large file, only 32 evenly spread
    row groups are read.
    """
    vectors = open_index(index)
    if not isinstance(vectors, Vectors):
        rows = np.sort(rng.permutation(len(vectors))[:SAMPLE]).tolist()
        taken = vectors.table.take_offsets(rows).select(["vector"]).to_arrow()
        return to_numpy(taken["vector"])
    count = sum(1 for _ in groups(vectors))
    chosen = set(np.linspace(0, count - 1, _GROUPS).round().astype(int).tolist())
    # Each `read` is called at once, since it is valid only until `groups` yields the next one.
    numbered = enumerate(groups(vectors))
    parts = [read(["vector"]).column(0) for i, (read, _) in numbered if i in chosen]
    sample = np.concatenate([to_numpy(part) for part in parts])
    return sample[np.sort(rng.permutation(len(sample))[:SAMPLE])]


def percentile(cosine: float, pairs: np.ndarray) -> float | None:
    """Return the percentage of random pairs whose cosine is lower than `cosine`; None if there are
    no pairs.

    pairs: cosines of random pairs, in ascending order.
    """
    if not len(pairs):
        return None
    # The cosine of a hit is rounded to six decimals. So a pair counts only if its cosine is lower
    # by more than 1e-6.
    return round(100 * int(np.searchsorted(pairs, cosine - 1e-6)) / len(pairs), 1)


def to_text(name: str, hits: list[Hit], pairs: np.ndarray) -> str:
    """Format a query's neighbours, one per line: cosine, path, label, and the percentage of random
    pairs with a lower cosine.
    """
    lines = [f"{display(name)}:" + ("" if hits else " nothing found")]
    for hit in hits:
        label = f"  [{printable(hit.label)}]" if hit.label else ""
        above = _standing(hit, pairs)
        above = f"  (above {above} of random pairs)" if above else ""
        lines.append(f"  {hit.cosine:.4f}  {display(hit.path)}{label}{above}")
    return "\n".join(lines)


def _standing(hit: Hit, pairs: np.ndarray) -> str:
    """Format the percentage of random pairs whose cosine is lower than that of a hit; "" if there
    are no pairs.
    """
    found = percentile(hit.cosine, pairs)
    return "" if found is None else f"{found:.1f} %"


def to_json(name: str, hits: list[Hit], pairs: np.ndarray) -> str:
    """Format a query's neighbours as one line of JSON. The key "percentile" of a neighbour holds
    the result of the function `percentile`.
    """
    rows = [
        {"rank": i, **vars(hit), "percentile": percentile(hit.cosine, pairs)}
        for i, hit in enumerate(hits, 1)
    ]
    return json.dumps({"query": name, "hits": rows})


# The points are cached (100 KiB per cloud), since a cloud is often a neighbour of many queries.
@lru_cache(maxsize=4096)
def drawn_points(path: str, up_axis: str) -> np.ndarray:
    """Return the points [n, 3], rotated to z-up, that represent a cloud in a picture.

    up_axis: the setting of the index; "none" counts as "z". Raises ReadError or OSError if the
    cloud cannot be read.
    """
    item = item_at(path)
    cloud = sampled(item.read(), 1)
    return even_sample(item.turned(cloud, "z" if up_axis == "none" else up_axis))


def draw(paths: list[str], titles: list[str], up_axis: str, caption: str) -> list[str]:
    """Draw clouds side by side. Returns parts of an HTML page: the picture, and a note for each
    cloud that cannot be drawn.
    """
    clouds, shown, missing = [], [], []
    for path, title in zip(paths, titles, strict=True):
        try:
            clouds.append(drawn_points(path, up_axis))
            shown.append(title)
        except (ReadError, OSError) as error:
            missing.append(note(f"not drawn: {printable(str(error))}", "warning"))
    sheet = partial(draw_contact_sheet, clouds, shown)
    return ([picture(sheet, caption)] if clouds else []) + missing


def write_page(
    found: list[tuple[str, list[Hit]]], index: Path, pairs: np.ndarray, out: Path
) -> None:
    """Write an HTML page that lists queries and their first 100 neighbours. For each of the first
    100 queries, the page also has pictures of the first ten neighbours.
    """
    meaning = f"The column 'random pairs below' has the share of {len(pairs):,} random pairs of "
    meaning += "clouds whose cosine is lower than that of the result. If many pairs have a higher "
    meaning += "cosine, a result is no match, even if its cosine is near 1."
    if len(found) > PICTURED:
        meaning += f" The first {PICTURED} of {len(found):,} queries have pictures."
    parts, spec = [note(meaning)], open_index(index).spec
    for number, (name, hits) in enumerate(found):
        drawn = _pictures(name, hits, spec.up_axis) if number < PICTURED else []
        rows = []
        for i, hit in enumerate(hits[:LISTED], 1):
            above, file = _standing(hit, pairs), display(hit.path)
            rows.append((i, f"{hit.cosine:.4f}", above, hit.label, file))
        header = ("", "cosine", "random pairs below", "label", "file")
        drawn.append(table(header, rows))
        if (more := len(hits) - LISTED) > 0:
            hint = "jepa3d search --json lists them"
            drawn.append(note(f"{more:,} more are not listed here; {hint}"))
        parts.append(section(display(name), *drawn))
    encoder = {"encoder": spec.model, "fingerprint": spec.fingerprint}
    parts.append(facts({"index": str(index)} | encoder))
    html = document("Nearest shapes", f"{len(found)} queries", "by cosine", parts)
    write_bytes(out, html.encode(errors="backslashreplace"))


def _pictures(name: str, hits: list[Hit], up_axis: str) -> list[str]:
    """Draw a query beside its first neighbours; returns parts of an HTML page, as `draw` does."""
    first = hits[:DRAWN]
    titles = [f"{hit.cosine:.4f} {printable(Path(hit.path).name)}" for hit in first]
    caption = f"{display(name)} and its neighbours"
    if len(hits) > DRAWN:
        caption += f", the first {DRAWN} of {len(hits):,}"
    paths = [hit.path for hit in first]
    return draw([name, *paths], ["query", *titles], up_axis, caption)


def display(path: str) -> str:
    """Return a path as one line of text. A path inside the current folder is shortened to the path
    relative to that folder.
    """
    return printable(path.removeprefix(f"{Path.cwd()}/"))
