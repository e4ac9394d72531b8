"""Variational families: ordinary Pyro guides with the program's sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import pyro
import torch
from torch import Tensor, nn

from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.guides.pseudo_observations import PseudoObservations
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["Guide", "joined", "selected"]


class Guide(nn.Module, ABC):
    """Approximate posterior q of a bound program: samples every latent site of the program.

    Examples
    --------
    >>> sorted(Guide.__abstractmethods__)  # what a variational family of one's own has to give
    ['center', 'every_cluster', 'forward', 'most_draws', 'nested', 'noise_shapes', 'refresh']
    """

    hyperparameters: Hyperparameters

    @abstractmethod
    def forward(self, rows: Rows) -> dict[str, Tensor]:
        """Sample all latent sites, random effects for the clusters of `rows`."""

    @abstractmethod
    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        """Take in what all rows say at the present state, between steps of training."""

    @abstractmethod
    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        """Shape of the standard normal noise of which each of its sites makes its draw."""

    @abstractmethod
    def nested(self) -> Factor | None:
        """The factor whose clusters are independent given all other sites, if it has sites."""

    def nested_name(self) -> str | None:
        """Name of the `nested` factor."""
        nested = self.nested()
        return None if nested is None else nested.name

    @abstractmethod
    def every_cluster(self) -> bool:
        """Whether every cluster has to be drawn with every mini-batch."""

    @abstractmethod
    def most_draws(self) -> int:
        """Draws that fit into memory at once."""

    @abstractmethod
    def center(self, rows: Rows) -> dict[str, Tensor]:
        """The latent sites at the guide's centre, without randomness."""

    def exact(self, model: MixedEffects) -> bool:
        """Whether q(u | theta) is exact once the network is held and `refresh` was called."""
        return False

    def work(self) -> int:
        """Multiplications of a joint draw of all random effects, where it takes more than rows."""
        return 0

    def clusterwise(self) -> Mapping[str, PseudoObservations]:
        """By factor, what is kept of clusters and can be `narrowed`; by default nothing."""
        return {}

    def narrowed(self, sizes: Mapping[str, int]) -> Guide:
        """The same guide, with room for only so many clusters of these factors."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing of clusters apart")

    def settle(self) -> None:
        """From now on only the hyperparameters are trained; the rest follows by `refresh`."""
        self.requires_grad_(False)
        self.hyperparameters.settle()

    def draws(self, rows: Rows, n: int) -> dict[str, Tensor]:
        """n joint draws of all latent sites.

        Returns
        -------
        dict of str to Tensor
            Random effects with shape "n clusters terms"; other sites "n 1 ...".
        """
        pieces = []
        with torch.no_grad():
            for start in range(0, n, self.most_draws()):
                with pyro.plate("draws", min(self.most_draws(), n - start), dim=-2):
                    pieces.append(self(rows))
        return joined(pieces)


def joined(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Draws in several pieces as one; quantities that are known have no draws to join."""
    return {
        name: value if value.dim() < 2 else torch.cat([piece[name] for piece in pieces])
        for name, value in pieces[0].items()
    }


def selected(latents: Mapping[str, Tensor], which: slice | Tensor) -> dict[str, Tensor]:
    """Some of the draws; quantities that are known have none to select."""
    return {name: one[which] if one.dim() > 1 else one for name, one in latents.items()}
