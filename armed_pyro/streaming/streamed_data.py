"""Tables too large for memory: scanned once, then fitted from sorted and shuffled files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import Missing
from armed_pyro.data.schema import Schema
from armed_pyro.prediction.predict_table import TableBlocks
from armed_pyro.program.model import MixedEffects
from armed_pyro.streaming.scan import TableScan, complete_blocks, scan
from armed_pyro.streaming.sort_and_shuffle import RowFiles, RowWriter

__all__ = ["StreamedData"]


@dataclass(frozen=True, eq=False)
class StreamedData:
    """Rows of a Parquet file that `armed_pyro.fit` reads from disk instead of holding them.

    The fit reads the file once more, and writes its rows, encoded, to temporary files: sorted by
    cluster, and shuffled if mini-batches of rows are needed. Training then reads what it needs
    ahead of time. Held are O(clusters) numbers, blocks of rows, and while the files are written
    the outcome (8 bytes a row).

    Attributes
    ----------
    table : TableBlocks
        The file.
    scanned : TableScan
        Schema, and labels and sizes of the clusters.
    feature_names : tuple of str
        Names of the encoded feature columns.
    memory : int
        Bytes that a fit's process is to stay within; it sets the size of what is sorted at once.
    folder : path, optional
        Where the temporary files go; they take up to three times 4 bytes a row and column.
    missing : {"error", "drop"}
        What to do about rows with missing values.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> table = pd.DataFrame({"y": [0.0, 1, 2, 3], "x": [1.0, 3, 2, 5], "g": [0, 0, 1, 1]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table.to_parquet(f"{folder}/rows.parquet")
    ...     data = StreamedData.scan(f"{folder}/rows.parquet", outcome="y", clusters=["g"])
    ...     data.n_rows, data.feature_names
    (4, ('x',))
    """

    table: TableBlocks
    scanned: TableScan
    feature_names: tuple[str, ...]
    memory: int
    folder: str | os.PathLike[str] | None = None
    missing: Missing = "error"

    @classmethod
    def scan(
        cls,
        path: str | os.PathLike[str],
        *,
        outcome: str,
        clusters: Sequence[str],
        features: Sequence[str] | str | None = None,
        trials: str | None = None,
        offset: str | None = None,
        weights: str | None = None,
        missing: Missing = "error",
        memory: int = 2 * 10**9,
        folder: str | os.PathLike[str] | None = None,
    ) -> StreamedData:
        """Read a Parquet file once; `ClusteredData.from_frame` has the other parameters.

        Raises
        ------
        ValueError
            The file is not a readable Parquet table, or cannot be used as asked; the message names
            the first row at fault.
        """
        table = TableBlocks.open(Path(path))
        if table.frame is not None:
            raise ValueError(
                f"{path} is not a Parquet file, the only kind that is streamed: convert it, for "
                "example with pandas.read_csv(path).to_parquet('rows.parquet')"
            )
        roles = {"trials": trials, "offset": offset, "weights": weights}
        scanned = scan(
            table, outcome=outcome, clusters=clusters, features=features, missing=missing, **roles
        )
        columns = encoded_columns(scanned.schema)
        first = ClusteredData.encode(next(complete_blocks(table, columns, missing)), scanned.schema)
        return cls(table, scanned, first.feature_names, memory, folder, missing)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.scanned.n_rows

    @property
    def n_features(self) -> int:
        """Number of encoded feature columns."""
        return len(self.feature_names)

    @contextmanager
    def laid_out(
        self, model: MixedEffects, seed: int, *, progress: bool = False
    ) -> Iterator[RowFiles]:
        """The rows in files that are deleted afterwards, as this program needs them.

        Raises
        ------
        ValueError
            If the data cannot be fitted: see `Facts.of`.
        """
        with tempfile.TemporaryDirectory(prefix=".armed_pyro-rows-", dir=self.folder) as folder:
            columns = encoded_columns(self.scanned.schema)
            blocks = complete_blocks(self.table, columns, self.missing)
            with (
                Progress(disable=not progress, transient=True) as bar,
                RowWriter(Path(folder), self.scanned, model, self.memory, seed) as writer,
            ):
                task = bar.add_task("writing rows to sort", total=self.n_rows)
                for frame in blocks:
                    writer.add(frame)
                    bar.update(task, completed=writer.done)
                bar.update(task, description="sorting rows")
                files = writer.finish()
                bar.console.print(
                    f"{files.n_bytes / 1e9:.2f} GB of rows in temporary files in {folder}, removed "
                    "at the end",
                    markup=False,
                )
            try:
                yield files
            finally:
                files.close()


def encoded_columns(schema: Schema) -> tuple[str, ...]:
    """The table's columns that a schema reads, each once."""
    roles = (schema.outcome, *schema.clusters, schema.trials, schema.offset, schema.weights)
    return tuple(dict.fromkeys(name for name in (*roles, *schema.columns) if name is not None))
