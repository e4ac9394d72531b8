"""`Guide`: the protocol of every approximate posterior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro
import torch
from jaxtyping import Int
from torch import Tensor, nn

from armed_pyro.guides.closed_form import MarginalLikelihood, closed_form
from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.guides.pseudo_observations import PseudoObservations
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["Guide", "ParticleGroups", "joined", "n_draws", "selected"]


@dataclass(frozen=True)
class ParticleGroups:
    """Sites whose draws importance sampling weighs together, group by group.

    `sites` are each entry's group, by site of random effects; groups are independent in q and in
    the program given all other sites. `factor` is the factor whose clusters tell a row's group.
    """

    factor: Factor
    sites: Mapping[str, Int[Tensor, " entries"]]
    count: int

    def of_rows(self, rows: Rows) -> Int[Tensor, " rows"]:
        """Each row's group."""
        return self.sites[self.factor.effect_site][rows.memberships[self.factor.name].clusters()]


class Guide(nn.Module, ABC):
    r"""Approximate posterior :math:`q(\theta) \, q(u \mid \theta)` of a bound program.

    theta are the hyperparameters (family parameters, standard deviations, correlations, latent
    fixed effects) and u the random effects. A guide is an ordinary Pyro guide: calling it samples
    every latent site of the program, under the program's site names. The rest of the protocol
    tells training, importance sampling and prediction how to use it.

    Sites that a guide samples beyond those of the program start with an underscore and are
    auxiliary (``infer={"is_auxiliary": True}``): ``_theta`` holds all hyperparameters in
    unconstrained coordinates. `hyperparameters` is q(theta).

    Examples
    --------
    The methods that a new variational family has to define:

    >>> sorted(Guide.__abstractmethods__)
    ['center', 'every_cluster', 'forward', 'most_draws', 'nested', 'noise_shapes', 'refresh']
    """

    hyperparameters: Hyperparameters

    @abstractmethod
    def forward(self, rows: Rows) -> dict[str, Tensor]:
        """Sample all latent sites, with random effects for the clusters of `rows`.

        The guide runs inside any plates of draws that the caller has opened ("..." below), and
        reads only the memberships of the rows.

        Returns
        -------
        dict of str to Tensor
            ``<factor>_effect`` of shape "... clusters terms", one row per entry of the
            membership's `index`; every hyperparameter with a 1 in the place of the clusters,
            "... 1 size". Known hyperparameters are included without any leading dimensions.
        """

    @abstractmethod
    def center(self, rows: Rows) -> dict[str, Tensor]:
        """The latent sites at the guide's centre: theta at zero noise, u at its mean given theta.

        Training and the search for the mode call it. No Pyro site is sampled. Values
        have no leading dimensions: effects are "clusters terms".
        """

    @abstractmethod
    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        """Shape of the standard normal noise behind one draw of each random site.

        `armed_pyro.guides.noise` makes the noise. The shape is ``(size,)`` for sites without
        clusters, such as ``_theta``, and ``(clusters, terms)`` for random effects. Sites that are
        functions of others, and empty ones, are left out. Each site that is listed has a
        `Pushforward` distribution, which maps the noise to the draw.
        """

    @abstractmethod
    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        """Set q(u | theta) from the likelihood of all rows at the present state, in place.

        Training calls it between steps, and the search for the mode after moves of theta. Guides
        that have nothing to set return at once.
        """

    def exact(self, model: MixedEffects) -> bool:
        """Whether q(u | theta) equals p(u | theta, y) for every theta, after `refresh`.

        The answer holds for a frozen network. Where it is True, p(y, u | theta) / q(u | theta) is
        the same for every u, and one `refresh` serves the rest of training. The default is False.
        """
        return False

    def effects_given(self, latents: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """Sample the random effects given the hyperparameters, and return all latent sites.

        `forward` is this, after a draw of the hyperparameters; `latents` have the shapes of
        `forward`. Importance sampling calls it for guides that are `exact`.

        Raises
        ------
        NotImplementedError
            If the guide does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draw effects by themselves")

    def closed_form(self, model: MixedEffects, source: RowSource) -> MarginalLikelihood | None:
        """log p(y | theta) of these rows given the frozen network, if it has a closed form."""
        return closed_form(model, source)

    @abstractmethod
    def nested(self) -> Factor | None:
        """The factor whose clusters are independent in q given all other sites, or None.

        Importance sampling integrates over its effects cluster by cluster, with several particles
        for each. With two or more such factors, the guide names the largest.
        """

    def particles(self) -> ParticleGroups | None:
        """Sites that importance sampling draws several times, if these are not one `nested` factor.

        The weights then need all rows at once. The default is None.
        """
        return None

    def nested_name(self) -> str | None:
        """Name of the `nested` factor, or None."""
        nested = self.nested()
        return None if nested is None else nested.name

    @abstractmethod
    def every_cluster(self) -> bool:
        """Whether every mini-batch has to draw the effects of every cluster.

        If False, a mini-batch draws only the clusters of its rows.
        """

    @abstractmethod
    def most_draws(self) -> int:
        """Number of draws of all random effects that fit into memory at once; at least 1."""

    def work(self) -> int:
        """Multiplications of one joint draw of all random effects, beyond the work of the rows.

        Training and importance sampling take fewer draws where it is large.
        """
        return 0

    def clusterwise(self) -> Mapping[str, PseudoObservations]:
        """The parameters that belong to single clusters, by factor; empty by default.

        A mini-batch trains only the entries of its clusters, see
        `armed_pyro.inference.optimizers`.
        """
        return {}

    def narrowed(self, sizes: Mapping[str, int]) -> Guide:
        """A copy with room for fewer clusters, which shares all parameters not in `clusterwise`.

        `sizes` are numbers of clusters, for some of the factors of `clusterwise`.

        Raises
        ------
        NotImplementedError
            If the guide has no clusterwise parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} has no parameters by cluster")

    def settle(self) -> None:
        """Switch gradients off for all parameters but those of q(theta).

        Training calls it once, when the network is frozen. From then on q(u | theta) follows by
        `refresh`.
        """
        self.requires_grad_(False)
        self.hyperparameters.train_shape()

    def draws(self, rows: Rows, n: int) -> dict[str, Tensor]:
        """n joint draws of all latent sites, without gradients, made `most_draws` at a time.

        Effects of the clusters of `rows` have the shape "n clusters terms", other sites "n 1 ...".
        `MixedEffects.clusters` gives rows of every cluster.
        """
        pieces = []
        with torch.no_grad():
            for start in range(0, n, self.most_draws()):
                with pyro.plate("draws", min(self.most_draws(), n - start), dim=-2):
                    pieces.append(self(rows))
        return joined(pieces)


def joined(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate pieces of draws along the draws; known quantities, without draws, stay as is."""
    return {
        name: value if value.dim() < 2 else torch.cat([piece[name] for piece in pieces])
        for name, value in pieces[0].items()
    }


def selected(latents: Mapping[str, Tensor], which: slice | Tensor) -> dict[str, Tensor]:
    """The draws at these places; known quantities, without draws, stay as is."""
    return {name: value[which] if value.dim() > 1 else value for name, value in latents.items()}


def n_draws(latents: Mapping[str, Tensor]) -> int:
    """The number of draws; 0 if no site has draws, as for known quantities."""
    return max((len(value) for value in latents.values() if value.dim() > 1), default=0)
