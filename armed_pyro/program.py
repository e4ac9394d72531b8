"""The program: a network, random effects, a family and an adversary as one Pyro model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor, nn

from armed_pyro.adversary import Adversary
from armed_pyro.data import ClusteredData
from armed_pyro.factors import Factor
from armed_pyro.facts import Facts
from armed_pyro.families import Family, family_named
from armed_pyro.local import LocalModule
from armed_pyro.priors import Known, Priors
from armed_pyro.rows import Membership, Rows, RowSource
from armed_pyro.taps import pooled, tapped
from armed_pyro.terms import Term, parse_terms

__all__ = ["MixedEffects", "Predictor"]

Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class Predictor:
    """Linear predictors of some rows, on the original scale.

    Attributes
    ----------
    eta : Float[Tensor, "... rows columns"]
        Fixed and random effects, centre and offset.
    fixed : Float[Tensor, "... rows columns"]
        The same without random effects.
    output : Float[Tensor, "rows ..."]
        The network's output.
    activations : mapping of str to Tensor
        Tapped activations of the network, by module path.
    """

    eta: Float[Tensor, "... rows columns"]
    fixed: Float[Tensor, "... rows columns"]
    output: Tensor
    activations: Mapping[str, Tensor]


class MixedEffects(LocalModule):
    r"""Mixed-effects network as a probabilistic program.

    .. math::
        u_{mk} &\sim N(0, diag(sd_m) R_m diag(sd_m)) \\
        \eta_i &= c + s \, [f(x_i) + \sum_m \phi_m(x_i, h_i)^\top u_{m, g_m(i)}] + offset_i \\
        y_i &\sim Family(\eta_i, dispersion)

    with f a network (its last layer optionally with latent weights), h_i its tapped activations,
    and c, s the outcome's centre and spread. Latent sites are in standardised units, so that
    features with mean 0 and variance 1 meet a predictor of variance about 1; the outcome's site
    is on its original scale. `armed_pyro.Fit` reports everything on the original scale.

    A model is a plan until `bind` lays it out for data; `fit` binds a copy and leaves the
    original, network included, as it was.

    Parameters
    ----------
    net : torch.nn.Module
        Fixed effects: maps standardised features of shape "rows ..." to "rows columns". It is
        neither edited nor, by `fit`, trained in place.
    random : str, Term, or a sequence of these
        Random effects, in lme4's syntax or as terms; may be empty.
    family : str or Family
        gaussian, bernoulli, binomial, categorical, poisson or negative_binomial.
    adversary : Adversary or sequence of Adversary
        Classifiers that keep cluster information out of the network's features.
    priors : Priors
        Priors of all latent sites.
    bayesian_head : bool
        Whether the network's last linear layer becomes the latent site ``fixed_effect`` with a
        normal prior. With a linear network, estimates correspond to REML instead of maximum
        likelihood.
    fixed_weight : float
        lambda_F, the weight in the objective of the likelihood under the fixed effects alone,
        which keeps them predictive on their own. It trains the network only.

    Examples
    --------
    >>> model = MixedEffects(nn.Linear(2, 1), "(1 + age | site)", "gaussian", bayesian_head=True)
    >>> [str(term) for term in model.terms]
    ['(1 + age | site)']

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3.
    """

    facts: Facts | None

    def __init__(
        self,
        net: nn.Module,
        random: str | Term | Iterable[str | Term] = (),
        family: str | Family = "gaussian",
        adversary: Adversary | Sequence[Adversary] = (),
        *,
        priors: Priors | None = None,
        bayesian_head: bool = False,
        fixed_weight: float = 0.0,
    ) -> None:
        super().__init__("program")
        if not isinstance(net, nn.Module):
            raise TypeError(f"the network must be a torch.nn.Module, not {type(net).__name__}")
        if fixed_weight < 0:
            raise ValueError(f"`fixed_weight` must not be negative, not {fixed_weight}")
        self.net = net
        self.terms = parse_terms(random)
        self.family = family_named(family)
        given = [adversary] if isinstance(adversary, Adversary) else list(adversary)
        self.adversaries = nn.ModuleList(given)
        self.priors = Priors() if priors is None else priors
        self.bayesian_head = bayesian_head
        self.fixed_weight = float(fixed_weight)
        self.factors = nn.ModuleList()
        self.facts = None

    # --- laying out ---------------------------------------------------------------------------

    def factor_names(self) -> tuple[str, ...]:
        """Grouping factors of the terms and adversaries, in order of appearance."""
        games = [game.factor for game in self.adversaries]
        return tuple(dict.fromkeys([term.factor for term in self.terms] + games))

    def layers(self) -> tuple[str, ...]:
        """Module paths whose activations terms or adversaries need."""
        paths = [path for term in self.terms for path in term.layers()]
        paths += [path for game in self.adversaries for path in game.taps]
        return tuple(dict.fromkeys(paths))

    def bind(self, data: ClusteredData | Facts) -> MixedEffects:
        """A copy laid out for these data: factors, priors and adversaries sized and scaled.

        Raises
        ------
        ValueError
            If the data, the terms, the module paths and the network's output do not fit
            together; the message says which and what to do.
        """
        facts = (
            data if isinstance(data, Facts) else Facts.of(data, self.family, self.factor_names())
        )
        bound = copy.deepcopy(self)
        bound.facts = facts
        bound.adversaries = nn.ModuleList(copy.deepcopy(list(self.adversaries)))
        widths = bound._probe()
        by_factor: dict[str, list[Term]] = {}
        for term in self.terms:
            by_factor.setdefault(term.factor, []).append(term)
        bound.factors = nn.ModuleList(
            Factor(
                name,
                [term.block(facts, widths) for term in terms],
                facts.columns,
                self.priors.of(name),
                self.family.effect_scale(),
                self.priors.cor,
                facts.spread,
            )
            for name, terms in by_factor.items()
        )
        for game in bound.adversaries:
            game.build(widths, len(facts.levels[game.factor]))
        bound.to(bound.reference())
        bound._warn_if_small()
        return bound

    def reference(self) -> Tensor:
        """A tensor of the program's precision and device."""
        return next((p for p in self.net.parameters() if p.is_floating_point()), torch.zeros(()))

    def data_facts(self) -> Facts:
        """What the program knows of its data.

        Raises
        ------
        ValueError
            If the model has not been bound.
        """
        if self.facts is None:
            raise ValueError("the model is not laid out yet: call model.bind(data), or fit it")
        return self.facts

    def _probe(self) -> dict[str, int]:
        """Run the network once on zeros: widths of the tapped layers, and the output's check."""
        facts, like = self.data_facts(), self.reference()
        x = torch.zeros(2, *facts.feature_shape, dtype=like.dtype, device=like.device)
        training = self.net.training
        self.net.eval()
        head = [self.head_path()] if self.bayesian_head else []
        try:
            with torch.no_grad(), tapped(self.net, self.layers(), head) as record:
                output = self.net(x)
        except RuntimeError as error:
            raise ValueError(
                f"the network cannot take the features, of shape (rows, "
                f"{', '.join(map(str, facts.feature_shape))}) "
                f"({', '.join(facts.feature_names) or 'unnamed'}): {error}"
            ) from error
        finally:
            self.net.train(training)
        columns = self.family.contrasts(output.reshape(2, -1)).shape[-1]
        if columns != len(facts.columns):
            raise ValueError(
                f"the network has {output.reshape(2, -1).shape[-1]} output(s), but the outcome "
                f"{facts.outcome_name!r} of family {self.family.name!r} needs "
                f"{len(facts.columns) + (self.family.name == 'categorical')}"
            )
        missing = [path for path in self.layers() if path not in record]
        if missing:
            raise ValueError(f"the network never runs its module {missing[0]!r}: nothing to tap")
        if head:
            self._check_head(output, record[f"<{head[0]}"])
        return {path: pooled(record[path]).shape[-1] for path in self.layers()}

    def head_path(self) -> str:
        """Module path of the network's last linear layer; empty if it is the network itself."""
        paths = [path for path, one in self.net.named_modules() if isinstance(one, nn.Linear)]
        if not paths:
            raise ValueError("a Bayesian head needs a network with a torch.nn.Linear layer")
        return paths[-1]

    def _check_head(self, output: Tensor, hidden: Tensor) -> None:
        head = self.net.get_submodule(self.head_path())
        with torch.no_grad():
            same = torch.allclose(head(hidden).reshape(-1), output.reshape(-1))
        if not same or hidden.dim() != 2:
            raise ValueError(
                f"a Bayesian head needs the last linear layer ({self.head_path() or 'the net'}) "
                "to give the network's output, but something follows it: move it to the end, or "
                "leave bayesian_head off"
            )

    def _warn_if_small(self) -> None:
        count = sum(p.numel() for p in self.net.parameters() if p.requires_grad)
        count += sum(len(factor.terms) for factor in self.factors)
        rows = self.data_facts().n_rows
        if rows < count:
            warnings.warn(
                f"there are fewer rows ({rows}) than parameters ({count}): expect overfitting; "
                "use a smaller network, or stop by validation",
                UserWarning,
                stacklevel=3,
            )

    # --- data ---------------------------------------------------------------------------------

    def encode(
        self, data: ClusteredData, levels: Mapping[str, pd.Index] | None = None
    ) -> RowSource:
        """Tensors of the program's precision on its device.

        Parameters
        ----------
        data : ClusteredData
            Data with the training data's features.
        levels : mapping of str to pandas.Index, optional
            Cluster labels that codes refer to; by default those seen in training.

        Raises
        ------
        ValueError
            If features are missing, or clusters are not among `levels`.
        """
        facts, like = self.data_facts(), self.reference()
        levels = facts.levels if levels is None else levels
        if data.feature_names != facts.feature_names:
            missing = [name for name in facts.feature_names if name not in data.feature_names]
            raise ValueError(
                f"the data have the features {list(data.feature_names)}, but the model was laid "
                f"out for {list(facts.feature_names)} (missing: {missing or 'none'}); encode new "
                "tables with the training data's schema: data.schema.encode(table)"
            )
        codes, counts = {}, {}
        for factor, index in levels.items():
            found = index.get_indexer(data.grouping(factor).labels())
            if (found < 0).any():
                label = data.grouping(factor).labels()[found < 0][0]
                raise ValueError(f"cluster {label!r} of {factor!r} was not seen in training")
            codes[factor] = torch.as_tensor(found, dtype=torch.long, device=like.device)
            counts[factor] = torch.bincount(codes[factor], minlength=len(index))

        def tensor(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(like)

        x = facts.standardise(data.features).to(like)
        offset, weights = tensor(data.offset), tensor(data.weights)
        return RowSource(
            x, tensor(data.outcome), codes, counts, tensor(data.trials), offset, weights
        )

    def levels_with(self, data: ClusteredData) -> dict[str, pd.Index]:
        """Labels of the clusters seen in training, followed by those only these data have."""
        extended = {}
        for factor, seen in self.data_facts().levels.items():
            own = data.grouping(factor).levels
            extended[factor] = seen.append(own[~own.isin(seen)])
        return extended

    def clusters(self) -> Rows:
        """No rows, but every cluster of every factor: for drawing random effects only."""
        like, facts = self.reference(), self.data_facts()
        none = torch.zeros(0, dtype=torch.long, device=like.device)
        memberships = {
            name: Membership(torch.arange(len(levels), device=like.device), none)
            for name, levels in facts.levels.items()
        }
        return Rows(like.new_zeros(0, *facts.feature_shape), None, memberships)

    def extend(
        self, latents: Latents, counts: Mapping[str, int], *, population: bool
    ) -> dict[str, Tensor]:
        """Latent sites with random effects for clusters beyond those seen in training.

        Parameters
        ----------
        latents : mapping of str to Tensor
            Draws for the clusters seen in training.
        counts : mapping of str to int
            Clusters wanted of each factor, seen ones included.
        population : bool
            Zeros for the new clusters; otherwise one draw of N(0, D) each, given each draw of D.
        """
        extended = dict(latents)
        for factor in self.factors:
            seen = latents[factor.effect_site]
            new = counts[factor.name] - seen.shape[-2]
            noise = seen.new_zeros(*seen.shape[:-2], new, seen.shape[-1])
            if not population and new:
                scale, noise = factor.scale(latents), torch.randn_like(noise)
                # A scale has a 1 in the clusters' place.
                noise = scale * noise if factor.diagonal else (scale @ noise[..., None])[..., 0]
            extended[factor.effect_site] = torch.cat([seen, noise], -2)
        return extended

    # --- the density --------------------------------------------------------------------------

    def forward(self, rows: Rows | RowSource) -> Predictor:
        """Sample every latent site and the outcome; observe the outcome where it is known."""
        rows = rows.all() if isinstance(rows, RowSource) else rows
        facts = self.data_facts()
        unit = self.reference().new_tensor([1 / facts.spread])
        latents: dict[str, Tensor] = {}
        dispersion = self.family.dispersion(self.priors, unit)
        if self.family.dispersion_name is not None and dispersion is not None:
            latents[self.family.dispersion_name] = dispersion
        if self.bayesian_head:
            zeros = unit.new_zeros(len(self.fixed_terms()))
            prior = dist.Normal(zeros, self.priors.fixed_sd).to_event(1)
            latents["fixed_effect"] = pyro.sample("fixed_effect", prior)
        for factor in self.factors:
            latents[factor.effect_site] = factor(rows.memberships[factor.name])
        predictor = self.predictor(rows, latents)
        with ExitStack() as handlers:
            handlers.enter_context(pyro.plate("row", len(rows), dim=-1))
            handlers.enter_context(poutine.scale(scale=self._row_scale(rows)))
            pyro.sample(facts.outcome_name, self.density(predictor.eta, latents, rows), obs=rows.y)
        return predictor

    def _row_scale(self, rows: Rows) -> float | Tensor:
        return rows.scale if rows.weights is None else rows.scale * rows.weights

    def log_likelihood(self, rows: Rows, latents: Latents) -> Float[Tensor, "... rows"]:
        """log p(y_i | latent sites) of every row, times the row's weight."""
        eta = self.predictor(rows, latents).eta
        log_prob = self.density(eta, latents, rows).log_prob(rows.y)
        return log_prob if rows.weights is None else rows.weights * log_prob

    def density(
        self, eta: Float[Tensor, "... rows columns"], latents: Latents, rows: Rows
    ) -> dist.TorchDistribution:
        """p(y | eta, dispersion), on the outcome's scale."""
        dispersion = latents.get(self.family.dispersion_name or "")
        if dispersion is not None:
            dispersion = self.family.original_dispersion(dispersion, self.data_facts().spread)
        return self.family.distribution(eta, dispersion, rows)

    def known(self) -> dict[str, Tensor]:
        """Latent quantities that are given by their priors, not estimated."""
        known = {site: value for factor in self.factors for site, value in factor.known().items()}
        residual = self.priors.residual_sd
        if self.family.dispersion_name == "residual_sd" and isinstance(residual, Known):
            unit = self.reference().new_tensor([1 / self.data_facts().spread])
            known["residual_sd"] = residual.scales([""], unit, 1.0)[0]
        return known

    @property
    def linear(self) -> bool:
        """Whether the fixed effects are latent coefficients of the input features."""
        facts = self.data_facts()
        return (
            self.bayesian_head
            and isinstance(self.net, nn.Linear)
            and self.net.in_features == len(facts.feature_names)
        )

    def fixed_terms(self) -> tuple[str, ...]:
        """Names of the latent fixed effects: the inputs of the last linear layer, by column."""
        facts, path = self.data_facts(), self.head_path()
        head = self.net.get_submodule(path)
        width = int(head.in_features)  # type: ignore[arg-type]
        names = [f"{path or 'input'}[{unit}]" for unit in range(width)]
        if self.linear:
            names = list(facts.feature_names)
        names = ["Intercept"] * (head.bias is not None) + names
        return tuple(f"{name}[{c}]" if c else name for name in names for c in facts.columns)

    def predictor(self, rows: Rows, latents: Latents) -> Predictor:
        """Linear predictors given the latent sites, vectorised over draws.

        Parameters
        ----------
        rows : Rows
            n rows.
        latents : mapping of str to Tensor
            Random effects "... clusters terms"; dispersion and fixed effects, if latent, with a
            1 in the place of the rows: "... 1 fixed_terms". Factors left out count as zero.
        """
        facts = self.data_facts()
        head = [self.head_path()] if self.bayesian_head else []
        net = self.net
        with tapped(net, self.layers(), head) as activations:
            output = net(rows.x)
        fixed = self.fixed_predictor(rows, output, activations, latents)
        eta = fixed
        for factor in self.factors:
            if factor.effect_site in latents:
                membership = rows.memberships[factor.name]
                phi = factor.design(rows.x, activations)
                effects = latents[factor.effect_site]
                eta = eta + facts.spread * factor.contribution(phi, membership, effects)
        return Predictor(eta, fixed, output, activations)

    def fixed_predictor(
        self, rows: Rows, output: Tensor, activations: Mapping[str, Tensor], latents: Latents
    ) -> Float[Tensor, "... rows columns"]:
        """Linear predictor without random effects, from the network's output and activations."""
        facts = self.data_facts()
        base = rows.x.new_tensor(facts.center)
        if rows.offset is not None:
            base = base + rows.offset[:, None]
        if not self.bayesian_head:
            return base + facts.spread * self.family.contrasts(output.reshape(len(rows), -1))
        hidden = activations[f"<{self.head_path()}"]
        weights = latents["fixed_effect"].unflatten(-1, (-1, len(facts.columns)))
        if weights.dim() > 2:
            weights = weights.squeeze(-3)
        if weights.shape[-2] > hidden.shape[-1]:
            return base + facts.spread * (weights[..., :1, :] + hidden @ weights[..., 1:, :])
        return base + facts.spread * (hidden @ weights)
