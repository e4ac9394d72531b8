"""A table in a file, read in blocks or by row numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from armed_pyro.data.files import read_table, to_pandas

__all__ = ["TableBlocks", "group_starts", "take_rows"]


@dataclass(frozen=True, eq=False)
class TableBlocks:
    """The table in a file; Parquet is streamed, other formats are held in memory."""

    path: Path
    frame: pd.DataFrame | None  # the table, if it is held in memory
    n_rows: int
    columns: tuple[str, ...]
    needed: tuple[str, ...] = ()  # rows with missing values in these columns are left out

    @classmethod
    def open(cls, path: Path, labels: Collection[str] = ()) -> TableBlocks:
        """The table in a file; ValueError if it is not a readable table.

        The columns of `labels` are read as by `read_table`.
        """
        if path.name.lower().endswith((".parquet", ".pq")) and path.is_file():
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is not a readable Parquet file ({error})") from error
            if file.metadata.num_rows:
                return cls(path, None, file.metadata.num_rows, tuple(file.schema_arrow.names))
        frame = read_table(path, labels=labels)  # raises the error for a missing or unreadable file
        return cls(path, frame, len(frame), tuple(frame.columns))

    def blocks(self, size: int, columns: tuple[str, ...] | None = None) -> Iterator[pd.DataFrame]:
        """Yield the rows in order, at most `size` at a time.

        By default, all columns are read. Names of absent columns are ignored.
        """
        wanted = self._wanted(columns)
        if not self.needed:
            yield from self._all_rows(size, wanted)
            return
        needed = [name for name in self.columns if name in self.needed or name in wanted]
        for frame in self._all_rows(size, needed):
            complete = frame.dropna(subset=self._wanted(self.needed))
            if len(complete):
                yield complete[wanted].infer_objects()

    def without_holes(self, needed: tuple[str, ...]) -> TableBlocks:
        """The table whose `blocks` leave out rows with missing values in these columns.

        ValueError if no row is complete.
        """
        table = replace(self, needed=tuple(self._wanted(needed)))
        if not any(mask.any() for mask in table.complete_rows()):
            raise ValueError(f"Every row of {self.path} has missing values.")
        return table

    def complete_rows(self) -> Iterator[Bool[np.ndarray, " rows"]]:
        """Whether each row has all values in the needed columns, in blocks of rows."""
        for frame in self._all_rows(2**16, list(self.needed)):
            yield frame.notna().all(axis=1).to_numpy()

    def _all_rows(self, size: int, wanted: list[str]) -> Iterator[pd.DataFrame]:
        if self.frame is not None:
            for start in range(0, self.n_rows, size):
                yield self.frame[wanted].iloc[start : start + size]
            return
        with self._parquet() as file:
            for batch in file.iter_batches(size, columns=wanted):
                yield to_pandas(pa.Table.from_batches([batch]))

    def take(
        self, rows: Int[np.ndarray, " taken"], columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """The Parquet rows with these increasing numbers; only their row groups are read."""
        with self._parquet() as file:
            taken = take_rows(file, group_starts(file.metadata), rows, self._wanted(columns))
        frame = to_pandas(taken.unify_dictionaries())
        frame.index = pd.Index(rows)
        return frame

    def _wanted(self, columns: Sequence[str] | None) -> list[str]:
        return [name for name in self.columns if columns is None or name in columns]

    def _parquet(self) -> pq.ParquetFile:
        # Without these settings, pyarrow holds whole row groups in memory.
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Arrow's types of the columns of the Parquet file."""
        schema = pq.read_schema(self.path)
        return dict(zip(schema.names, schema.types, strict=True))


def group_starts(metadata: pq.FileMetaData) -> Int[np.ndarray, " groups_and_end"]:
    """Number of the first row of each row group, and the number of rows."""
    sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
    return np.cumsum([0, *sizes])


def take_rows(
    file: pq.ParquetFile,
    starts: Int[np.ndarray, " groups_and_end"],
    rows: Int[np.ndarray, " taken"],
    columns: list[str] | None = None,
) -> pa.Table:
    """The rows with these increasing numbers, from row groups with these `group_starts`."""
    parts = []
    for group in np.unique(np.searchsorted(starts, rows, "right") - 1).tolist():
        start = starts[group]
        for batch in file.iter_batches(row_groups=[group], columns=columns, use_threads=False):
            low, high = np.searchsorted(rows, [start, start + batch.num_rows])
            parts.append(pa.Table.from_batches([batch]).take(rows[low:high] - start))
            start += batch.num_rows
    return pa.concat_tables(parts)
