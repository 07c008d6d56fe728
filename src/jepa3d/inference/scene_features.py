"""Features of a scene in Parquet: one row a point, in any order.

index    the point's row in the scan, from 0
x, y, z  float64, the scan's own
feature  C float32 or float16

The file's metadata `jepa3d` is JSON: format, model, fingerprint, tile and up_axis.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ValueError("features are kept in Parquet: pip install 'jepa3d[search]'") from error

FORMAT = "jepa3d-scene-1"
ROWS = 32_768  # of a row group, at least


class FeatureFile:
    """Writes features; `close` makes the file whole."""

    def __init__(self, path: Path, width: int, dtype: str, making: dict[str, Any]):
        number = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        fields = [("index", pa.int64()), *((axis, pa.float64()) for axis in "xyz")]
        metadata = {"jepa3d": json.dumps({"format": FORMAT} | making)}
        self.schema = pa.schema([*fields, ("feature", pa.list_(number, width))], metadata)
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
        self._writer = pq.ParquetWriter(
            path,
            self.schema,
            **options,
            use_byte_stream_split=["feature.list.element"] if dtype == "float32" else False,
        )
        self.dtype = dtype
        self._rows: list[tuple[np.ndarray, ...]] = []

    def add(self, index: np.ndarray, xyz: np.ndarray, features: np.ndarray) -> None:
        """Points n 3, their rows n and features n C."""
        self._rows.append((index, xyz, features.astype(self.dtype)))
        if sum(len(index) for index, *_ in self._rows) >= ROWS:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        index, xyz, features = (np.concatenate(parts) for parts in zip(*self._rows, strict=True))
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(features.reshape(-1)), type=self.schema.field("feature").type
        )
        columns = [
            pa.array(index),
            *(pa.array(np.ascontiguousarray(xyz[:, i])) for i in range(3)),
            vectors,
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self._rows = []
