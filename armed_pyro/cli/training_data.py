"""The table that the command line fits: held in memory, or streamed if it is too large."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import read_table
from armed_pyro.families.family import Family
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.streamed_data import StreamedData

__all__ = ["byte_size", "bytes_needed", "outputs", "training_rows"]


# Bytes of memory of the process without a table, and of one value of the table in all its copies.
BASE, BYTES_HELD = 500_000_000, 64
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


def bytes_needed(table: TableBlocks) -> int:
    """Estimated bytes of memory for the table in memory, with those of the process."""
    return BASE + BYTES_HELD * table.n_rows * len(table.columns)


def training_rows(
    table: TableBlocks, memory: int, folder: Path, **roles: Any
) -> ClusteredData | StreamedData:
    """The rows; those of a Parquet table that needs more memory (in bytes) are streamed.

    `folder` gets the temporary files of a streamed table. The roles of columns, and the errors,
    are those of `ClusteredData.from_frame`.
    """
    if table.frame is None and bytes_needed(table) > memory:
        folder.mkdir(parents=True, exist_ok=True)
        return StreamedData.scan(table.path, memory=memory, folder=folder, **roles)
    frame = read_table(table.path) if table.frame is None else table.frame
    return ClusteredData.from_frame(frame, **roles)


def outputs(rows: ClusteredData | StreamedData, family: Family) -> int:
    """Number of outputs that a network needs for the outcome of these rows."""
    if isinstance(rows, ClusteredData):
        return family.outputs(len(family.columns(rows)))
    if not family.multiclass:
        return family.outputs(1)
    classes = rows.scanned.schema.classes
    if classes is None:
        raise ValueError(
            "the classes of a streamed outcome must be text or categories, not numbers: write "
            "them to the table as text"
        )
    return family.outputs(len(classes) - 1)


def byte_size(text: str | None) -> int:
    """Number of bytes in text such as 2GB or 500 MB; half of the machine's memory for None.

    >>> byte_size("1.5 GB")
    1500000000
    """
    if text is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?b?)\s*", text.lower())
    unit = match and (match[2] if match[2] in UNITS else match[2] + "b")
    if not match or unit not in UNITS or match[1].count(".") > 1 or not float(match[1]) > 0:
        raise ValueError(f"expected a size such as 2GB or 500MB, found {text!r}")
    return int(float(match[1]) * UNITS[unit])
