"""Predictions written to CSV or Parquet, block by block."""

from __future__ import annotations

import gzip
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from armed_pyro.prediction.result import Prediction

__all__ = ["write_predictions"]


def write_predictions(parts: Iterator[Prediction], path: Path) -> Iterator[int]:
    """Write predictions block by block, as CSV or Parquet by suffix.

    The file appears only once it is complete.

    Yields
    ------
    int
        Number of rows of the block that was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The draft is in the same folder, because replacing is atomic only within one file system.
    draft = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    name = path.name.lower()
    writer: Any = None
    try:
        with ExitStack() as files:
            for part in parts:
                frame = part.to_frame()
                if name.endswith((".csv", ".csv.gz")):
                    first = writer is None
                    if first:
                        text = gzip.open if name.endswith(".gz") else open
                        writer = files.enter_context(text(draft, "wt", encoding="utf-8"))
                    frame.to_csv(writer, header=first, index=False)
                else:
                    block = pa.Table.from_pandas(frame, preserve_index=False)
                    if writer is None:
                        writer = files.enter_context(pq.ParquetWriter(draft, block.schema))
                    writer.write_table(block)
                yield len(frame)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
