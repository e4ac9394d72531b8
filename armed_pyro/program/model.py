"""`MixedEffects`: network, random effects, family and adversaries as one Pyro model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar, cast

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor, nn

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.families.distributional import family_with_predictors
from armed_pyro.families.family import Family
from armed_pyro.networks.modes import frozen_parts
from armed_pyro.priors import Known
from armed_pyro.program import binding, dependent, fixed_prior, names
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.linear_effects import with_linear_effects
from armed_pyro.program.mundlak import with_between
from armed_pyro.program.network_checks import check_network
from armed_pyro.program.parameter_predictors import check_parameters, with_parameter_centers
from armed_pyro.program.plan import Plan
from armed_pyro.program.predictor import (
    Predictor,
    linear_predictor,
    modulated_runs,
    modulates,
    reaches_predictor,
)
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.design import Block
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource

__all__ = ["MixedEffects", "can_overfit", "counted", "log_likelihoods", "trains_network"]

Source = TypeVar("Source", bound=RowSource)


class MixedEffects(Plan):
    r"""Mixed-effects network as a probabilistic program.

    .. math::
        u_{mk} &\sim N(0, diag(sd_m) R_m diag(sd_m)) \\
        \eta_i &= c + s \, [f(x_i) + \sum_m \phi_m(x_i, h_i)^\top u_{m, g_m(i)}] + offset_i \\
        y_i &\sim Family(\eta_i, parameters)

    with f a network (its last layer optionally with latent weights), h_i its tapped activations,
    and c, s the outcome's centre and spread. Latent sites are in standardised units: features
    have mean 0 and variance 1, and f + phi'u has a variance of about 1. The outcome's site is on
    its original scale. `armed_pyro.Fit` reports everything on the original scale.

    A model has no sizes until `bind` fits it to data. `fit` binds a copy and leaves the original
    and its network unchanged.

    Parameters
    ----------
    net : torch.nn.Module
        Fixed effects f: maps standardised features "rows ..." to "rows columns". It is not
        edited, and `fit` trains a copy.
    random : str, Term, or a sequence of these
        Random effects, in lme4's syntax or as terms; may be empty, for a network without any.
    family : str or Family
        Distribution of the outcome: a `Family`, or the name of one: gaussian, bernoulli,
        binomial, categorical, poisson, negative_binomial or ordinal, whose link may follow:
        ``"ordinal(probit)"``.
    adversary : Adversary or sequence of Adversary
        Classifiers that keep cluster information out of the network's hidden layers.
    priors : Priors
        Priors of all latent sites.
    bayesian_head : bool
        Whether the network's last linear layer becomes the latent site ``fixed_effect`` with a
        normal prior. With a linear network, estimates of variances then correspond to REML
        instead of maximum likelihood.
    fixed_weight : float
        lambda_F, the weight of the likelihood under the fixed effects alone in the objective. It
        keeps the fixed effects predictive without random effects, and trains the network only.
    others : Reconstruction or sequence of Reconstruction
        Further outcomes, each with its likelihood and weight.
    between : {"auto", True, False}, optional
        Whether means of features in the clusters of each random intercept become latent fixed
        effects beside the network, :math:`f(x_i) + w^\top m_{g(i)}`, as in
        `armed_pyro.data.cluster_means`. A random intercept alone makes f follow the slopes within
        clusters; where those between clusters differ, new clusters are predicted badly without
        means (Mundlak 1978). True takes all features that vary within and between clusters.
        "auto" takes those whose slopes differ in the training rows; see
        `armed_pyro.program.mundlak`. It is the default of networks; linear programs have no means
        by default. Images have no named features, and so no means.
    linear_effects : bool, optional
        Whether linear effects of the features are latent beside the network:
        :math:`f(x_i) + x_i^\top \beta, \beta_j \sim N(0, s^2 / p)` with s `Priors.fixed_sd`
        and p features. The network then has to learn only what is not linear, which takes far
        fewer rows. By default networks of which the program uses the output alone have them, up
        to 100 features with names; an adversary, terms on layers or a latent last layer turn
        them off.
    output : int, str or a sequence of these
        Which element of a network's output, if that is a tuple or dict, is the predictor, such as
        ``"logits"``; by default its first tensor.
    parameters : mapping of str to str, optional
        Predictors of the family's parameters by name, :math:`g(\theta_i) = c + x_i^\top b + Z_i u`
        with the log link, or the logit of probabilities: ``{"sigma": "1 + x + (1 | site)"}`` for
        the residual sd, and ``shape``, ``zi``, ``hu``, ``phi`` or ``nu`` of other families. The
        fixed effects are latent and linear; ``"net"`` stands for a further output of the network,
        after those of the outcome. Terms of a factor with the same label, ``(1 |c| site)``, are
        correlated with each other.
    dtype : torch.dtype
        Precision of all but the network and the adversaries, which compute in the precision of the
        network's parameters. In single precision, torch.float32, an outcome near 6,000,000 is
        rounded to steps of 0.5.

    Examples
    --------
    >>> model = MixedEffects(nn.Linear(2, 1), "(1 + age | site)", "gaussian", bayesian_head=True)
    >>> [str(term) for term in model.terms]
    ['(1 + age | site)']

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3.
    """

    def bind(self, data: ClusteredData | Facts) -> MixedEffects:
        """A copy for these training data, with factors, priors and adversaries sized and scaled.

        Raises
        ------
        ValueError
            If data, terms, module paths and the network's output do not fit together. The message
            says which of them, and what to do.
        """
        bound = copy.deepcopy(self)
        bound.cross_fit(None)  # an earlier fit may have such networks
        if isinstance(data, ClusteredData):
            bound.family = self.family.bound(data)
            bound.facts = Facts.of(data, bound.family, self.factor_names())
            bound.facts = replace(bound.facts, dropped=dependent.dropped(bound, data))
            bound.facts = with_linear_effects(bound, bound.facts)
            bound.facts = with_between(bound, data)
        else:
            bound.facts = data
        bound.frozen = frozen_parts(bound.network)
        facts = bound.data_facts()
        if facts.weights_kind == "se":
            bound.priors = replace(bound.priors, residual_sd=Known(1.0))
        check_parameters(bound)
        binding.check_intercept(bound)
        widths = binding.activation_widths(bound)
        if isinstance(data, ClusteredData):
            check_network(bound, data)
        facts = self._place_factors(bound, widths)
        for factor in bound.factors:
            factor.place_cells(facts.levels[factor.name])
        names.name_plates(bound)
        for adversary in bound.adversaries:
            adversary.build(widths, len(facts.levels[adversary.factor]))
        bound._adversaries.to(bound.network_reference())
        bound._factors.to(bound.reference())
        bound._designs.to(bound.reference())
        if bound.has_fixed_effects:
            root = fixed_prior.root(bound)
            root = None if root is None else root.to(bound.reference())
            bound.register_buffer("fixed_root", root, persistent=False)
        bound.unreached = binding.unreached(bound)
        names.check_names(bound)
        names.warn_of_renamed(bound)
        binding.check_row_effects(bound)
        binding.warn_if_small(bound)
        binding.warn_if_far(bound)
        return bound

    def _place_factors(self, bound: MixedEffects, widths: dict[str, int]) -> Facts:
        """Give `bound` its grouping factors and predictors of parameters; return its facts."""
        facts = bound.data_facts()
        blocks: dict[str, list[Block]] = {}
        scaling = facts.design_scaling
        for term in self.terms:
            parts = [part.block(scaling, widths) for part in term.expanded(scaling)]
            blocks.setdefault(term.factor, []).extend(parts)
        bound._designs = nn.ModuleList(
            formula.block(scaling)
            for formula in self.parameter_formulas
            if not formula.from_network
        )
        bound.facts = facts = with_parameter_centers(bound, facts)
        scales = (self.family.effect_scale(), facts.spread)
        names_of = facts.columns[len(facts.outcome_columns) :]
        labels = names.site_labels(bound, blocks)
        bound._factors = nn.ModuleList(
            Factor(
                name,
                of_factor,
                facts.columns,
                self.priors,
                *scales,
                label=labels[name],
                parameters=names_of,
            )
            for name, of_factor in blocks.items()
        )
        return facts

    def with_family(self, family: Family) -> MixedEffects:
        """A shallow copy with this family."""
        changed = copy.copy(self)
        names, count = self.family.predicted, sum(f.from_network for f in self.parameter_formulas)
        changed.family = family_with_predictors(family, names, count)
        return changed

    def encode(self, data: ClusteredData, levels: Mapping[str, pd.Index] | None = None) -> HeldRows:
        """The data's rows as tensors in the program's precision and device; see `Facts.encode`."""
        like, image_dtype = self.reference(), self.network_reference().dtype
        return self.data_facts().encode(data, like, levels, image_dtype=image_dtype)

    def largest_factor(self) -> str | None:
        """The grouping factor with the most random effects; None without random effects.

        Of a process it is the factor of its clusters.
        """
        levels = self.data_facts().levels
        sizes = {f.name: len(levels[f.name]) * len(f.terms) for f in self.factors}
        name = max(sizes, key=lambda name: sizes[name], default=None)
        cells = [f.name for f in self.factors if f.process is not None]
        return name.rpartition(":")[0] if name is not None and name in cells else name

    @torch.no_grad()
    def compute(self, source: Source) -> Source:
        """The same rows with the frozen network's output and activations, computed once.

        They are unchanged if effects inside make the network depend on latent sites, or if they are
        in files: the network then runs whenever they are read.
        """
        if not isinstance(source, HeldRows):
            return source
        if modulates(self):
            inputs = None if source.inputs is None else source.inputs.plain()
            return cast("Source", replace(source, inputs=inputs))
        _, activations = self.run_network(replace(source, computed=None).all())
        return cast("Source", replace(source, computed=activations))

    def extend(
        self, latents: Latents, counts: Mapping[str, int], *, population: bool
    ) -> dict[str, Tensor]:
        """Latent sites with random effects for clusters beyond those seen in training.

        There are `counts` clusters of each factor in the result, those seen included. With
        `population`, new clusters have effects of zero. Otherwise each draw of D gives them one
        draw of N(0, D).
        """
        effects = {
            factor.effect_site: factor.extended(latents, counts[factor.name], population=population)
            for factor in self.factors
        }
        return {**latents, **effects}

    def forward(self, rows: Rows | RowSource) -> Predictor:
        """Sample every latent site and the outcome; observe the outcome if it is known.

        A `RowSource` stands for all of its rows.
        """
        rows = rows.all() if isinstance(rows, RowSource) else rows
        outcome, latents = self.data_facts().outcome_name, self.sample_latents(rows)
        predictor = self.predictor(
            rows, latents, return_fixed=binding.needs_fixed_run(self), others=True
        )
        with pyro.plate("row", len(rows), dim=-1), counted(rows, self.frequencies(rows)):
            pyro.sample(outcome, self.density(predictor.eta, latents, rows), obs=rows.y)
            for other, density in self.other_densities(predictor.others, latents, rows).items():
                with poutine.scale(scale=other.weight):
                    pyro.sample(other.name, density, obs=rows.x)
        return predictor

    def sample_latents(self, rows: Rows) -> dict[str, Tensor]:
        """Sample every latent site from the prior, with effects of the clusters of `rows`."""
        unit, latents = self.unit(), dict[str, Tensor]()
        for parameter in self.family.parameters:
            latents[parameter.name] = parameter.sample(self.priors, unit)
        if self.has_fixed_effects:
            latents["fixed_effect"] = pyro.sample("fixed_effect", self.fixed_prior())
        latents |= {other.sd_site: other.sample_sd(unit) for other in self.others}
        for factor in self.factors:
            latents[factor.effect_site] = factor(rows.memberships[factor.name])
        return latents

    def fixed_prior(self) -> dist.TorchDistribution:
        """p(fixed_effect), of which `armed_pyro.program.fixed_prior.root` gives the covariance."""
        zeros, sd = self.unit().new_zeros(len(self.fixed_terms())), self.priors.fixed_sd
        if self.fixed_root is None:
            return dist.Normal(zeros, sd).to_event(1)
        return dist.MultivariateNormal(zeros, scale_tril=sd * self.fixed_root)

    def log_likelihood(self, rows: Rows, latents: Latents) -> Float[Tensor, "... rows"]:
        """log p(y_i | latent sites) of every row, times its weight; see `Rows.outcome`."""
        values = log_likelihoods(self, rows, latents, others=False)
        return values[self.data_facts().outcome_name]

    def predictor(
        self, rows: Rows, latents: Latents, *, return_fixed: bool = True, others: bool = False
    ) -> Predictor:
        """Linear predictors given the latent sites, vectorised over draws.

        Layers that the filter effects cannot reach give the same output with and without them, so
        one pass of the network serves both. If the effects reach nothing that was requested, it is
        a pass without them.

        Parameters
        ----------
        latents : mapping of str to Tensor
            Random effects "... clusters terms"; the family's parameters and fixed effects with a
            1 in the place of the rows: "... 1 fixed_terms". Factors left out count as zero.
        return_fixed : bool
            If False, the predictor, output and activations without random effects may be left out,
            which saves a pass of the network.
        others : bool
            Whether the means of the other outcomes are computed.
        """
        means: Latents
        inside = [f for f in self.factors if f.filters and f.effect_site in latents]
        reached = bool(inside) and reaches_predictor(self)
        rebuilt = others and any(other.tap not in self.unreached for other in self.others)
        if not (reached or (inside and rebuilt)):
            output, activations = self.run_network(rows)
            eta = linear_predictor(self, rows, output, activations, latents)
            means = {other.name: activations[other.tap] for other in self.others if others}
        else:
            runs = modulated_runs(self, rows, latents, inside, others=others)
            if reached and not return_fixed:
                return replace(runs, output=None)
            eta, means = runs.eta, runs.others
            output, activations = cast("Tensor", runs.output), runs.activations
            if return_fixed:
                output, activations = self.run_network(rows)
        fixed = self.fixed_predictor(rows, output, activations, latents)
        return Predictor(eta, fixed, output, activations, means)


def log_likelihoods(
    model: MixedEffects, rows: Rows, latents: Latents, *, others: bool = True
) -> dict[str, Float[Tensor, "... rows"]]:
    """log p of every row, times its weight, by outcome; with `others`, of these too, weighted."""
    predictor = model.predictor(rows, latents, return_fixed=False, others=others)
    density = model.density(predictor.eta, latents, rows)
    values = {model.data_facts().outcome_name: density.log_prob(rows.outcome())}
    densities = model.other_densities(predictor.others, latents, rows) if others else {}
    for other, rebuilt in densities.items():
        values[other.name] = other.weight * rebuilt.log_prob(rows.x)
    frequencies = model.frequencies(rows)
    if frequencies is None:
        return values
    return {name: frequencies * value for name, value in values.items()}


@contextmanager
def counted(rows: Rows, frequencies: Tensor | None) -> Iterator[None]:
    """Handlers under which each row's log-likelihood counts `rows.scale` times its frequency."""
    if frequencies is None:
        with poutine.scale(scale=rows.scale):
            yield
        return
    # Pyro's scales must be positive, so rows of frequency 0 are masked.
    counts = cast("torch.BoolTensor", frequencies > 0)
    weights = torch.where(counts, frequencies, 1)
    with poutine.scale(scale=rows.scale * weights), poutine.mask(mask=counts):
        yield


def trains_network(model: MixedEffects) -> bool:
    """Whether there are weights to train: of an adversary, or of a network that is not linear."""
    weights = any(parameter.requires_grad for parameter in model.network.parameters())
    return bool(model.adversaries) or (weights and not model.linear)


def can_overfit(model: MixedEffects) -> bool:
    """Whether there are trained weights of a network other than a single linear layer."""
    weights = any(parameter.requires_grad for parameter in model.network.parameters())
    return weights and not isinstance(model.network, nn.Linear)
