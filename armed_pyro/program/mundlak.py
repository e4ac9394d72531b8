r"""Mundlak's test: whether slopes within and between the clusters of a factor differ.

.. math:: z_i = x_i^\top \beta + m_{g(i)}^\top \gamma + u_{g(i)} + e_i

with z the working response (the outcome, for gaussian outcomes) and m the shrunk means of the
features that vary within and between clusters. The slope within clusters is :math:`\beta_j`, that
between them :math:`\beta_j + \gamma_j`. A random intercept alone assumes :math:`\gamma = 0`; the
effect of the contrary is the sd of :math:`m^\top \gamma` over the clusters, as a share of the sd of
the intercepts without m.

References
----------
Mundlak (1978), Econometrica 46(1). Bell, Fairbrother and Jones (2019), Quality & Quantity 53.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from armed_pyro.data.cluster_means import ClusterMeans, ClusterSums
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping
from armed_pyro.distributions.intercept_regression import InterceptRegression
from armed_pyro.program.between import Between, feature_sums
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.dependent import independent_columns
from armed_pyro.program.plan import Plan
from armed_pyro.program.working import derivatives
from armed_pyro.random_effects.terms import RandomEffects

__all__ = ["BETWEEN", "MOST_FEATURES", "WITHIN", "SlopesApart", "slopes_apart", "with_between"]

# "auto" adds means if the test is significant at this level and the trend has this share of the sd
# of the intercepts. `analysis/validation/within_between.py` measures how often it does.
LEVEL, SHARE = 1e-3, 0.3
# Features whose slopes are said to differ, by Holm's p-value.
NAMED = 0.05
# Beyond this number of features the first ones are tested.
MOST_FEATURES = 100
FEWEST_CLUSTERS = 12
# Larger data are tested in whole clusters of about this number of rows, if these are at least
# FEWEST_WHOLE, and in rows at random otherwise.
MOST_ROWS, FEWEST_WHOLE = 20_000, 200
# Shares of a feature's variance within and between clusters below which it does not vary there.
WITHIN, BETWEEN = 1e-6, 1e-3


@dataclass(frozen=True, eq=False)
class SlopesApart:
    """Slopes of features within and between clusters, in the units of response and features."""

    names: tuple[str, ...]
    within: Float[np.ndarray, " features"]
    between: Float[np.ndarray, " features"]
    within_se: Float[np.ndarray, " features"]
    between_se: Float[np.ndarray, " features"]
    p: Float[np.ndarray, " features"]  # of equal slopes, by feature
    joint_p: float
    effect: float  # sd of m'gamma, as a share of the sd of the intercepts without m
    means: Float[np.ndarray, "rows features"]

    @property
    def differing(self) -> tuple[str, ...]:
        """Features whose slopes differ by Holm's test, smallest p-value first; all if none does."""
        order = np.argsort(self.p)
        held = np.maximum.accumulate(self.p[order] * np.arange(len(order), 0, -1))
        chosen = [self.names[place] for place in order[held <= NAMED]]
        return tuple(chosen) or self.names


def varying(sums: ClusterSums) -> list[int]:
    """Positions of the columns that vary within and between clusters."""
    within, between = sums.moments()
    total = within + between
    kept = (within > WITHIN * total) & (between > BETWEEN * total)
    return [int(place) for place in np.flatnonzero(kept)]


def slopes_apart(
    z: Float[np.ndarray, " rows"],
    x: Float[np.ndarray, "rows features"],
    names: tuple[str, ...],
    grouping: Grouping,
    weight: Float[np.ndarray, " rows"] | None = None,
) -> SlopesApart | None:
    """The slopes of the features that vary within and between clusters; None if none does.

    `names` are those of the columns of x, and `weight` divides the residual variance. None is
    returned as well if there are too few clusters for the number of features.
    """
    sums = ClusterSums.of(x, grouping)
    places = varying(sums)
    codes, clusters = grouping.codes.numpy(), grouping.n_clusters
    if not places or clusters < FEWEST_CLUSTERS:
        return None
    of_places = replace(
        sums, total=sums.total[:, places], square=sums.square[:, places], origin=sums.origin[places]
    )
    chosen = tuple(names[place] for place in places)
    m = ClusterMeans.of(chosen, of_places).means[codes]
    ones = np.ones((len(z), 1))
    # Means last, so that it is these that linearly dependent columns lose; x of the tested first.
    others = [place for place in range(x.shape[1]) if place not in places]
    spread = x.std(0)
    scaled = np.where(spread > 0, spread, 1.0)
    design = np.column_stack([ones, x[:, places], x[:, others], m])
    design[:, 1:] -= design[:, 1:].mean(0)
    unit = np.concatenate([[1.0], scaled[places], scaled[others], scaled[places]])
    kept = independent_columns(design / unit)
    first = 1 + x.shape[1]
    tested = [k for k in range(len(places)) if first + k in kept and 1 + k in kept]
    freedom = clusters - 1 - len(others) - len(places)
    if not tested or freedom < 3:
        return None
    fitted = InterceptRegression.of(z, (design / unit)[:, kept], codes, weight)
    gamma = np.array([kept.index(first + k) for k in tested])
    beta = np.array([kept.index(1 + k) for k in tested])
    scale = scaled[places][tested]
    trend = fitted.x[:, gamma] @ fitted.estimate[gamma]
    covariance = fitted.covariance
    cross = covariance[beta, gamma]
    variance = np.diag(covariance)
    within, gap = fitted.estimate[beta], fitted.estimate[gamma]
    whole = variance[beta] + variance[gamma] + 2 * cross
    return SlopesApart(
        names=tuple(chosen[k] for k in tested),
        within=within / scale,
        between=(within + gap) / scale,
        within_se=np.sqrt(variance[beta]) / scale,
        between_se=np.sqrt(np.maximum(whole, 0)) / scale,
        p=np.array([fitted.wald(np.array([place]), freedom) for place in gamma]),
        joint_p=fitted.wald(gamma, freedom),
        effect=float(trend.std() / np.sqrt(trend.var() + fitted.intercept_sd**2 + 1e-300)),
        means=m[:, tested],
    )


Sums = Callable[[str, tuple[str, ...]], ClusterSums]


def with_between(model: Plan, data: ClusteredData, sums: Sums | None = None) -> Facts:
    """The facts of a model that is bound to them, with the clusters' means that it asks for.

    `data` are the training rows, or a sample of whole clusters; `sums` gives sums of features by
    cluster over all training rows.

    Raises
    ------
    ValueError
        If means are asked for and there are no features, or no random intercept.
    """
    facts, choice = model.data_facts(), model.between
    if choice is None:
        choice = False if model.linear else "auto"
    factors = dict.fromkeys(
        term.factor
        for term in model.outcome_terms
        if isinstance(term, RandomEffects) and term.intercept
    )
    if choice is True and not (facts.feature_names and factors):
        lacking = "random intercept" if facts.feature_names else "feature with a name"
        raise ValueError(
            "between=True (command line: --between yes) adds features' means in the clusters of a "
            f"random intercept, but there is no {lacking}: leave it out"
        )
    if choice is False or not (facts.feature_names and factors):
        return facts
    sums = sums or (lambda factor, names: feature_sums(data, factor, names))
    chosen, notes = dict[str, tuple[str, ...]](), list[str]()
    for factor in factors:
        names = facts.feature_names[:MOST_FEATURES]
        names = tuple(names[place] for place in varying(feature_sums(data, factor, names)))
        if choice == "auto":
            names, note = _tested(model, data, factor, names)
            notes.append(note)
        if names:
            chosen[factor] = names
    if choice is True:
        listed = [f"{len(names)} of {factor}" for factor, names in chosen.items()]
        notes = [f"means of features: {', '.join(listed)}"]
        if not chosen:
            notes = ["no feature varies within and between clusters"]
    totals = {factor: sums(factor, names) for factor, names in chosen.items()}
    return replace(facts, between=Between.of(totals, chosen, "; ".join(notes)))


def _tested(
    model: Plan, data: ClusteredData, factor: str, names: tuple[str, ...]
) -> tuple[tuple[str, ...], str]:
    """The features whose means "auto" adds, and why."""
    data = _sampled(data, factor)
    z, weight = working_response(model, data)
    places = [data.feature_names.index(name) for name in data.feature_names[:MOST_FEATURES]]
    x, grouping = data.features[:, places].double().numpy(), data.grouping(factor)
    found = [
        result
        for column in range(z.shape[1])
        if names
        and (
            result := slopes_apart(z[:, column], x, data.feature_names, grouping, weight[:, column])
        )
    ]
    if not found:
        return (), f"off for {factor}: there is nothing to test, or there are too few clusters"
    # One test per column of the predictor.
    worst = min(found, key=lambda result: result.joint_p)
    p = min(1.0, worst.joint_p * len(found))
    figures = (
        f"trend of the clusters' means {worst.effect:.2f} of the sd of the intercepts, p = {p:.1g}"
    )
    if p > LEVEL or worst.effect < SHARE:
        return (), f"off for {factor}: {figures}"
    differing = worst.differing
    listed = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
    return differing, f"on for {factor}: slopes of {listed} differ within and between ({figures})"


def _sampled(data: ClusteredData, factor: str) -> ClusteredData:
    """At most about `MOST_ROWS` rows."""
    if data.n_rows <= MOST_ROWS:
        return data
    grouping, rng = data.grouping(factor), np.random.default_rng(0)
    order = rng.permutation(grouping.n_clusters)
    n = int(np.searchsorted(np.cumsum(grouping.counts.numpy()[order]), MOST_ROWS, "right"))
    if n >= FEWEST_WHOLE:
        return data.take(np.isin(grouping.codes.numpy(), order[:n]))
    return data.take(np.sort(rng.permutation(data.n_rows)[:MOST_ROWS]))


@torch.no_grad()
def working_response(
    model: Plan, data: ClusteredData
) -> tuple[Float[np.ndarray, "rows columns"], Float[np.ndarray, "rows columns"]]:
    """z and the precision of each row, linearised at the mean outcome; the offset is taken off.

    z is the outcome for gaussian outcomes.
    """
    facts, like = model.data_facts(), model.reference()
    rows = facts.encode(data, like).all()
    center = like.new_tensor(facts.center).expand(len(rows), -1)
    eta = center if rows.offset is None else center + rows.offset[:, None]
    latents = {
        parameter.name: torch.full((1, 1), float(parameter.start)).to(like)
        for parameter in model.family.parameters
    }
    slope, curvature = derivatives(model, eta, latents, rows)
    weight = curvature.clamp(min=1e-3 * float(curvature.clamp(min=0).mean()) + 1e-300)
    frequencies = model.frequencies(rows)
    z = center + slope / weight
    outcome = len(facts.outcome_columns)
    z, weight = z[:, :outcome], weight[:, :outcome]
    if frequencies is not None:
        weight = weight * frequencies[:, None].clamp(min=1e-9)
    return z.double().cpu().numpy(), weight.double().cpu().numpy()
