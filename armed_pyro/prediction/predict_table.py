"""Predictions for tables larger than memory, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping, as_seen
from armed_pyro.data.schema import Schema
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import check_settings, predict_chunks
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.predict import source_of
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.similarity import (
    Evidence,
    gather_evidence,
    merge_evidence,
    warn_if_alien,
)
from armed_pyro.prediction.unseen import RESEMBLING, check_mode, one_cluster_per_row
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.streaming.parquet_table import TableBlocks

__all__ = ["predict_table"]

Report = Callable[[str, int, int], Any]
# Rows in one block for the classifiers.
EVIDENCE_ROWS = 65_536


def predict_table(
    posterior: Posterior,
    table: TableBlocks,
    *,
    unseen: str | None = None,
    support: pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    classifiers: Classifiers | None = None,
    report: Report = lambda name, done, total: None,
) -> tuple[Iterator[Prediction], pd.DataFrame | None]:
    """Expected outcomes of a table's rows in blocks, and the membership table.

    Rows need not be sorted by cluster: the effects of a new cluster are a function of the seed and
    its label, and are the same in every block. A first pass over the table lists the clusters. The
    modes "membership" and "nearest" read the features of new clusters in a second pass.

    `report` is called with the name of the pass, the number of rows read, and the number of all
    rows. The other parameters are those of `armed_pyro.prediction.predict.predict`.

    Returns
    -------
    iterator of Prediction
        One prediction per block. Its `outcome` holds the predictor instead of draws of y.
    pandas.DataFrame or None
        `armed_pyro.prediction.similarity.Evidence.table`, for pooled "membership" or "nearest".

    Raises
    ------
    ValueError
        As `armed_pyro.prediction.predict.predict`, before the first block.
    """
    classifiers = Classifiers() if classifiers is None else classifiers
    schema = posterior.model.data_facts().schema
    if schema is None:
        raise ValueError("the model was fitted to arrays, so it cannot read a table")
    check_settings(draws, prob)
    names = (*schema.columns, *schema.clusters, schema.trials, schema.offset)
    wanted = tuple(name for name in names if name is not None)
    if any(name not in table.columns for name in wanted):  # for the error of `encode`
        first = next(table.blocks(1), pd.DataFrame(columns=list(table.columns)))
        ClusteredData.encode(first, schema)
    new = _new_clusters(posterior, schema, table, report)
    check_mode(unseen, new, support=support is not None)
    resembling = unseen in RESEMBLING and any(map(len, new.values()))
    evidence = source = None
    if resembling and pooled:
        evidence = _evidence(posterior, schema, table, wanted, classifiers, report)
    settings: dict[str, Any] = {"draws": draws, "seed": seed}
    if pooled or not resembling:
        source = source_of(posterior, unseen, new, support, evidence, **settings)

    def parts() -> Iterator[Prediction]:
        size, start = BLOCK_VALUES // (draws * values_per_row(posterior.model)), 0
        for frame in table.blocks(max(1, size), wanted):
            data, block_source = ClusteredData.encode(frame, schema), source
            if block_source is None:
                data = one_cluster_per_row(posterior.model, data, start)
                block_evidence = gather_evidence(posterior, data, classifiers)
                block_source = source_of(posterior, unseen, new, None, block_evidence, **settings)
            options = {**settings, "prob": prob, "outcomes": False}
            yield from predict_chunks(posterior, data, block_source, **options)
            start += len(frame)

    return parts(), None if evidence is None else evidence.table()


def _new_clusters(
    posterior: Posterior, schema: Schema, table: TableBlocks, report: Report
) -> dict[str, pd.Index]:
    """Labels of the clusters not seen in training, from the cluster columns alone."""
    columns = {
        factor.name: [factor.name] if factor.name in schema.clusters else factor.name.split(":")
        for factor in posterior.model.factors
    }
    cells: dict[str, pd.DataFrame] = {}
    done = 0
    for frame in table.blocks(2**18, schema.clusters):
        for factor, names in columns.items():
            distinct = [cells.get(factor), frame[names].drop_duplicates()]
            cells[factor] = pd.concat(distinct).drop_duplicates()
        done += len(frame)
        report("listing clusters", done, table.n_rows)
    new = {}
    for factor, names in columns.items():
        groupings = [
            Grouping.from_labels(cells[factor][name], f"cluster column {name!r}") for name in names
        ]
        seen = posterior.model.data_facts().levels[factor]
        levels = as_seen(reduce(Grouping.cross, groupings).levels, seen)
        new[factor] = levels[~levels.isin(seen)]
    return new


def _evidence(
    posterior: Posterior,
    schema: Schema,
    table: TableBlocks,
    wanted: tuple[str, ...],
    classifiers: Classifiers,
    report: Report,
) -> Evidence:
    """Evidence of every new cluster, pooled over all its rows."""
    total, done = Evidence({}), 0
    for frame in table.blocks(EVIDENCE_ROWS, wanted):
        data = ClusteredData.encode(frame, schema)
        total = merge_evidence(total, gather_evidence(posterior, data, classifiers))
        done += len(frame)
        report("comparing clusters", done, table.n_rows)
    warn_if_alien(total.table())
    return total
