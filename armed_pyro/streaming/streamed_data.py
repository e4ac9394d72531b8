"""Data too large for memory: scanned once, then fitted from sorted and shuffled files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from armed_pyro._messages import progress_console, unknown
from armed_pyro.data.censoring import check_observed
from armed_pyro.data.columns import Missing
from armed_pyro.data.grouping import check_several
from armed_pyro.data.schema import WeightsKind
from armed_pyro.data.weights import weights_role
from armed_pyro.streaming.encoded_table import EncodedTable, encode
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.scan import TableScan, scan, with_cells

__all__ = ["StreamedData"]


@dataclass(frozen=True, eq=False)
class StreamedData:
    """Rows of a Parquet file that `armed_pyro.fit` reads from disk instead of holding them.

    The fit reads the file a second time and writes the encoded rows to a temporary file. For
    mini-batches of rows or of whole clusters, DuckDB makes copies that are shuffled or sorted by
    cluster. A thread reads these ahead of training. Memory holds O(clusters) numbers, blocks of
    rows and, before training, the outcome (8 bytes per row).

    Attributes
    ----------
    table, scanned : TableBlocks, TableScan
        The file; and its schema, and labels and numbers of rows of its clusters.
    feature_names : tuple of str
        Names of the encoded feature columns.
    memory : int
        Memory limit of a fit's process in bytes. DuckDB gets an eighth of it, but at least 64 MB
        and 1 MB per column.
    folder : path, optional
        Folder for the temporary files. The encoded rows take 8 bytes per row and column, as does
        every copy while it is made.

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
        event: Any = None,
        categorical: Sequence[str] = (),
        weights_kind: WeightsKind = "frequency",
        se: str | None = None,
        times: Sequence[str] = (),
        status: str | None = None,
        upper: str | None = None,
        entry: str | None = None,
        missing: Missing = "error",
        memory: int = 2 * 10**9,
        folder: str | os.PathLike[str] | None = None,
    ) -> StreamedData:
        """Read a Parquet file once; see `ClusteredData.from_frame` for the other parameters.

        Raises
        ------
        ValueError
            If the file is no readable Parquet table, or, with the first such row, for bad values.
        """
        table = TableBlocks.open(Path(path))
        if table.frame is not None:
            raise ValueError(
                f"{path} is not a Parquet file, the only kind that is streamed: convert it, for "
                "example with pandas.read_csv(path).to_parquet('rows.parquet')"
            )
        weights, kind = weights_role(weights, weights_kind, se)
        roles: dict[str, Any] = {"trials": trials, "offset": offset, "weights": weights}
        check_observed(status, upper)
        roles.update(status=status, upper=upper, entry=entry)
        roles.update(categorical=categorical, weights_kind=kind, times=times)
        scanned = scan(
            table,
            outcome,
            clusters,
            features,
            missing,
            event=event,
            memory=memory,
            folder=folder,
            **roles,
        )
        return cls(table, scanned, scanned.first.feature_names, memory, folder)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.scanned.n_rows

    @property
    def n_features(self) -> int:
        """Number of encoded feature columns."""
        return len(self.feature_names)

    @contextmanager
    def encoded(
        self, factors: Sequence[str], seed: int, *, progress: bool = False
    ) -> Iterator[EncodedTable]:
        """The encoded rows in a temporary file; it and its copies are deleted at the end.

        The program needs the `factors`; those of cells take one more pass over the file. The seed
        is that of the shuffle and of the sample that a fit keeps. Raises ValueError if a factor's
        column is not among the clusters, or a factor or a feature does not vary.
        """
        scanned = self.scanned
        for name in factors:
            if name not in scanned.levels:
                for part in name.split(":"):
                    if part not in scanned.levels:
                        raise unknown("cluster column", part, scanned.levels)
                scanned = with_cells(scanned, self.table, name)
            check_several(name, scanned.levels[name])
        with tempfile.TemporaryDirectory(prefix=".armed_pyro-rows-", dir=self.folder) as folder:
            path = Path(folder) / "rows.parquet"
            with Progress(console=progress_console(), disable=not progress, transient=True) as bar:
                report = partial(bar.advance, bar.add_task("encoding rows", total=self.n_rows))
                settings = self.memory, seed, tuple(factors)
                encoded = encode(self.table, scanned, path, *settings, report)
            bar.console.print(
                f"{path.stat().st_size / 1e9:.2f} GB of rows in temporary files in {folder}, "
                "removed at the end",
                markup=False,
            )
            yield encoded
