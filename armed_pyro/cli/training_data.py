"""The table that the command line fits: held in memory, or streamed if it is too large."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import read_table
from armed_pyro.families.family import Family
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.streamed_data import StreamedData

__all__ = ["TrainingTable", "byte_size", "outputs"]


# Bytes of memory of the process without a table, and of one value of the table in all its copies.
BASE, BYTES_HELD = 500_000_000, 64
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


@dataclass(frozen=True, eq=False)
class TrainingTable:
    """A table in a file, and the memory limit of its fit.

    Attributes
    ----------
    table : TableBlocks
        The file.
    memory : int
        Limit in bytes.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pd.DataFrame({"x": range(1000)}).to_parquet(f"{folder}/t.parquet")
    ...     table = TrainingTable.open(Path(f"{folder}/t.parquet"), 10_000)
    >>> table.need, table.streamed
    (500064000, True)
    """

    table: TableBlocks
    memory: int

    @classmethod
    def open(cls, path: Path, memory: int) -> TrainingTable:
        """The table in a file; a CSV file is read immediately."""
        return cls(TableBlocks.open(path), memory)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return self.table.columns

    @property
    def need(self) -> int:
        """Estimated bytes of memory for the table in memory, with those of the process."""
        return BASE + BYTES_HELD * self.table.n_rows * len(self.columns)

    @property
    def streamed(self) -> bool:
        """Whether the table is a Parquet file that is too large for memory."""
        return self.table.frame is None and self.need > self.memory

    def rows(self, folder: Path, **roles: Any) -> ClusteredData | StreamedData:
        """The rows, in memory or streamed.

        Parameters
        ----------
        folder : Path
            Folder for temporary files of a streamed table.
        **roles
            Columns by role, as in `ClusteredData.from_frame`.

        Raises
        ------
        ValueError
            If a column cannot be used in its role; see `ClusteredData.from_frame`.
        """
        if self.streamed:
            folder.mkdir(parents=True, exist_ok=True)
            path = self.table.path
            return StreamedData.scan(path, memory=self.memory, folder=folder, **roles)
        frame = self.table.frame
        return ClusteredData.from_frame(
            read_table(self.table.path) if frame is None else frame, **roles
        )


def outputs(rows: ClusteredData | StreamedData, family: Family) -> int:
    """Number of outputs that a network needs for the outcome of these rows.

    Raises
    ------
    ValueError
        If a streamed outcome has classes that are numbers.
    """
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

    Raises
    ------
    ValueError
        If the text is not a size.

    Examples
    --------
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
