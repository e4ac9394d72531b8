"""Rows whose columns ``within(x | g)`` and ``between(x | g)`` are made anew, with other means."""

from __future__ import annotations

import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.schema import Schema

__all__ = ["encoded_by", "extended_by", "joined_tables", "with_joint_means", "with_own_means"]


def with_own_means(data: ClusteredData) -> ClusteredData:
    """The rows with the clusters' means of these rows alone, as a fit needs its training rows.

    Rows without such columns are returned as they are.
    """
    if data.table is None or data.schema is None:
        return data
    sums = data.schema.cluster_sums(data.table, data.groupings)
    return encoded_by(data, data.schema.with_means(sums))


def encoded_by(data: ClusteredData, schema: Schema | None) -> ClusteredData:
    """The rows with the clusters' means of another schema of the same features.

    A cluster without a mean there gets that of its rows here. Rows that were encoded by that
    schema, or by one that knows further clusters, are returned as they are.
    """
    if data.table is None or data.schema is None or schema is None:
        return data
    pairs = ((data.schema.means.get(factor), means) for factor, means in schema.means.items())
    if all(means is not None and means.extends(other) for means, other in pairs):
        return data
    return ClusteredData.encode(data.table, schema)


def extended_by(schema: Schema, data: ClusteredData) -> Schema:
    """The schema with the means of the new clusters of these rows."""
    if data.table is None or not data.n_rows:
        return schema
    return schema.with_new_means(schema.cluster_sums(data.table, data.groupings))


def joined_tables(first: ClusteredData, second: ClusteredData) -> pd.DataFrame | None:
    """The tables of both, one below the other; None without `ClusteredData.table`."""
    if first.table is None or second.table is None:
        return None
    return pd.concat([first.table, second.table])


def with_joint_means(data: ClusteredData, schema: Schema | None) -> ClusteredData:
    """Joined rows, each new cluster with the mean of all its rows; see `encoded_by`."""
    if data.table is None or schema is None:
        return data
    return ClusteredData.encode(data.table, schema)
