"""Predictions of tables larger than memory: read, predicted and handed on block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping, as_seen
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.similarity import Evidence, gather, merge, warn_if_alien
from armed_pyro.prediction.sources import source_of
from armed_pyro.prediction.unseen import apart, check_mode
from armed_pyro.program.blocks import BLOCK_VALUES
from armed_pyro.streaming.parquet_table import TableBlocks

__all__ = ["predict_table"]


# Rows that a classifier reads at a time.
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
    report: Callable[[str, int, int], Any] = lambda what, done, total: None,
) -> tuple[Iterator[Prediction], pd.DataFrame | None]:
    """Expected outcomes of a table's rows in blocks, and the membership table.

    Rows need not be sorted by cluster: the effects of a new cluster are made from the seed and its
    label, so that they are the same in every block. Clusters are listed in a first pass; the mode
    "membership" (or "nearest") reads the features of the new ones in a second.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    table : TableBlocks
        The rows.
    unseen, support, pooled, draws, prob, seed, classifiers
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
    classifiers = Classifiers() if classifiers is None else classifiers
    schema = posterior.model.data_facts().schema
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
    _check_columns(posterior, table, wanted)
    new = _new_clusters(posterior, table, report)
    check_mode(unseen, new, support=support is not None)
    resembling = unseen in ("membership", "nearest") and any(map(len, new.values()))
    evidence = (
        _evidence(posterior, table, wanted, classifiers, report) if resembling and pooled else None
    )
    settings: dict[str, Any] = {"draws": draws, "seed": seed}
    source = None
    if pooled or not resembling:
        source = source_of(posterior, unseen, new, support, evidence, **settings)

    def parts() -> Iterator[Prediction]:
        terms = sum(len(one.terms) for one in posterior.model.factors)
        terms += len(posterior.model.data_facts().columns)
        start = 0
        for frame in table.blocks(max(1, BLOCK_VALUES // (draws * terms)), wanted):
            data = ClusteredData.encode(frame, schema)
            mine = source
            if mine is None:
                data = apart(posterior.model, data, start)
                mine = source_of(
                    posterior, unseen, new, None, gather(posterior, data, classifiers), **settings
                )
            yield from predict_chunks(
                posterior, data, mine, prob=prob, draws=draws, seed=seed, outcomes=False
            )
            start += len(frame)

    return parts(), None if evidence is None else evidence.table()


def _check_columns(posterior: Posterior, table: TableBlocks, wanted: tuple[str, ...]) -> None:
    """Raise what encoding would, if a column is missing."""
    if any(name not in table.columns for name in wanted):
        first = next(table.blocks(1), pd.DataFrame(columns=list(table.columns)))
        schema = posterior.model.data_facts().schema
        if schema is not None:
            ClusteredData.encode(first, schema)


def _new_clusters(
    posterior: Posterior, table: TableBlocks, report: Callable[[str, int, int], Any]
) -> dict[str, pd.Index]:
    """Labels of the clusters that training did not see, from the cluster columns alone."""
    facts, schema = posterior.model.data_facts(), posterior.model.data_facts().schema
    assert schema is not None  # for mypy: checked by the caller
    columns = {
        factor.name: [factor.name] if factor.name in schema.clusters else factor.name.split(":")
        for factor in posterior.model.factors
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
    posterior: Posterior,
    table: TableBlocks,
    wanted: tuple[str, ...],
    classifiers: Classifiers,
    report: Callable[[str, int, int], Any],
) -> Evidence:
    """Pooled evidence of all rows of every new cluster."""
    schema = posterior.model.data_facts().schema
    assert schema is not None  # for mypy: checked by the caller
    total, done = Evidence({}, {}), 0
    for frame in table.blocks(EVIDENCE_ROWS, wanted):
        total = merge(total, gather(posterior, ClusteredData.encode(frame, schema), classifiers))
        done += len(frame)
        report("comparing clusters", done, table.n_rows)
    warn_if_alien(total.table())
    return total
