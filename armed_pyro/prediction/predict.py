"""E[y | x, cluster] and y for rows of seen and new clusters, in memory or block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import numpy as np
import pandas as pd

from armed_pyro._messages import check_known
from armed_pyro.data.absent_columns import absent_columns, warn_of_absent, with_new_column
from armed_pyro.data.cluster_means import ClusterSums, added
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import as_pandas
from armed_pyro.data.grouping import ALL_ROWS, Grouping
from armed_pyro.data.label_matching import match_labels
from armed_pyro.data.own_means import extended_by
from armed_pyro.data.schema import Schema
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.adapt import adapt, check_support_in, encoded_support
from armed_pyro.prediction.cell_draws import new_groups
from armed_pyro.prediction.chunks import (
    NetworkUncertainty,
    check_settings,
    new_effects,
    predict_chunks,
    predict_rows,
)
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.similarity import (
    Evidence,
    Resembling,
    evidence_table,
    gather_evidence,
    merge_evidence,
    warn_if_alien,
)
from armed_pyro.prediction.unknown_clusters import (
    filled,
    named,
    unknown_rows,
    with_labels,
    with_membership,
)
from armed_pyro.prediction.unseen import (
    RESEMBLING,
    EffectSource,
    Marginal,
    Population,
    check_mode,
    new_clusters,
    one_cluster_per_row,
    warn_if_all_new,
)
from armed_pyro.program.between import feature_sums
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.names import tree_names
from armed_pyro.streaming.parquet_table import TableBlocks

__all__ = ["effect_source", "predict", "predict_table"]

Report = Callable[[str, int, int], Any]
# Rows in one block for the classifiers.
EVIDENCE_ROWS = 65_536


def predict(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame,
    *,
    unseen: str | None = None,
    support: ClusteredData | pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    others: bool = True,
    interval: Literal["expected", "outcome"] = "expected",
    network_uncertainty: NetworkUncertainty = "none",
    classifiers: Classifiers | None = None,
) -> Prediction:
    r"""E[y | x, cluster] and y of new rows, under every posterior draw.

    Parameters
    ----------
    data : ClusteredData or table
        New rows; a table is encoded as the training table was. The outcome is not needed. A missing
        cluster label in a table means that the identity is unknown, and not that the cluster is
        new: such a row gets the effects of the mode "membership" by its own features.
    unseen : {"population", "marginal", "membership", "nearest", "adapt"}, optional
        Source of the random effects of clusters not seen in training; see
        `armed_pyro.prediction.unseen.MODES`. Required if there are such clusters. All rows of a new
        cluster share its draw.
    support : ClusteredData or table, optional
        Labelled rows of the new clusters, for "adapt"; see `armed_pyro.prediction.adapt.adapt`.
    pooled : bool
        For "membership" and "nearest": whether to pool the features of all rows of a new cluster.
        Otherwise each row is treated as a separate cluster, as in the ARMED paper.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the intervals.
    others : bool
        Whether to predict the program's other outcomes, too. Reconstructed images cost a pass of
        the decoder for each draw.
    interval : {"expected", "outcome"}
        Whether the sds and intervals of `Prediction.to_frame` are those of E[y], or those of y
        (predictive intervals).
    network_uncertainty : {"none", "ensemble"}
        Network of rows of new clusters, if the fit has cross-fitted networks: the mean of all in
        every draw, or one after the other, so that their disagreement is in the intervals. Rows of
        seen clusters always have the network with which their effects were estimated.
    classifiers : Classifiers, optional
        Classifiers for "membership" and "nearest"; a missing one is trained.

    Raises
    ------
    ValueError
        If there are unseen clusters and no mode for them, the rows do not match the training data,
        or support rows lack outcomes or belong to clusters that are not in the data.

    Examples
    --------
    ``fit.predict(rows, unseen="marginal").to_frame()``
    """
    check_known("value of interval=", [interval], ("expected", "outcome"))
    if interval == "outcome" and posterior.model.family.has_class_probabilities:
        raise ValueError("a class has no interval: leave interval='outcome' out")
    check_settings(draws, prob, network_uncertainty)
    known = None
    if unseen == "adapt" and support is not None:
        support = known = encoded_support(posterior, support)
    if not isinstance(data, ClusteredData):
        schema = posterior.model.data_facts().schema
        data = with_labels(as_pandas(data), () if schema is None else schema.clusters)
    data = posterior.encode(data, known)
    source, membership = effect_source(
        posterior,
        data,
        unseen,
        support=support,
        pooled=pooled,
        draws=draws,
        seed=seed,
        classifiers=classifiers,
    )
    by_row = unseen in RESEMBLING and not pooled
    rows = one_cluster_per_row(posterior.model, data) if by_row else data
    if unseen is not None and unseen != "adapt":
        labels = {f.name: named(data.grouping(f.name).levels) for f in posterior.model.factors}
        warn_if_all_new(posterior.model, labels, named_clusters(posterior.model, data))
    made = predict_rows(
        posterior,
        rows,
        source,
        draws=draws,
        prob=prob,
        seed=seed,
        others=others,
        network_uncertainty=network_uncertainty,
    )
    new = {} if by_row else new_effects(posterior.model, source, data)
    names = tree_names(posterior.model)
    return replace(made, new=new, membership=membership, names=names, interval_of=interval)


def effect_source(
    posterior: Posterior,
    data: ClusteredData,
    unseen: str | None,
    *,
    support: ClusteredData | pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    seed: int | None = None,
    classifiers: Classifiers | None = None,
) -> tuple[EffectSource, pd.DataFrame | None]:
    """Check the mode; return the source of the new clusters' effects, and the membership table.

    The parameters are those of `predict`; the table is that of `evidence_table`. Raises ValueError
    if the mode is missing, unknown, or lacks the support that it needs.
    """
    classifiers = Classifiers() if classifiers is None else classifiers
    new = named_clusters(posterior.model, data)
    check_mode(unseen, new, _seen_groups(posterior.model), support=support is not None)
    evidence = table = None
    by_row = unseen in RESEMBLING and not pooled
    rows = one_cluster_per_row(posterior.model, data) if by_row else data
    if unseen in RESEMBLING and any(map(len, new.values())):
        evidence = gather_evidence(posterior, rows, classifiers)
        table = evidence_table(evidence)
        warn_if_alien(table)
    source = _source_of(posterior, unseen, new, support, evidence, draws=draws, seed=seed)
    return with_membership(posterior, source, rows, classifiers, seed), table


def named_clusters(model: MixedEffects, data: ClusteredData) -> dict[str, pd.Index]:
    """Labels of new clusters by factor, without those of rows whose cluster is unknown.

    New times of a process are no new clusters.
    """
    new = {factor: named(labels) for factor, labels in new_clusters(model, data).items()}
    return new_groups(model.factors, new)


def _seen_groups(model: MixedEffects) -> dict[str, pd.Index]:
    """Labels of the clusters that training saw, with those of processes."""
    seen = dict(model.data_facts().levels)
    for factor in model.factors:
        if factor.process is not None:
            outer = factor.name.rpartition(":")[0]
            seen.setdefault(outer, pd.Index(list(factor.process.cells.clusters)))
    return seen


def _source_of(
    posterior: Posterior,
    unseen: str | None,
    new: Mapping[str, pd.Index],
    support: ClusteredData | pd.DataFrame | None = None,
    evidence: Evidence | None = None,
    *,
    draws: int = 1000,
    seed: int | None = None,
) -> EffectSource:
    """The source of new clusters' effects under a mode that `check_mode` has accepted.

    `new` are the labels of all new clusters. `evidence` is needed for "membership" and "nearest".
    """
    seed = posterior.seed if seed is None else seed
    if unseen == "adapt" and support is not None:
        rows = encoded_support(posterior, support)
        check_support_in(new, named_clusters(posterior.model, rows))
        return adapt(posterior, rows, draws=draws, seed=seed).source()
    latents = posterior.draws(draws, seed=seed)
    if evidence is not None:
        return Resembling(latents, seed, evidence, nearest=unseen == "nearest")
    return Population(latents, seed) if unseen == "population" else Marginal(latents, seed)


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
    network_uncertainty: NetworkUncertainty = "none",
    classifiers: Classifiers | None = None,
    report: Report = lambda name, done, total: None,
) -> tuple[Iterator[Prediction], pd.DataFrame | None]:
    """Expected outcomes of a table's rows in blocks, and the membership table.

    Rows need not be sorted by cluster: the effects of a new cluster are a function of the seed and
    its label, and are the same in every block. A first pass over the table lists the clusters. The
    modes "membership" and "nearest" read the features of new clusters in a second pass, from which
    pooled evidence gives the membership table. `report` is called with the name of the pass, the
    number of rows read, and the number of all rows. `Prediction.outcome` holds the predictor
    instead of draws of y. All other parameters, and the errors, which come before the first block,
    are those of `predict`.
    """
    classifiers = Classifiers() if classifiers is None else classifiers
    if (schema := posterior.model.data_facts().schema) is None:
        raise ValueError("the model was fitted to arrays, so it cannot read a table")
    check_settings(draws, prob, network_uncertainty)
    optional = [name for name in (schema.trials, schema.offset) if name is not None]
    wanted = (*schema.columns, *schema.clusters, *optional)
    absent = absent_columns(posterior.model.factor_names(), table.columns, schema.clusters)
    warn_of_absent(posterior.model.factor_names(), absent)
    if any(name not in (*table.columns, *absent) for name in wanted):  # for the error of `encode`
        first = next(table.blocks(1), pd.DataFrame(columns=list(table.columns)))
        ClusteredData.encode(first, schema)
    clusters = _clusters(posterior, schema, table, absent, report)
    new = {name: labels[~seen] for name, (labels, seen) in clusters.items()}
    new = new_groups(posterior.model.factors, new)
    check_mode(unseen, new, _seen_groups(posterior.model), support=support is not None)
    if unseen != "adapt":
        labels = {name: labels for name, (labels, _) in clusters.items()}
        warn_if_all_new(posterior.model, labels, new)
    encode = _encoder(posterior, schema, table, wanted, absent, support, report)
    resembling = unseen in RESEMBLING and any(map(len, new.values()))
    source = membership = evidence = None
    if resembling and pooled:
        passed = _reported(table, EVIDENCE_ROWS, wanted, "comparing clusters", report)
        blocks = map(encode, filled(passed, schema.clusters))
        evidence = _pooled_evidence(posterior, blocks, classifiers)
        membership = evidence_table(evidence)
        warn_if_alien(membership)
    settings: dict[str, Any] = {"draws": draws, "seed": seed}
    options: Any = {"prob": prob, "outcomes": False, "network_uncertainty": network_uncertainty}
    if pooled or not resembling:
        source = _source_of(posterior, unseen, new, support, evidence, **settings)

    def parts() -> Iterator[Prediction]:
        size, start = BLOCK_VALUES // (draws * values_per_row(posterior.model)), 0
        for frame in filled(table.blocks(max(1, size), wanted), schema.clusters):
            data = encode(frame)
            block_source = source
            if block_source is None:
                data = one_cluster_per_row(posterior.model, data, start)
                block_evidence = gather_evidence(posterior, data, classifiers)
                block_source = _source_of(posterior, unseen, new, None, block_evidence, **settings)
            block_source = with_membership(posterior, block_source, data, classifiers, seed)
            yield from predict_chunks(posterior, data, block_source, **settings, **options)
            start += len(frame)

    return parts(), membership


def _pooled_evidence(
    posterior: Posterior, blocks: Iterable[ClusteredData], classifiers: Classifiers
) -> Evidence:
    """Evidence of the features of all rows of new clusters, without rows of unknown ones."""
    evidence: Evidence = {}
    for data in blocks:
        rows = data.take(~unknown_rows(posterior.model, data))
        if rows.n_rows:
            evidence = merge_evidence(evidence, gather_evidence(posterior, rows, classifiers))
    return evidence


def _encoder(
    posterior: Posterior,
    schema: Schema,
    table: TableBlocks,
    wanted: tuple[str, ...],
    absent: Collection[str],
    support: pd.DataFrame | None,
    report: Report,
) -> Callable[[pd.DataFrame], ClusteredData]:
    """The encoding of blocks: means of new clusters are over all rows of the support or the table.

    The features are read for it only if the program has means of clusters.
    """
    between = posterior.model.data_facts().between
    means = {} if between is None else between.means
    if support is not None and (means or schema.cluster_columns):
        known = encoded_support(posterior, support)
        schema = extended_by(schema, known)
        means = means if between is None else between.extended(known)

    def encode(frame: pd.DataFrame) -> ClusteredData:
        rows = ClusteredData.encode(with_new_column(frame, absent), schema)
        return replace(rows, cluster_means=means)

    sums: dict[str, ClusterSums] = {}
    if schema.cluster_columns:
        passed = _reported(table, EVIDENCE_ROWS, wanted, "means of clusters", report)
        for frame in filled(passed, schema.clusters):
            rows = schema.select(with_new_column(frame, absent))
            sums = added(sums, schema.cluster_sums(rows, schema.groupings(rows), sums))
        schema = schema.with_new_means(sums)
    sums = {}
    if means:
        passed = _reported(table, EVIDENCE_ROWS, wanted, "means of features", report)
        for frame in filled(passed, schema.clusters):
            data = encode(frame)
            parts = {f: feature_sums(data, f, m.columns, sums.get(f)) for f, m in means.items()}
            sums = added(sums, parts)
        means = {factor: m.extended(sums[factor]) for factor, m in means.items()}
    return encode


def _clusters(
    posterior: Posterior,
    schema: Schema,
    table: TableBlocks,
    absent: Collection[str],
    report: Report,
) -> dict[str, tuple[pd.Index, np.ndarray]]:
    """By factor, the labels of a table's clusters and whether training saw them.

    Only the cluster columns are read.
    """
    columns = {
        factor.name: [factor.name] if factor.name in schema.clusters else factor.name.split(":")
        for factor in posterior.model.clustered_factors
    }
    cells: dict[str, pd.DataFrame] = {}
    for frame in _reported(table, 2**18, schema.clusters, "listing clusters", report):
        for factor, names in columns.items():
            block = with_new_column(frame, absent)[names].dropna()
            distinct = [cells.get(factor), block.drop_duplicates()]
            cells[factor] = pd.concat(distinct).drop_duplicates()
    clusters = {}
    for factor, names in columns.items():
        groupings = [
            Grouping.from_labels(cells[factor][name], f"cluster column {name!r}") for name in names
        ]
        seen = posterior.model.data_facts().levels[factor]
        levels = reduce(Grouping.cross, groupings).levels
        places = match_labels(levels, seen, f"grouping factor {factor!r}")
        clusters[factor] = levels, places >= 0
    smooths = (factor.name for factor in posterior.model.factors if factor.smooth)
    return clusters | dict.fromkeys(smooths, (ALL_ROWS, np.array([True])))


def _reported(
    table: TableBlocks, size: int, columns: tuple[str, ...], name: str, report: Report
) -> Iterator[pd.DataFrame]:
    """The blocks of a pass, each reported once it was used."""
    done = 0
    for frame in table.blocks(size, columns):
        yield frame
        done += len(frame)
        report(name, done, table.n_rows)
