"""Expected outcomes of rows under every posterior draw, with random effects zero, seen or new."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from armed_pyro._messages import check_known
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping
from armed_pyro.effects.grid import Grid
from armed_pyro.effects.network_jackknife import NetworkJackknife, NetworkUncertainty
from armed_pyro.families.family import Eta
from armed_pyro.guides.base import n_draws
from armed_pyro.prediction.chunks import check_settings
from armed_pyro.prediction.label_noise import label_noise
from armed_pyro.prediction.unseen import check_mode, new_clusters
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.linearize import sensitivities
from armed_pyro.program.model import MixedEffects, trains_network
from armed_pyro.rows.batch import Rows

__all__ = ["Expectation", "Scale", "Unseen"]

Unseen = Literal["population", "marginal"] | None
Scale = Literal["response", "link"]
CLUSTERS: Mapping[str | None, str] = {
    "population": "random effects zero, as of a typical cluster",
    "marginal": "averaged over the distribution of new clusters",
    None: "with the random effects of each row's own cluster",
}
SCALES = ("response", "link")
# Nodes of the Gauss-Hermite rule for the integral over a new cluster, by the largest sd of the
# predictor. On the logit scale the error of a probability is at most 1e-7, 3e-6, and 4e-6 at an sd
# of 3, 7e-5 at 4; on the log scale that of a mean is at most 1e-7 of it up to an sd of 5.
NODES = ((1.0, 11), (2.0, 21), (math.inf, 41))
# Draws of a new cluster for each posterior draw, where the integral has more dimensions.
NEW_CLUSTERS = 32
# Label of the cluster of typical rows.
TYPICAL = "(typical)"


@dataclass(frozen=True, eq=False)
class Expectation:
    r"""E[y | x] or the linear predictor of rows, for every posterior draw.

    With u the random effects of a row's cluster, the response is :math:`E[y \mid x, u = 0]`
    ("population"), :math:`E[y \mid x, u]` (None), or the integral over a new cluster of the
    population, :math:`\int E[y \mid x, u] N(u; 0, D) \, du` ("marginal"). Of binomial outcomes, y
    is the share of successes. On the scale of the link, "marginal" is "population".

    Rows of the data stay in their clusters, on whose other rows a network or a feature may depend;
    `typical` rows, which were made up, are in a new cluster unless u is that of a seen one.
    """

    model: MixedEffects
    latents: Mapping[str, Tensor]
    draws: int
    unseen: Unseen
    scale: Scale
    seed: int
    typical: bool = False
    jackknife: NetworkJackknife | None = None

    @classmethod
    def of(
        cls,
        grid: Grid,
        unseen: Unseen,
        scale: Scale,
        draws: int,
        seed: int | None,
        network_uncertainty: NetworkUncertainty = "none",
    ) -> Expectation:
        """The expectation of these rows; ValueError for unknown settings."""
        posterior = grid.posterior
        if unseen not in CLUSTERS:
            listed = "\n".join(f"  {name!r}: {text}" for name, text in CLUSTERS.items())
            raise ValueError(f"unknown value unseen={unseen!r}; the values are\n{listed}")
        check_known("scale", [scale], SCALES)
        check_settings(draws, 0.5)
        seed = posterior.seed if seed is None else seed
        # Random effects are drawn only where they are used; curves of smooth terms always are.
        model = posterior.model
        drawn = unseen is None or any(factor.smooth for factor in model.factors)
        latents = (posterior.draws if drawn else posterior.hyperparameters)(draws, seed=seed)
        if unseen is not None:
            sites = {factor.effect_site for factor in model.clustered_factors}
            latents = {name: value for name, value in latents.items() if name not in sites}
        n = n_draws(latents) or draws
        typical = grid.typical and unseen is not None
        jackknife = NetworkJackknife.of(posterior, network_uncertainty, n, seed)
        return cls(model, latents, n, unseen, scale, seed, typical, jackknife)

    def precise(self) -> Expectation:
        """The same in double precision, network included, for difference quotients."""
        model = copy.deepcopy(self.model).double()
        model.dtype = torch.float64
        latents = {name: value.double() for name, value in self.latents.items()}
        jackknife = self.jackknife
        if jackknife is not None and model.fold_networks is not None:
            jackknife = replace(jackknife, folds=model.fold_networks)
        return replace(self, model=model, latents=latents, jackknife=jackknife)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the outputs: classes, or a single empty label."""
        facts = self.model.data_facts()
        family = self.model.family
        if self.scale == "link":
            return facts.outcome_columns if family.multiclass else ("",)
        if not family.has_class_probabilities:
            return ("",)
        known = family.class_labels(facts.classes)
        classes = range(len(facts.outcome_columns) + 1)
        return tuple(map(str, classes if known is None else known))

    @property
    def note(self) -> str:
        """What the draws leave out; empty if nothing."""
        if not trains_network(self.model):
            return ""
        if self.jackknife is not None:
            return "The intervals hold the network's uncertainty, by a jackknife over its parts."
        return "The intervals are conditional on the network's trained weights."

    def blocks(self, data: ClusteredData) -> Iterator[Float[np.ndarray, "draws rows outputs"]]:
        """Yield the values of consecutive rows, in bounded memory."""
        facts, levels = self.model.data_facts(), None
        if self.typical:
            labels = Grouping.from_labels(np.full(data.n_rows, TYPICAL))
            data = replace(data, groupings=dict.fromkeys(data.groupings, labels))
        if self.unseen is None:
            check_mode(None, new_clusters(self.model, data), facts.levels)
        else:
            levels = facts.levels_with(data)
        if data.trials is not None:
            data = replace(data, trials=torch.ones_like(data.trials))
        data = replace(data, outcome=None, weights=None)
        rows_of = self.model.encode(data, levels)
        if self.typical:  # in a cluster with average means of features
            rows_of = replace(rows_of, means=None)
        size = max(1, BLOCK_VALUES // (self.draws * values_per_row(self.model)))
        for rows in rows_of.chunks(size):
            with torch.no_grad():
                values = self._values(rows)
            values = values if values.dim() == 3 else values[..., None]
            yield values.double().cpu().numpy()

    def _values(self, rows: Rows) -> Float[Tensor, "draws rows ..."]:
        """The values of a block; without a last dimension unless the outcome has classes."""
        family = self.model.family
        factors = self.model.clustered_factors
        integrated = self.unseen == "marginal" and self.scale == "response" and factors
        sampled = any(f.filters or f.on_parameters for f in factors)
        if integrated and (family.has_class_probabilities or sampled):
            return self._sampled(rows)
        predictor = self.model.predictor(rows, self.latents, return_fixed=False)
        eta = predictor.eta.expand(self.draws, *predictor.eta.shape[-2:])
        if self.jackknife is not None:
            eta = eta + self.jackknife.shift(self.model, rows)
        if self.scale == "link":
            columns = len(self.model.data_facts().outcome_columns)
            return eta[..., :columns] if family.multiclass else eta[..., 0]
        if not integrated:
            return self._expected(eta, rows)
        sd = self._random_variance(rows, predictor.activations).sqrt()
        most = float(sd.max()) if sd.numel() else 0.0
        count = next(count for limit, count in NODES if most <= limit or limit == math.inf)
        nodes, weights = np.polynomial.hermite_e.hermegauss(count)
        mean = torch.zeros_like(eta[..., 0])
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            shift = pad(float(node) * sd[..., None], (0, eta.shape[-1] - 1))
            mean += float(weight) * self._expected(eta + shift, rows)
        return mean

    def _expected(self, eta: Eta, rows: Rows) -> Float[Tensor, "draws rows ..."]:
        """The expected outcome of each draw."""
        return self.model.expected(eta, self.latents, rows)

    def _random_variance(
        self, rows: Rows, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "draws rows"]:
        """phi' D phi, summed over the factors, of rows of new clusters."""
        total = self.model.reference().new_zeros(self.draws, len(rows))
        spread = self.model.data_facts().spread
        for factor in self.model.clustered_factors:
            phi = sensitivities(self.model, rows, factor, activations, {})[..., 0]
            root = factor.scale_matrix(self.latents)
            root = root.reshape(-1, *root.shape[-2:]).to(total)
            total = total + (spread * phi.to(total) @ root).square().sum(-1)
        return total

    def _sampled(self, rows: Rows) -> Float[Tensor, "draws rows ..."]:
        """Mean over new clusters, drawn anew for every posterior draw; the same for all rows."""
        total: Any = 0.0
        for number in range(NEW_CLUSTERS):
            latents = dict(self.latents)
            for factor in self.model.clustered_factors:
                terms, clusters = len(factor.terms), int(_largest(rows, factor.name)) + 1
                like = self.model.reference().new_zeros(self.draws, 1, terms)
                # A draw and its mirror image: odd parts of the integrand cancel.
                noise = label_noise(self.seed, factor.name, [f"new {number // 2}"], like)
                effects = factor.effects_of(latents, noise * (1 - 2 * (number % 2)))
                latents[factor.effect_site] = effects.expand(self.draws, clusters, terms)
            eta = self.model.predictor(rows, latents, return_fixed=False).eta
            eta = eta.expand(self.draws, *eta.shape[-2:])
            eta = eta if self.jackknife is None else eta + self.jackknife.shift(self.model, rows)
            total = total + self._expected(eta, rows) / NEW_CLUSTERS
        return total


def _largest(rows: Rows, factor: str) -> Tensor:
    """The largest number of a cluster among these rows."""
    index = rows.memberships[factor].index
    return index.max() if len(index) else torch.zeros((), dtype=torch.long)
