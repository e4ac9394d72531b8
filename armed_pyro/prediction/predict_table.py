"""Predictions of tables larger than memory: read, predicted and handed on block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from armed_pyro.data.files import read_table
from armed_pyro.data.grouping import Grouping, as_seen
from armed_pyro.prediction.chunks import predict_chunks, source_of
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.similarity import Evidence, gather, merge, warn_if_alien
from armed_pyro.prediction.unseen import apart, check_mode
from armed_pyro.program.blocks import BLOCK_VALUES

if TYPE_CHECKING:
    from armed_pyro.fitted import Fit


__all__ = ["TableBlocks", "predict_table"]


# Rows that a classifier reads at a time.
EVIDENCE_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class TableBlocks:
    """Rows of a file, in blocks; Parquet is streamed, CSV is held in memory.

    Attributes
    ----------
    path : Path
    frame : pandas.DataFrame or None
        The table, if it is held.
    n_rows : int
    columns : tuple of str

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pd.DataFrame({"x": range(5)}).to_parquet(f"{folder}/t.parquet")
    ...     [len(one) for one in TableBlocks.open(Path(f"{folder}/t.parquet")).blocks(2)]
    [2, 2, 1]
    """

    path: Path
    frame: pd.DataFrame | None
    n_rows: int
    columns: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> TableBlocks:
        """The table in a file.

        Raises
        ------
        ValueError
            If there is no such file, or it is not a readable table.
        """
        if path.name.lower().endswith((".parquet", ".pq")) and path.is_file():
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is not a readable Parquet file ({error})") from error
            names = tuple(file.schema_arrow.names)
            if file.metadata.num_rows:
                return cls(path, None, file.metadata.num_rows, names)
        frame = read_table(path)  # which says what is wrong with the path
        return cls(path, frame, len(frame), tuple(frame.columns))

    def blocks(self, size: int, columns: tuple[str, ...] | None = None) -> Iterator[pd.DataFrame]:
        """The rows in order, at most `size` at a time; only some columns, where they exist."""
        wanted = [name for name in self.columns if columns is None or name in columns]
        if self.frame is not None:
            for start in range(0, self.n_rows, size):
                yield self.frame[wanted].iloc[start : start + size]
            return
        # Buffered by column: reading whole row groups ahead would keep the file in memory.
        with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20) as file:
            for batch in file.iter_batches(size, columns=wanted):
                yield batch.to_pandas()

    def take(
        self, rows: Int[np.ndarray, " taken"], columns: tuple[str, ...] | None = None
    ) -> pd.DataFrame:
        """The rows with these numbers, which increase, read from the row groups that hold them."""
        wanted = [name for name in self.columns if columns is None or name in columns]
        if self.frame is not None:
            return self.frame[wanted].iloc[rows]
        parts = []
        with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20) as file:
            sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
            starts = np.cumsum([0, *sizes])
            groups = np.unique(np.searchsorted(starts, rows, "right") - 1)
            for group in groups:
                start = starts[group]
                for batch in file.iter_batches(row_groups=[int(group)], columns=wanted):
                    low, high = np.searchsorted(rows, [start, start + batch.num_rows])
                    parts.append(pa.Table.from_batches([batch]).take(rows[low:high] - start))
                    start += batch.num_rows
        found = pa.concat_tables(parts).unify_dictionaries().to_pandas()
        found.index = pd.Index(rows)
        return found

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Arrow's types of the columns of a Parquet file."""
        schema = pq.read_schema(self.path)
        return dict(zip(schema.names, schema.types, strict=True))


def predict_table(
    fit: Fit,
    table: TableBlocks,
    *,
    unseen: str | None = None,
    support: pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    report: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> tuple[Iterator[Prediction], pd.DataFrame | None]:
    """Expected outcomes of a table's rows in blocks, and the membership table.

    Rows need not be sorted by cluster: the effects of a new cluster are made from the seed and its
    label, so that they are the same in every block. Clusters are listed in a first pass; the mode
    "membership" (or "nearest") reads the features of the new ones in a second.

    Parameters
    ----------
    fit : Fit
        The fit, to a table.
    table : TableBlocks
        The rows.
    unseen, support, pooled, draws, prob, seed
        See `armed_pyro.prediction.predict.predict`.
    report : callable, optional
        Told what is being done, to how many rows, and of how many.

    Raises
    ------
    ValueError
        As `armed_pyro.prediction.predict.predict`, before anything is predicted.

    Examples
    --------
    ``parts, _ = predict_table(fit, TableBlocks.open(path), unseen="marginal")``
    """
    schema = fit.model.data_facts().schema
    if schema is None:
        raise ValueError("the model was fitted to arrays, so it cannot read a table")
    if not 0 < prob < 1:
        raise ValueError(f"`prob` must lie between 0 and 1, not {prob}")
    if draws < 2:
        raise ValueError(f"a prediction needs at least 2 draws, not {draws}")
    wanted = tuple(
        name
        for name in (*schema.columns, *schema.clusters, schema.trials, schema.offset)
        if name is not None
    )
    _check_columns(fit, table, wanted)
    new = _new_clusters(fit, table, report)
    check_mode(unseen, new, support=support is not None)
    resembling = unseen in ("membership", "nearest") and any(map(len, new.values()))
    evidence = _evidence(fit, table, wanted, report) if resembling and pooled else None
    settings: dict[str, Any] = {"draws": draws, "seed": seed}
    source = None
    if pooled or not resembling:
        source = source_of(fit, unseen, new, support, evidence, **settings)

    def parts() -> Iterator[Prediction]:
        terms = sum(len(one.terms) for one in fit.model.factors)
        terms += len(fit.model.data_facts().columns)
        start = 0
        for frame in table.blocks(max(1, BLOCK_VALUES // (draws * terms)), wanted):
            data = schema.encode(frame)
            mine = source
            if mine is None:
                data = apart(fit.model, data, start)
                mine = source_of(fit, unseen, new, None, gather(fit, data), **settings)
            yield from predict_chunks(
                fit, data, source=mine, prob=prob, draws=draws, seed=seed, outcomes=False
            )
            start += len(frame)

    return parts(), None if evidence is None else evidence.table()


def _check_columns(fit: Fit, table: TableBlocks, wanted: tuple[str, ...]) -> None:
    """Raise what encoding would, if a column is missing."""
    if any(name not in table.columns for name in wanted):
        first = next(table.blocks(1), pd.DataFrame(columns=list(table.columns)))
        schema = fit.model.data_facts().schema
        if schema is not None:
            schema.encode(first)


def _new_clusters(
    fit: Fit, table: TableBlocks, report: Callable[[str, int, int], Any]
) -> dict[str, pd.Index]:
    """Labels of the clusters that training did not see, from the cluster columns alone."""
    facts, schema = fit.model.data_facts(), fit.model.data_facts().schema
    assert schema is not None  # for mypy: checked by the caller
    columns = {
        factor.name: [factor.name] if factor.name in schema.clusters else factor.name.split(":")
        for factor in fit.model.factors
    }
    found: dict[str, pd.DataFrame] = {}
    done = 0
    for frame in table.blocks(2**18, schema.clusters):
        for factor, names in columns.items():
            own = frame[names].drop_duplicates()
            if factor in found:
                own = pd.concat([found[factor], own]).drop_duplicates()
            found[factor] = own
        done += len(frame)
        report("listing clusters", done, table.n_rows)
    new = {}
    for factor, names in columns.items():
        groupings = [
            Grouping.from_labels(found[factor][name], f"cluster column {name!r}") for name in names
        ]
        seen = facts.levels[factor]
        levels = as_seen(reduce(Grouping.cross, groupings).levels, seen)
        new[factor] = levels[~levels.isin(seen)]
    return new


def _evidence(
    fit: Fit,
    table: TableBlocks,
    wanted: tuple[str, ...],
    report: Callable[[str, int, int], Any],
) -> Evidence:
    """Pooled evidence of all rows of every new cluster."""
    schema = fit.model.data_facts().schema
    assert schema is not None  # for mypy: checked by the caller
    total, done = Evidence({}, {}), 0
    for frame in table.blocks(EVIDENCE_ROWS, wanted):
        total = merge(total, gather(fit, schema.encode(frame)))
        done += len(frame)
        report("comparing clusters", done, table.n_rows)
    warn_if_alien(total.table())
    return total
