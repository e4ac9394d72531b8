"""Random intercepts that depend on clusters' means: slopes within and between clusters differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.checks.check import Check
from armed_pyro.checks.findings import Kind
from armed_pyro.checks.quantile_residuals import QuantileResiduals
from armed_pyro.checks.score_tests import (
    Tested,
    curve,
    curve_basis,
    orthonormal,
    without_curve,
)
from armed_pyro.data.cluster_columns import is_call
from armed_pyro.data.grouping import Grouping
from armed_pyro.distributions.intercept_regression import InterceptRegression
from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.dependent import independent_columns
from armed_pyro.program.mundlak import BETWEEN, MOST_FEATURES, WITHIN, SlopesApart, slopes_apart
from armed_pyro.program.working import derivatives
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows

__all__ = ["cluster_mean_checks"]

KIND = Kind("cluster means", "sd of the trend, in sds of the random intercepts,", 0.3, 0.8)
OUTPUT = "the network's output"
FEWEST_CLUSTERS = 12  # for a trend of the random intercepts
NORMAL = 1.645  # of a 90% interval
# Features whose slopes are fitted anew beside the means; a fit per left-out cluster costs their
# number cubed.
MOST_REFITTED = 20

Draws = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Subject:
    """A regressor whose means by cluster are tested, and the intercepts that they may explain."""

    name: str  # as in the reason
    feature: str  # empty for the network's output
    factor: Factor
    column: int  # of the predictor
    means: Float[np.ndarray, " clusters"]
    basis: Float[np.ndarray, "clusters columns"]
    constant: bool  # within clusters


def cluster_mean_checks(
    posterior: Posterior, latents: Draws, residuals: QuantileResiduals
) -> Iterator[Check]:
    """Check that random intercepts do not depend on the clusters' means of features.

    In one posterior draw, the intercepts divided by their sd are independent standard normal if
    the program is right. A trend in the means of a feature that varies within clusters means that
    its slopes within and between clusters differ (Mundlak 1978); in one that does not, a curve. For
    networks the output is tested as the features are.
    """
    model = posterior.model
    if not any(map(_intercepts, model.factors)):
        return
    drawn = selected(latents, slice(residuals.eta.shape[1]))
    rows = _rows(posterior, residuals)
    fixed = _fixed_predictor(posterior, rows, drawn)
    tests, subjects = list[Tested](), dict[str, _Subject]()
    for factor in model.factors:
        for column, place in enumerate(_intercepts(factor)):
            v = _standardised(factor, drawn, place)
            if v is None or len(np.unique(residuals.codes[factor.name])) < FEWEST_CLUSTERS:
                continue
            v = v[residuals.clusters[factor.name]]
            found = list(_subjects(posterior, residuals, factor, column, fixed[:, column]))
            tests += _tests(found, v)
            subjects |= {subject.name: subject for subject in found}
    if not tests:
        return
    passed = "the random intercepts do not depend on the clusters' means of the features"
    found_text = "the random intercepts depend on the clusters' means of {}"
    check = KIND.judge(
        tests, passed, found_text, lambda test: _advice(residuals, subjects[test.subject])
    )
    worst = [subjects[test.subject] for test in KIND.misfits(tests)]
    apart = [subject for subject in worst if not subject.constant]
    if apart:
        working = _Working.of(posterior, rows, drawn, fixed, apart[0])
        text = working.consequences(residuals, apart)
        check = replace(check, reason=f"{check.reason}: {text}" if text else check.reason)
    yield check


def _intercepts(factor: Factor) -> list[int]:
    """Places of a factor's random intercepts, one for each column of the predictor."""
    return [t for t, term in enumerate(factor.terms) if term.startswith("Intercept")]


def _standardised(
    factor: Factor, drawn: Draws, place: int
) -> Float[np.ndarray, "clusters draws"] | None:
    """The intercepts of every draw, divided by their sd; None without draws."""
    effects = drawn[factor.effect_site]
    if effects.dim() < 3:
        return None
    sd = factor.scale_matrix(drawn)[..., place, : place + 1].square().sum(-1).sqrt()
    return np.asarray((effects[..., place] / sd).double().cpu().numpy().T)


def _tests(subjects: Sequence[_Subject], v: Float[np.ndarray, "clusters draws"]) -> list[Tested]:
    """The tests of one factor's intercepts.

    If slopes of some features differ within and between clusters, those of constant features are
    wrong, too, unless they are orthogonal. Of constant features only curves are then tested, beside
    all trends.
    """
    tests = [curve(s.name, v, s.basis) for s in subjects if not s.constant]
    misfits = [test.subject for test in KIND.misfits(tests)]
    constant = [subject for subject in subjects if subject.constant]
    if not misfits:
        return [*tests, *(curve(s.name, v, s.basis) for s in constant)]
    trends = [s.basis for s in subjects if s.name in misfits]
    trends += [(s.means - s.means.mean())[:, None] for s in constant]
    known = np.hstack(trends)
    left = without_curve(v, known)
    left = left / np.sqrt((left**2).mean(0))
    for subject in constant:
        basis = orthonormal(without_curve(subject.basis, known))
        if basis.shape[1]:
            tests.append(curve(subject.name, left, basis))
    return tests


def _subjects(
    posterior: Posterior,
    residuals: QuantileResiduals,
    factor: Factor,
    column: int,
    fixed: Float[np.ndarray, " rows"],
) -> Iterator[_Subject]:
    """The features, and a network's output, whose means differ between the clusters."""
    facts, codes = posterior.model.data_facts(), residuals.codes[factor.name]
    sizes = np.bincount(codes)
    places = range(min(len(residuals.names), MOST_FEATURES))
    regressors = [(residuals.names[place], residuals.features[:, place]) for place in places]
    has_means = facts.between is not None and factor.name in facts.between.means
    if not posterior.model.linear and not has_means:
        regressors.append(("", fixed))
    label = facts.outcome_columns[column]
    for feature, x in regressors:
        means = np.bincount(codes, x) / sizes
        if not means.var() >= BETWEEN * x.var() or not x.var() > 0:
            continue
        basis = curve_basis(means)[:, : 2 if len(sizes) < 100 else 3]
        where = f"in {factor.name}, class {label}" if label else f"in {factor.name}"
        constant = bool((x - means[codes]).var() < WITHIN * x.var())
        name = f"{feature or OUTPUT} ({where})"
        yield _Subject(name, feature, factor, column, means, basis, constant)


def _advice(residuals: QuantileResiduals, subject: _Subject) -> str:
    if subject.constant:
        return f"add I({subject.feature}**2) or a spline of {subject.feature}"
    option = "between=True (command line: --between yes)"
    if not subject.feature:
        if residuals.names:
            return f"take {option}"
        return "take fixed_weight=1, so that the network alone predicts the outcome"
    source = residuals.sources[residuals.names.index(subject.feature)]
    if ":" in source or is_call(source):
        return f"take {option}"
    return f"write between({source} | {subject.factor.name}) beside {source}, or take {option}"


def _slopes(name: str, factor: str, apart: SlopesApart, place: int) -> str:
    """Slopes within and between clusters with 90% intervals, in words."""

    def slope(estimate: float, error: float) -> str:
        low, high = estimate - NORMAL * error, estimate + NORMAL * error
        return f"{estimate:.3g} [{low:.3g}, {high:.3g}]"

    within = slope(apart.within[place], apart.within_se[place])
    between = slope(apart.between[place], apart.between_se[place])
    return f"the slope of {name} is {within} within clusters of {factor} and {between} between them"


# --- what it does to predictions --------------------------------------------------------------


def _rows(posterior: Posterior, residuals: QuantileResiduals) -> Rows:
    source = posterior.model.encode(posterior.data)
    return source.dense_batch(torch.from_numpy(residuals.index).to(source.like.device))


@torch.no_grad()
def _fixed_predictor(
    posterior: Posterior, rows: Rows, drawn: Draws
) -> Float[np.ndarray, "rows columns"]:
    """Posterior mean of the predictor without random effects and offset."""
    model = posterior.model
    latents = {name: value for name, value in drawn.items() if name == "fixed_effect"}
    eta = model.predictor(replace(rows, offset=None), latents).eta
    return np.asarray(eta.reshape(-1, *eta.shape[-2:]).mean(0).double().cpu().numpy())


@dataclass(frozen=True, eq=False)
class _Working:
    """Working response of one column without the effects of other terms, and its precision."""

    posterior: Posterior
    rows: Rows
    fixed: Float[np.ndarray, " rows"]
    z: Float[np.ndarray, " rows"]
    weight: Float[np.ndarray, " rows"]
    parameters: Draws  # means of the family's parameters

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        rows: Rows,
        drawn: Draws,
        fixed: Float[np.ndarray, "rows columns"],
        subject: _Subject,
    ) -> _Working:
        """The response at the posterior: fixed part, intercepts, and residuals r / W."""
        model, column, factor = posterior.model, subject.column, subject.factor
        with torch.no_grad():
            eta = model.predictor(rows, drawn, return_fixed=False).eta
            eta = eta.reshape(-1, *eta.shape[-2:])
            slope, curvature = derivatives(model, eta, drawn, rows)
            weight = curvature[..., column].mean(0)
            weight = weight.clamp(min=1e-3 * float(weight.mean()))
            residual = slope[..., column].mean(0) / weight
            effects = drawn[factor.effect_site][..., _intercepts(factor)[column]].mean(0)
            own = model.data_facts().spread * effects[rows.memberships[factor.name].clusters()]
        z = fixed[:, column] + (own + residual).double().cpu().numpy()
        parameters = {name: value.mean() for name, value in model.family_parameters(drawn).items()}
        weights = weight.double().cpu().numpy()
        return cls(posterior, rows, fixed[:, column], z, weights, parameters)

    def consequences(self, residuals: QuantileResiduals, subjects: Sequence[_Subject]) -> str:
        """Slopes within and between, and the error of predictions of new clusters, in words."""
        factor = subjects[0].factor.name
        codes = residuals.codes[factor]
        grouping = Grouping(torch.from_numpy(codes), pd.RangeIndex(int(codes.max()) + 1))
        features = [s.feature for s in subjects if s.feature and s.factor.name == factor]
        names = residuals.names[:MOST_FEATURES]
        x = residuals.features[:, : len(names)]
        apart = slopes_apart(self.z, x, names, grouping, self.weight) if names else None
        parts, means = list[str](), np.zeros((len(codes), 0))
        if apart is not None:
            for name in features[:3]:
                if name in apart.names:
                    parts.append(_slopes(name, factor, apart, apart.names.index(name)))
            chosen = [apart.names.index(name) for name in features if name in apart.names]
            means = apart.means[:, chosen]
        if not parts:
            output = self.fixed[:, None]
            apart = slopes_apart(self.z, output, (OUTPUT,), grouping, self.weight)
            if apart is None:
                return ""
            parts, means = [_slopes(OUTPUT, factor, apart, 0)], apart.means
        errors = self._errors(codes, x, means, residuals.outcome)
        if errors is not None:
            parts.append(
                f"predictions of new clusters of {factor} have an RMSE of about {errors[0]:.3g}, "
                f"with the clusters' means {errors[1]:.3g}"
            )
        return "; ".join(parts)

    @torch.no_grad()
    def _errors(
        self,
        codes: np.ndarray,
        x: Float[np.ndarray, "rows features"],
        means: Float[np.ndarray, "rows columns"],
        outcome: Float[np.ndarray, " rows"],
    ) -> tuple[float, float] | None:
        """RMSE of clusters predicted from the others, without and with means; None for classes.

        None also where parameters have predictors, as they would have to be refitted.
        """
        model = self.posterior.model
        if model.family.has_class_probabilities or model.family.predicted:
            return None
        # The slopes of other features may change, too, beside means.
        base = np.column_stack([np.ones(len(codes)), self.fixed])
        whole = np.column_stack([base, means, x[:, :MOST_REFITTED]])
        errors = list[float]()
        for columns in (base, whole):
            scaled = columns.copy()
            scaled[:, 1:] -= columns[:, 1:].mean(0)
            spread = scaled.std(0)
            scaled[:, 1:] /= np.where(spread > 0, spread, 1)[1:]
            scaled = scaled[:, independent_columns(scaled)]
            fitted = InterceptRegression.of(self.z, scaled, codes, self.weight)
            eta = torch.from_numpy(fitted.left_out()).to(model.reference())[:, None]
            if self.rows.offset is not None:
                eta = eta + self.rows.offset[:, None]
            expected = (
                model.family.expected(eta, self.parameters, self.rows)
                .double()
                .cpu()
                .numpy()
                .reshape(-1)
            )
            errors.append(float(np.sqrt(np.mean((expected - outcome) ** 2))))
        return errors[0], errors[1]
