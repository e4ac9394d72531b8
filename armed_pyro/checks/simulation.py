"""One simulation of a calibration: draw from the prior, fit, and rank the truth."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from armed_pyro.checks import rank_tests
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.train import threads, train
from armed_pyro.inference.training_run import TrainingDiverged
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.linear_effects import with_linear_effects
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import factor_named
from armed_pyro.rows.censoring import EVENT, RIGHT
from armed_pyro.rows.source import RowSource

__all__ = [
    "Recovered",
    "Recovery",
    "check_censoring_is_known",
    "check_outcomes",
    "held",
    "observed_again",
    "quantities",
]

LARGEST_COUNT = 1e9


def held(model: MixedEffects, data: ClusteredData) -> MixedEffects:
    """The program bound to the data, with a frozen network and without adversaries.

    ValueError if model and data do not fit together, or nothing in the program is latent.
    """
    net = copy.deepcopy(model.network).requires_grad_(False)
    net.register_forward_pre_hook(_evaluate)
    plan = MixedEffects(
        net,
        model.terms,
        model.family,
        priors=model.priors,
        bayesian_head=model.bayesian_head,
        between=model.between,
        linear_effects=_linear_effects(model, data),
        parameters=model.predictors,
    )
    bound = plan.bind(data).cpu().eval()
    latent = {parameter.name for parameter in bound.family.parameters} - {*bound.known()}
    if not bound.factors and not bound.has_fixed_effects and not latent:
        raise ValueError(
            "the model has no latent site, so there is no posterior to calibrate: give it random "
            "effects, or latent fixed effects with bayesian_head=True"
        )
    return bound


def _evaluate(net: nn.Module, args: tuple[Any, ...]) -> None:
    """Put the frozen network in evaluation mode, because training puts it in training mode."""
    net.eval()


@dataclass(frozen=True, eq=False)
class Truth:
    """One draw of the whole program from its prior."""

    latents: Latents  # with known quantities, in the shapes of one draw of `Fit.draws`
    eta: Float[Tensor, "rows columns"]
    outcome: Float[Tensor, " rows"]  # on its original scale; NaN if the predictor is not finite


@dataclass(frozen=True)
class Recovered:
    """Ranks of one truth, by quantity; or the error of the fit, and no ranks."""

    ranks: Mapping[str, int]
    converged: bool
    error: str = ""


@dataclass(frozen=True, eq=False)
class Recovery:
    """Settings of the simulations; a simulation depends on these and on its number."""

    bound: MixedEffects  # as `held` returns it
    data: ClusteredData  # its outcome is replaced
    n_draws: int  # posterior draws of each fit
    schedule: Schedule
    refine: bool
    seed: int

    def truth(self, number: int) -> Truth:
        """The draw of the program with this number."""
        bound, rows = self.bound, self.bound.encode(self.data).all()
        with bound.seeded(self._seeds(number)[0]), pyro.validation_enabled(False):
            # The data's outcome is observed in this trace, which does not affect the prior draws.
            trace = prune_subsample_sites(poutine.trace(bound).get_trace(rows))
            nodes: Mapping[str, Any] = trace.nodes
            values = {name: nodes[name]["value"] for name in trace.stochastic_nodes}
            eta = nodes["_RETURN"]["value"].eta
            if torch.isfinite(eta).all():
                outcome = bound.density(eta, bound.known() | values, rows).sample()
            else:
                outcome = torch.full((len(rows),), torch.nan)
        effects = {factor.effect_site for factor in bound.factors}
        latents = {
            name: value[None] if name in effects else value[None, None]
            for name, value in values.items()
        }
        return Truth(bound.known() | latents, eta, outcome.to(torch.float64))

    @threads(1)  # rounding of sums depends on the number of threads
    def run(self, number: int) -> Recovered:
        """Fit the outcome drawn with this number, and rank the truth among posterior draws."""
        _, training, posterior, ties = self._seeds(number)
        truth = self.truth(number)
        data = observed_again(self.data, truth.outcome)
        bound = copy.deepcopy(self.bound)
        source = bound.encode(data)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(training)
                settings: dict[str, Any] = {"schedule": self.schedule, "refine": self.refine}
                fitted = train(bound, data, **settings, seed=training, progress=False)
                draws = fitted.draws(self.n_draws, seed=posterior)
        except (TrainingDiverged, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return Recovered({}, False, str(error))
        values = quantities(bound, source, draws)
        posterior_draws = np.stack([draw.cpu().numpy() for draw in values.values()], -1)
        if not np.isfinite(posterior_draws).all():
            wrong = [name for name, value in values.items() if not torch.isfinite(value).all()]
            return Recovered({}, False, f"posterior draws of {', '.join(wrong[:3])} are not finite")
        true = quantities(bound, source, truth.latents)
        target = np.stack([value.cpu().numpy() for value in true.values()], -1)
        ranks = rank_tests.rank(target, posterior_draws, np.random.default_rng(ties))
        return Recovered(dict(zip(values, ranks.tolist(), strict=True)), bool(fitted.converged))

    def _seeds(self, number: int) -> list[int]:
        """Seeds of the truth, the training, the posterior draws and the order of ties."""
        return np.random.SeedSequence([self.seed, number]).generate_state(4).tolist()


def quantities(
    model: MixedEffects, source: RowSource, latents: Latents
) -> dict[str, Float[Tensor, " draws"]]:
    """The quantities that are ranked, by name, in standardised units.

    These are every latent sd, correlation, parameter of the family and fixed effect; all random
    effects of the first, middle and last cluster of each factor; and the log-likelihood.
    """
    values: dict[str, Tensor] = {}
    known = model.known()
    for factor in model.factors:
        terms = factor.terms
        if factor.sd_site not in known:
            sd = latents[factor.sd_site].reshape(-1, len(factor.sd_names))
            places = enumerate(factor.sd_names)
            values |= {f"{factor.sd_site}[{name}]": sd[:, i] for i, name in places}
        values |= factor.correlations(latents)
        values |= {group.site(n): value for group, n, value in factor.quantities(latents)}
        effects, levels = latents[factor.effect_site], model.data_facts().levels[factor.name]
        for k in sorted({0, len(levels) // 2, len(levels) - 1}):
            values |= {
                f"{factor.effect_site}[{levels[k]},{term}]": effects[:, k, i]
                for i, term in enumerate(terms)
            }
    names = [parameter.name for parameter in model.family.parameters]
    values |= {name: latents[name].flatten() for name in names if name not in known}
    if model.has_fixed_effects:
        fixed = latents["fixed_effect"].reshape(-1, len(model.fixed_terms()))
        values |= {f"fixed_effect[{t}]": fixed[:, i] for i, t in enumerate(model.fixed_terms())}
    values["log_likelihood"] = _log_likelihood(model, source, latents)
    return values


def _log_likelihood(
    model: MixedEffects, source: RowSource, latents: Latents
) -> Float[Tensor, " draws"]:
    """Sum over all rows of log p(y_i | latent sites)."""
    n = max(len(value) for name, value in latents.items() if name not in model.known())
    total = torch.zeros(n, dtype=torch.float64)
    with torch.no_grad(), pyro.validation_enabled(False):
        for rows in source.chunks(max(1, BLOCK_VALUES // (n * values_per_row(model)))):
            total += model.log_likelihood(rows, latents).to(torch.float64).sum(-1)
    return total


def _linear_effects(model: MixedEffects, data: ClusteredData) -> bool:
    """Whether the program has linear effects; a frozen network would have none by default."""
    facts = Facts.of(data, model.family, model.factor_names())
    return bool(with_linear_effects(model, facts).linear_names)


def observed_again(data: ClusteredData, outcome: Float[Tensor, " rows"]) -> ClusteredData:
    """The rows with another outcome, censored as theirs is.

    A row whose outcome was censored is censored at the same value. One whose outcome was observed
    could be observed up to the largest outcome of the data.
    """
    if data.status is None or data.outcome is None:
        return replace(data, outcome=outcome)
    end = torch.where(data.status == RIGHT, data.outcome, data.outcome.max())
    status = torch.where(outcome <= end, EVENT, RIGHT).to(data.status)
    return replace(data, outcome=torch.minimum(outcome, end), status=status)


def check_censoring_is_known(data: ClusteredData) -> None:
    """Raise ValueError for outcomes that are censored by a rule that data do not tell."""
    if data.status is not None and bool((data.status > EVENT).any()):
        raise ValueError(
            "outcomes are censored from the left or in intervals: no outcomes can be drawn that "
            "are censored by the same rule; calibrate with exact outcomes: "
            "dataclasses.replace(data, status=None, upper=None)"
        )


@threads(1)
def check_outcomes(recovery: Recovery, simulations: int) -> None:
    """Draw every data set once, before the first is fitted.

    ValueError if outcomes are not finite, or are counts above 1e9; the message names the parameter
    whose prior is responsible most often.
    """
    limit = LARGEST_COUNT if recovery.bound.family.integer else sys.float_info.max
    blame: Counter[str] = Counter()
    for number in range(simulations):
        truth = recovery.truth(number)
        if float(_size(truth.outcome).max()) > limit:
            blame[_culprit(recovery, truth)] += 1
    if blame:
        raise ValueError(
            f"the prior draws outcomes that are not finite or above {LARGEST_COUNT:.0e} in "
            f"{blame.total()} of {simulations} simulations, mostly through "
            f"{blame.most_common(1)[0][0]}"
        )


def _size(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values.abs(), torch.inf)


def _culprit(recovery: Recovery, truth: Truth) -> str:
    """The largest part of the worst row's predictor, with advice."""
    model, latents = recovery.bound, truth.latents
    row = int(_size(truth.eta).amax(-1).argmax())
    source = model.encode(recovery.data)
    rows = source.batch(torch.tensor([row]), dense_up_to=len(source))
    fixed = {name: value for name, value in latents.items() if name == "fixed_effect"}
    with torch.no_grad():
        base = model.predictor(rows, fixed).eta
        parts = {"": base}
        for factor in model.factors:
            effects = fixed | {factor.effect_site: latents[factor.effect_site]}
            parts[factor.name] = model.predictor(rows, effects).eta - base
    worst = max(parts, key=lambda name: float(_size(parts[name]).max()))
    if worst:
        factor = factor_named(model.factors, worst)
        term = factor.terms[int(factor.sd(latents).flatten().argmax())]
        prior = factor.describe_priors()[f"{worst}_sd[{term}]"]
        return (
            f"{worst}_sd[{term}] ~ {prior}: give it a tighter prior, such as "
            f"Priors(sd={{{worst!r}: HalfNormal(0.5)}})"
        )
    if model.has_fixed_effects:
        return (
            f"fixed_effect ~ Normal(0, {model.priors.fixed_sd:.4g}): give it a tighter prior, such "
            "as Priors(fixed_sd=0.5), or look for a large offset"
        )
    return (
        "the output of the network, whose weights are fixed, or the offset: calibrate the program "
        "of a fit (fit.model), or look for a large offset"
    )
