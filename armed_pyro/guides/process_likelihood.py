"""log p(y | theta) of a gaussian program with a process in time, in time linear in the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.chains import Chains, predicted_variance
from armed_pyro.distributions.leading_matrices import product
from armed_pyro.guides.closed_form import (
    Conditional,
    MarginalLikelihood,
    OuterLevel,
    by_parent,
)
from armed_pyro.guides.process_sums import ProcessSums
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents

__all__ = ["Filtered", "ProcessLikelihood"]

# Values of all arrays of the draws that are made at once.
MOST_VALUES = 2**21

Draws = Float[Tensor, "draws cells"]


@dataclass(frozen=True)
class Filtered:
    r"""The process given the rows up to each cell, by a Kalman filter in units of its sd s.

    The cells are in the order of the chains' steps.

    With :math:`g_c = \tau s^2 W_c` and the variance p of the state before the cell is seen, a
    column C of the rows has the innovation :math:`v_c = C_c - s a_c m_{c-1}`, with
    :math:`m_c = a_c m_{c-1} + p_c s \tau W_c v_c / (1 + g_c p_c)`.
    """

    chains: Chains
    information: Float[Tensor, " cells"]
    sd: Float[Tensor, "draws 1"]
    tau: Float[Tensor, "draws 1"]
    decay: Draws
    innovation: Draws
    variance: Draws  # p

    @classmethod
    def of(
        cls,
        sums: ProcessSums,
        sd: Float[Tensor, "draws 1"],
        tau: Float[Tensor, "draws 1"],
        parameter: Float[Tensor, "draws 1"],
    ) -> Filtered:
        """The filter of these draws of sd, residual precision and the process's parameter."""
        timeline = sums.process.ordered_timeline
        decay, innovation = sums.process.steps(parameter, timeline)
        information = sums.in_order(sums.information)
        known = tau * sd.square() * information
        variance = predicted_variance(timeline.chains, decay, innovation, known)
        return cls(timeline.chains, information, sd, tau, decay, innovation, variance)

    @property
    def pivot(self) -> Draws:
        """1 + g p."""
        return 1 + self.tau * self.sd.square() * self.information * self.variance

    def means(self, columns: Float[Tensor, "... draws cells"]) -> Float[Tensor, "... draws cells"]:
        """m of every column."""
        gain = self.variance * self.sd * self.tau * self.information / self.pivot
        kept = self.decay * (1 - gain * self.sd)
        return self.chains.forwards(kept, gain * columns)

    def whitened(
        self, columns: Float[Tensor, "... draws cells"]
    ) -> Float[Tensor, "... draws cells"]:
        """Innovations of the columns over their sd, in units of the residual sd."""
        before = self.chains.before(self.means(columns))
        innovations = columns - self.sd * self.decay * before
        return innovations * (self.information / self.pivot).sqrt()


class ProcessLikelihood(MarginalLikelihood):
    r"""log p(y | theta) with the process and all random effects integrated out.

    .. math::
        \log p(y \mid \theta) = c + \tfrac{n}{2} \log \tau - \tfrac12 \sum_c \log (1 + g_c p_c)
        - \sum_m \sum_k \log |C_{mk}| - \tfrac{\tau}{2} E

    The filter turns the rows into independent innovations. Their products, with those within cells,
    are the sums from which the other factors are eliminated from the inside out, as in
    `armed_pyro.guides.closed_form.ClosedForm`.

    Examples
    --------
    ``ProcessLikelihood(model, guide.sums).log_likelihood(hyperparameters)``
    """

    def __init__(self, model: MixedEffects, sums: ProcessSums) -> None:
        self.sums, self._precision = sums, model.precision

    @property
    def size(self) -> int:
        columns = sum(self.sums.terms) + 1
        return max(1, len(self.sums.information) * columns * (columns + 4))

    def most_draws(self) -> int:
        return max(1, MOST_VALUES // self.size)

    def filtered(self, latents: Latents) -> Filtered:
        """The filter of these draws."""
        sums, factor = self.sums, self.sums.factor
        sd = factor.sd(latents).double().reshape(-1, 1)
        parameter = sums.process.parameter(latents).reshape(-1, 1)
        return Filtered.of(sums, sd, self._tau(latents), parameter)

    def outcome(self, latents: Latents) -> Draws:
        """y - X beta of every cell, in the order of the chains' steps."""
        ends = self.sums.in_order(self.sums.ends)
        if "fixed_effect" not in latents:
            return ends[-1:]
        fixed = latents["fixed_effect"].double()
        return ends[-1] - fixed.reshape(-1, fixed.shape[-1]) @ ends[:-1]

    def log_likelihood(self, latents: Latents) -> Float[Tensor, " draws"]:
        sums, filtered, tau = self.sums, self.filtered(latents), self._tau(latents)[:, 0]
        squares, levels = self._levels(latents, filtered)
        log_det = 0.5 * filtered.pivot.log().sum(-1)
        for level in levels:
            log_det = log_det + level.log_det
            squares = squares + level.squares
        return sums.constant + 0.5 * sums.count * tau.log() - log_det - 0.5 * tau * squares

    def conditionals(self, latents: Latents) -> list[Conditional]:
        """Each factor's effects given the outer ones, without the process; the innermost first."""
        _, levels = self._levels(latents, self.filtered(latents))
        return [level.conditional() for level in levels]

    def _tau(self, latents: Latents) -> Float[Tensor, "draws 1"]:
        return self._precision(latents).double().reshape(-1, 1)

    def _levels(
        self, latents: Latents, filtered: Filtered
    ) -> tuple[Float[Tensor, " draws"], Iterator[OuterLevel]]:
        """E before any factor is eliminated, and the factors as they are eliminated."""
        sums, outcome = self.sums, self.outcome(latents)
        draws = max(len(outcome), len(filtered.variance))
        outcome = outcome.expand(draws, -1)
        z = sums.in_order(sums.z)
        columns = torch.cat([z[:, None].expand(-1, draws, -1), outcome[None]])
        white, chains = filtered.whitened(columns), filtered.chains
        products = chains.total(white[:, None] * white[None])
        inside = sums.in_order(sums.inside)[: products.shape[-1]]
        n = sums.within.shape[-1]
        by_cluster = products.new_zeros(*products.shape[:-1], n)
        by_cluster = by_cluster.index_add(-1, inside, products) + self._within(latents)
        squares = by_cluster[-1, -1].sum(-1)
        return squares, self._eliminated(latents, by_cluster)

    def _eliminated(
        self, latents: Latents, by_cluster: Float[Tensor, "columns columns draws clusters"]
    ) -> Iterator[OuterLevel]:
        sums, tau, rest = self.sums, self._tau(latents), by_cluster
        for place, factor in enumerate(sums.factors):
            scale = factor.scale_matrix(latents).double()
            scale = scale.reshape(-1, *scale.shape[-2:]).movedim(0, -1)[..., None]
            t = sums.terms[place]
            level = OuterLevel(tau, scale, rest[:t], rest[t:-1, t:])
            yield level
            if place + 1 < len(sums.factors):
                rest = by_parent(level.left, sums.parents[place], sums.clusters[place + 1])

    def _within(self, latents: Latents) -> Float[Tensor, "columns columns draws clusters"]:
        """Products within cells of Z and y - X beta."""
        sums, t = self.sums, sum(self.sums.terms)
        within = sums.within
        if "fixed_effect" not in latents or not sums.fixed:
            return within[:, :, None]
        fixed = latents["fixed_effect"].double()
        fixed = fixed.reshape(-1, fixed.shape[-1])
        # The map from the columns (Z, X, y) to (Z, y - X beta), by draw.
        draws = len(fixed)
        rows = torch.cat([fixed.new_zeros(draws, t), -fixed, fixed.new_ones(draws, 1)], 1)
        same = torch.eye(t, len(within), dtype=within.dtype, device=within.device)
        turn = torch.cat([same[..., None].expand(-1, -1, draws), rows.mT[None]])[..., None]
        return product(product(turn, within[:, :, None]), turn.transpose(0, 1))
