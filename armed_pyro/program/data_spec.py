"""`Facts`: sizes, names, scales and cluster labels of the data that a program is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.feature_scaling import (
    FeatureScaling,
    ImageScaling,
    image_moments,
    intercept_columns,
)
from armed_pyro.data.grouping import index_from_json, index_to_json
from armed_pyro.data.label_matching import match_labels
from armed_pyro.data.own_means import encoded_by
from armed_pyro.data.schema import Schema, WeightsKind
from armed_pyro.families.family import Family
from armed_pyro.program.between import Between
from armed_pyro.program.row_roles import check_offset, check_weights
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.censoring import Censoring
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.inputs import InputSpec, Structure, mapped
from armed_pyro.streaming.encoded_table import EncodedTable

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """Sizes, names, scales and labels of the training data.

    A feature enters the network as ``(x - feature_mean) / feature_scale``; the linear predictor
    is ``center + spread * (f + phi' u)`` with f and u in standardised units.
    """

    n_rows: int
    feature_names: tuple[str, ...]
    sources: tuple[str, ...]  # the data's columns that the features were made of
    feature_shape: tuple[int, ...]  # of one row
    feature_mean: tuple[float, ...]  # empty unless the features are a table's
    feature_scale: tuple[float, ...]
    outcome_name: str
    classes: tuple[Any, ...] | None
    columns: tuple[str, ...]  # of the predictor; one empty name unless the outcome has classes
    center: tuple[float, ...]  # of each column
    spread: float  # outcome units per standardised unit
    levels: Mapping[str, pd.Index]  # labels of the clusters seen in training, by factor
    counts: Mapping[str, Int[Tensor, " clusters"]]  # training rows in each cluster
    schema: Schema | None  # by which new tables are encoded
    feature_spread: float = 1.0  # sd of all values of the features that enter the network
    # Fits saved before there were the next fields lack them.
    intercept: bool = True  # whether the fixed effects have one
    intercept_columns: tuple[int, ...] = ()  # features that sum to 1 in its place
    dropped: tuple[str, ...] = ()  # features that depend on earlier ones; no fixed effects
    slope_names: tuple[str, ...] = ()  # columns that only random slopes use, with their
    slope_sources: tuple[str, ...] = ()  # table columns and scales
    slope_mean: tuple[float, ...] = ()
    slope_scale: tuple[float, ...] = ()
    # By categorical column, the indicators of all its levels, for (0 + f | g). Empty in a fit that
    # was saved when that term had no indicator of the first level.
    indicators: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights_kind: WeightsKind | None = None  # None without weights
    weights_sum: float = 0.0
    feature_average: tuple[float, ...] = ()  # as of `FeatureScaling.average`
    between: Between | None = (
        None  # clusters' means of features; None where they were not asked for
    )
    linear_names: tuple[str, ...] = ()  # features with latent linear effects beside a network
    # Structure of the network's inputs where they are no table and no single array.
    inputs: InputSpec | None = None
    image_mean: tuple[float, ...] = ()  # of images, by channel; empty if they are not scaled
    image_scale: tuple[float, ...] = ()

    @classmethod
    def of(cls, data: ClusteredData, family: Family, factors: Iterable[str]) -> Facts:
        """Facts of the training data, after `ClusteredData.check_training` and `Family.check`."""
        data.check_training()
        family.check(data)
        check_weights(data, family)
        check_offset(data, family)
        scaling, extra = FeatureScaling.of(data), FeatureScaling.of_slopes(data)
        images = ImageScaling.of(data.features)
        center, spread = family.center(data), family.spread(data)
        ones = () if data.intercept else intercept_columns(data)
        if not data.intercept and not ones:
            # The fixed effects alone must reach the mean outcome. The scale of the features grows
            # the prior of their coefficients accordingly.
            far = float((1 + (center / spread).square().max()).sqrt())
            scaling = replace(scaling, scale=tuple(scale / far for scale in scaling.scale))
            center = torch.zeros_like(center)
        groupings = {factor: data.grouping(factor) for factor in factors}
        return cls(
            n_rows=data.n_rows,
            feature_names=data.feature_names,
            sources=data.sources,
            feature_shape=tuple(data.features.shape[1:]),
            feature_mean=scaling.mean,
            feature_scale=scaling.scale,
            outcome_name=data.outcome_name,
            classes=data.classes,
            columns=family.columns(data),
            center=tuple(center.tolist()),
            spread=spread,
            levels={factor: grouping.levels for factor, grouping in groupings.items()},
            counts={factor: grouping.counts for factor, grouping in groupings.items()},
            schema=data.schema,
            # Features of a table are standardised.
            feature_spread=1.0 if scaling.mean or images.mean else _spread(data.features),
            intercept=data.intercept,
            intercept_columns=ones,
            slope_names=extra.names,
            slope_sources=extra.sources,
            slope_mean=extra.mean,
            slope_scale=extra.scale,
            indicators=indicators_of(data.schema),
            weights_kind=None if data.weights is None else data.weights_kind,
            weights_sum=0.0 if data.weights is None else float(data.weights.sum()),
            feature_average=scaling.average,
            inputs=None if data.inputs is None else data.inputs.spec,
            image_mean=images.mean,
            image_scale=images.scale,
        )

    def example(
        self, rows: int, like: Tensor, fill: Callable[[tuple[int, ...]], Tensor] = torch.zeros
    ) -> Structure:
        """Inputs of a network for this number of rows, filled; whole numbers are 1."""
        if self.inputs is not None:
            return mapped(lambda t: t.to(like.device), self.inputs.example(rows, fill))
        return fill((rows, *self.feature_shape)).to(like)

    @classmethod
    def of_encoded(cls, table: EncodedTable, family: Family) -> Facts:
        """Facts of a table's rows in a file, after the same checks."""
        first = table.scanned.first
        return replace(
            cls.of(table.outcomes(), family, ()),
            feature_names=first.feature_names,
            sources=first.sources,
            feature_shape=(first.n_features,),
            feature_mean=tuple(table.feature_mean.tolist()),
            feature_scale=tuple(table.feature_scale.tolist()),
            feature_average=tuple(table.feature_average.tolist()),
            levels={name: table.scanned.levels[name] for name in table.factors},
            counts={name: table.scanned.counts[name] for name in table.factors},
        )

    @property
    def scaling(self) -> FeatureScaling:
        """Names, means and scales of the features."""
        names, mean, scale = self.feature_names, self.feature_mean, self.feature_scale
        return FeatureScaling(names, self.sources, mean, scale, average=self.feature_average)

    @property
    def slope_scaling(self) -> FeatureScaling:
        """Names, means and scales of the columns that only random slopes use."""
        columns = (self.slope_names, self.slope_sources, self.slope_mean, self.slope_scale)
        return FeatureScaling(*columns, average=self.slope_mean)

    @property
    def design_scaling(self) -> FeatureScaling:
        """The columns of `Rows.slope_inputs`: features, then those that only slopes use."""
        return self.scaling.joined(self.slope_scaling, self.indicators)

    @property
    def kept(self) -> list[int]:
        """Positions of the features with linear fixed effects: those not `dropped`."""
        return [i for i, name in enumerate(self.feature_names) if name not in self.dropped]

    def encode(
        self,
        data: ClusteredData,
        like: Tensor,
        levels: Mapping[str, pd.Index] | None = None,
        *,
        image_dtype: torch.dtype | None = None,
    ) -> HeldRows:
        """Rows as tensors with the precision and device of `like`.

        Features that are no table's, and so are not standardised, get the precision `image_dtype`.
        Codes refer to `levels`, by default the cluster labels seen in training. A `ValueError` is
        raised if features are missing, or clusters are not among `levels`.
        """
        levels = self.levels if levels is None else levels
        data = encoded_by(data, self.schema)
        if data.feature_names != self.feature_names:
            missing = [name for name in self.feature_names if name not in data.feature_names]
            raise ValueError(
                f"the data have the features {list(data.feature_names)}, but the model was fitted "
                f"to {list(self.feature_names)} (missing: {missing or 'none'}); encode new "
                "tables with the training data's schema: ClusteredData.encode(table, data.schema)"
            )
        codes, counts = {}, {}
        for factor, index in levels.items():
            grouping = data.grouping(factor)
            places = match_labels(grouping.levels, index, f"grouping factor {factor!r}")
            if (places < 0).any():
                label = listing(grouping.levels[places < 0][:1])
                raise ValueError(f"cluster {label} of {factor!r} was not seen in training")
            codes[factor] = torch.as_tensor(places)[grouping.codes].to(like.device, torch.long)
            counts[factor] = torch.bincount(codes[factor], minlength=len(index))

        optional = (data.outcome, data.trials, data.offset, data.weights)
        if self.weights_kind == "se" and data.outcome is not None and data.weights is None:
            raise ValueError(
                "the rows have outcomes, but not the standard errors that the model needs: add "
                "their column, or leave the outcome out"
            )
        y, trials, offset, weights = (v if v is None else v.to(like) for v in optional)
        dtype = like.dtype if self.feature_mean or image_dtype is None else image_dtype
        x = ImageScaling(self.image_mean, self.image_scale).standardise(data.features)
        x = self.scaling.standardise(x).to(like.device, dtype)
        slopes = None
        if self.slope_names:
            if data.slopes is None or data.slope_names != self.slope_names:
                raise ValueError(
                    f"the data lack the columns of random slopes {listing(self.slope_names)}: "
                    "encode new tables with the training data's schema"
                )
            slopes = self.slope_scaling.standardise(data.slopes).to(like)
        between = self.between
        means = between.columns(data).to(like) if between and between.names else None
        fold = None if data.fold is None else data.fold.to(like.device)
        parts = (x, y, codes, counts, trials, offset, weights)
        if self.inputs is not None and data.inputs is None:
            raise ValueError(
                "the rows lack the network's inputs, which the fit read from a dataset: pass "
                "ClusteredData.from_dataset(...), and Fit.load(folder, net, data=...) for the "
                "training rows of a loaded fit"
            )
        known = Censoring.columns(data.outcome, data.status, data.upper, data.entry)
        held = HeldRows(*parts, slopes=slopes, means=means, fold=fold, inputs=data.inputs)
        return held if known is None else replace(held, censoring=known.to(like))

    @property
    def between_names(self) -> tuple[str, ...]:
        """Names of the clusters' means that are fixed effects beside the network."""
        return () if self.between is None else self.between.names

    def levels_with(self, data: ClusteredData) -> dict[str, pd.Index]:
        """Labels of the clusters seen in training, followed by new ones in these data."""
        extended = {}
        for factor, seen in self.levels.items():
            present = data.grouping(factor).levels
            places = match_labels(present, seen, f"grouping factor {factor!r}")
            extended[factor] = seen.append(present[places < 0])
        return extended

    def clusters(self, like: Tensor) -> Rows:
        """No rows, but every cluster of every factor, in the precision and device of `like`."""
        none = torch.zeros(0, dtype=torch.long, device=like.device)
        memberships = {
            name: Membership(torch.arange(len(levels), device=like.device), none)
            for name, levels in self.levels.items()
        }
        slopes, x = self._zero_slopes(0, like), like.new_zeros(0, *self.feature_shape)
        return Rows(x, None, memberships, slopes=slopes, means=self.zero_means(0, like))

    def one_row(self, like: Tensor) -> Rows:
        """A row of zeros without an outcome, in the first cluster of every factor."""
        first = torch.zeros(1, dtype=torch.long, device=like.device)
        memberships = {name: Membership(first, first) for name in self.levels}
        x = like.new_zeros(1, *self.feature_shape)
        slopes = self._zero_slopes(1, like)
        means, trials = self.zero_means(1, like), like.new_ones(1)
        inputs = None if self.inputs is None else self.example(1, like)
        rows = Rows(x, None, memberships, trials=trials, slopes=slopes, means=means)
        return replace(rows, inputs=inputs)

    def zero_means(self, rows: int, like: Tensor) -> Tensor | None:
        """`Rows.means` of rows in clusters with average means; None without such columns."""
        return like.new_zeros(rows, len(self.between_names)) if self.between_names else None

    def _zero_slopes(self, rows: int, like: Tensor) -> Tensor | None:
        return like.new_zeros(rows, len(self.slope_names)) if self.slope_names else None

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values, by name of the field."""
        tuples = {name: list(value) for name, value in vars(self).items() if type(value) is tuple}
        encoded = {
            "classes": None if self.classes is None else index_to_json(pd.Index(self.classes)),
            "levels": {factor: index_to_json(levels) for factor, levels in self.levels.items()},
            "counts": {factor: counts.tolist() for factor, counts in self.counts.items()},
            "schema": None if self.schema is None else self.schema.to_json(),
            "between": None if self.between is None else self.between.to_json(),
            "inputs": None if self.inputs is None else self.inputs.content,
        }
        return {**vars(self), **tuples, **encoded}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """The facts that `to_json` wrote."""
        classes, schema = values["classes"], values["schema"]
        tuples: dict[str, Any] = {k: tuple(v) for k, v in values.items() if type(v) is list}
        indicators, between = values.get("indicators", {}), values.get("between")
        inputs = values.get("inputs")
        tuples["indicators"] = {name: tuple(labels) for name, labels in indicators.items()}
        decoded: dict[str, Any] = {
            "classes": None if classes is None else tuple(index_from_json(classes)),
            "levels": {name: index_from_json(index) for name, index in values["levels"].items()},
            "counts": {name: torch.tensor(counts) for name, counts in values["counts"].items()},
            "schema": None if schema is None else Schema.from_json(schema),
            "between": None if between is None else Between.from_json(between),
            "inputs": None if inputs is None else InputSpec(inputs),
        }
        return cls(**{**values, **tuples, **decoded})


def indicators_of(schema: Schema | None) -> dict[str, tuple[str, ...]]:
    """By categorical column of a table, the names of the indicators of all its levels."""
    return {} if schema is None else {name: schema.indicators_of(name) for name in schema.levels}


def _spread(features: Tensor) -> float:
    """sd of all values; 1 if there are fewer than two, or if all are the same."""
    if features.numel() < 2:
        return 1.0
    if features.dim() < 3:
        return float(features.double().std()) or 1.0
    mean, variance = image_moments(features)
    n = features.numel()
    total = float(variance.mean() + mean.var(unbiased=False)) * n / (n - 1)
    return total**0.5 or 1.0
