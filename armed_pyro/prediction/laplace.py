"""Draws of clusters' random effects given their rows: mode, curvature and weighted particles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.distributions.quasi_random import lattice, stretched
from armed_pyro.families.family import Parameters
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.working import derivatives
from armed_pyro.rows.batch import Rows

__all__ = ["Conditional", "GroupDraws"]

# Newton's method: most iterations, longest step, and the length of step that ends it.
ITERATIONS, LONGEST_STEP, CLOSE = 30, 4.0, 1e-2
# Newton steps in each draw, from the mode at the mean of all draws. The modes may stay inexact:
# the weights of the particles correct for the error.
STEPS = 2
# Particles for one, two, or more effects; numbers in the arrays of one block of draws.
PARTICLES, BLOCK = (8, 16, 64), 2**23


@dataclass(frozen=True)
class GroupDraws:
    """Draws of the effects of C groups of clusters given S posterior draws of all other sites."""

    effects: Float[Tensor, "draws groups size"]  # u = L z
    evidence: Float[Tensor, "draws groups"]  # log p(y of the group's rows | other sites)
    efficiency: Float[Tensor, " groups"]  # effective share of the particles; 1 if exact


@dataclass(frozen=True)
class Conditional:
    r"""p(z_c | y_c, all other sites) for groups of clusters that share no rows, in every draw.

    .. math:: \eta_i = base_i + s \, Z_i^\top L z_{c(i)}, \quad z_c \sim N(0, I)

    Newton's method finds the mode of z in every draw. For quadratic families this gives the exact
    posterior, :math:`N(m, Q^{-1})` with :math:`Q = I + L^\top Z^\top W Z L`. For other families,
    particles around the mode, on lattices with stretched tails, are weighted by the likelihood, and
    one particle is drawn by these weights.

    Where all draws share a value, its first dimension may be 1.
    """

    model: MixedEffects
    parameters: Parameters  # the family's latent sites "draws 1", in standardised units
    rows: Rows
    base: Float[Tensor, "draws rows columns"]  # the predictor without these effects
    design: Float[Tensor, "rows size columns"]  # Z
    lower: Float[Tensor, "draws size size"]  # L, block-diagonal over the group's clusters
    place: Int[Tensor, " rows"]  # group of each row
    groups: int  # C

    @torch.no_grad()
    def draw(self, noise: Float[Tensor, "draws groups size"]) -> GroupDraws:
        """Draw the effects, block by block of draws; exact draws transform the normal `noise`."""
        n = max(map(len, [self.base, self.lower, noise, *self.parameters.values()]))
        size, columns = self.design.shape[1:]
        exact = self.model.family.is_quadratic
        particles = 1 if exact else PARTICLES[min(size, len(PARTICLES)) - 1]
        width = max(size * size + size * columns, particles * columns)
        step = max(1, BLOCK // (max(1, len(self.rows), self.groups) * width))
        start = self.base.new_zeros(1, self.groups, size)
        if not exact:  # the mode at the mean of all draws is a few Newton steps from that of each
            middle = self._with(lambda values: values.mean(0, keepdim=True))
            start = middle.mode(start, ITERATIONS)[0]
        pieces = []
        for first in range(0, n, step):

            def in_block(values: Tensor, first: int = first) -> Tensor:
                return values if len(values) == 1 else values[first : first + step]

            block, count = self._with(in_block), min(step, n - first)
            begin = start.expand(count, -1, -1).clone()
            mode, root = block.mode(begin, 1 if exact else STEPS)
            pieces.append(
                block.exact_draw(mode, root, in_block(noise))
                if particles == 1
                else block.particle_draw(mode, root, particles)
            )
        effects, evidence, share = (torch.cat(blocks) for blocks in zip(*pieces, strict=True))
        return GroupDraws(effects, evidence, share.mean(0))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Conditional:
        """The same problem with everything that has draws changed."""
        parameters = {name: change(value) for name, value in self.parameters.items()}
        return replace(
            self, parameters=parameters, base=change(self.base), lower=change(self.lower)
        )

    def log_likelihood(self, eta: Float[Tensor, "... rows columns"]) -> Float[Tensor, "... rows"]:
        shape = (-1, *(1,) * (eta.dim() - 2))
        latents = {name: value.reshape(shape) for name, value in self.parameters.items()}
        value = self.model.density(eta, latents, self.rows).log_prob(self.rows.outcome())
        frequencies = self.model.frequencies(self.rows)
        if frequencies is None:
            return value
        return frequencies * value.new_zeros(()).where(frequencies == 0, value)

    def predictor(self, z: Float[Tensor, "draws ... groups size"]) -> Tensor:
        """Return eta, with dimensions "draws ... rows columns"."""
        lower, base = self.lower, self.base
        if z.dim() == 4:
            lower, base = lower[:, None], base[:, None]
        u = z @ lower.mT
        spread = self.model.data_facts().spreads(u)
        by_row = u.index_select(-2, self.place)  # "draws ... rows size"
        return base + spread * torch.einsum("...rd,rdc->...rc", by_row, self.design)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of log p(y, z) in z, and Q, its negative Hessian."""
        size = z.shape[-1]
        if self.model.family.is_quadratic:
            pull, square = self._quadratic(z)
        else:
            pull, square = self._by_autograd(z)
        zero = z.new_zeros(len(z), self.groups, size)
        gradient = zero.index_add(1, self.place, pull)
        curve = z.new_zeros(len(square), self.groups, size, size)
        curve = curve.index_add(1, self.place, square)
        if self.model.family.is_quadratic:
            curve = curve * self._precision()[:, :, None, None]
        lower = self.lower[:, None]
        gradient = (lower.mT @ gradient[..., None])[..., 0] - z
        unit = torch.eye(size, dtype=z.dtype, device=z.device)
        return gradient, lower.mT @ curve @ lower + unit

    def _precision(self) -> Float[Tensor, "draws 1"]:
        """1 / Var(y | eta) of a quadratic family, on the scale of the outcome."""
        family = self.model.family
        precision = family.precision(self.model.family_parameters(self.parameters))
        if precision is None:
            raise ValueError(f"family {family.name!r} is quadratic, but gives no precision")
        return precision.reshape(-1, 1)

    def _quadratic(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's part of the gradient, and of the curvature divided by the precision."""
        spread, design = self.model.data_facts().spread, self.design[..., 0]
        weight = self.rows.weights  # frequencies and precisions alike
        residual = self._precision() * (self.rows.outcome() - self.predictor(z)[..., 0])
        square = spread**2 * design[:, :, None] * design[:, None, :]
        if weight is not None:
            residual, square = weight * residual, weight[:, None, None] * square
        return spread * residual[..., None] * design, square[None]

    def _by_autograd(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's part of the gradient and of the curvature, in u."""
        eta = self.predictor(z)
        spread = self.model.data_facts().spreads(eta)
        if self.model.family.predicted:
            slope, second = self._expected_curvature(eta)
            pull = torch.einsum("rdc,src->srd", self.design, slope * spread)
            half = torch.einsum("rdc,src->srdc", self.design, second * spread**2)
            return pull, torch.einsum("srdc,rfc->srdf", half, self.design)
        with torch.enable_grad():
            eta = eta.detach().requires_grad_(True)
            value = self.log_likelihood(eta)
            (slope,) = torch.autograd.grad(value.sum(), eta, create_graph=True)
            second = torch.stack(
                [
                    torch.autograd.grad(slope[..., column].sum(), eta, retain_graph=True)[0]
                    for column in range(eta.shape[-1])
                ],
                -2,
            )
        slope, weight = slope.detach() * spread, -second * (spread[:, None] * spread)
        if weight.shape[-1] == 1:
            weight = weight.clamp(min=0)
        half = torch.einsum("rdc,srce->srde", self.design, weight)
        pull = torch.einsum("rdc,src->srd", self.design, slope)
        return pull, torch.einsum("srde,rfe->srdf", half, self.design)

    def _expected_curvature(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and Fisher information in eta: the curvature itself may be negative."""
        latents = {name: value[..., None] for name, value in self.parameters.items()}
        slope, information = derivatives(self.model, eta, latents, self.rows)
        frequencies = self.model.frequencies(self.rows)
        if frequencies is None:
            return slope, information
        counts = frequencies[:, None]
        return torch.where(counts == 0, 0.0, counts * slope), counts * information

    def mode(self, z: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """The mode of z, and the Cholesky factor of Q at the mode."""
        root = z
        for _ in range(iterations):
            gradient, precision = self.derivatives(z)
            root = torch.linalg.cholesky(precision)
            move = torch.cholesky_solve(gradient[..., None], root)[..., 0]
            # With a log link, full Newton steps overshoot far from the mode.
            length = move.norm(dim=-1, keepdim=True)
            if iterations > 1:
                move = move * (LONGEST_STEP / length.clamp(min=LONGEST_STEP))
            z = z + move
            if float(length.max() if length.numel() else 0.0) < CLOSE:
                break
        return z, root

    def exact_draw(self, mode: Tensor, root: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Effects, log-evidence and efficiency of every group and draw, of a quadratic family."""
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        likelihood = self._by_group(self.log_likelihood(self.predictor(mode)))
        evidence = likelihood - 0.5 * (mode**2).sum(-1) - log_det
        z = mode + torch.linalg.solve_triangular(root.mT, noise[..., None], upper=True)[..., 0]
        return z @ self.lower.mT, evidence, torch.ones_like(evidence)

    def particle_draw(self, mode: Tensor, root: Tensor, particles: int) -> tuple[Tensor, ...]:
        """Effects, log-evidence and efficiency of every group and draw, by weighted particles."""
        draws, groups, size = mode.shape
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        points = torch.special.ndtri(lattice(draws, particles, (groups, size), mode))
        points, ratio = stretched(points)
        offset = torch.linalg.solve_triangular(root.mT[:, None], points[..., None], upper=True)
        z = mode[:, None] + offset[..., 0]
        log_weight = self._by_group(self.log_likelihood(self.predictor(z)))
        log_weight = log_weight - 0.5 * (z**2).sum(-1) + 0.5 * (points**2).sum(-1)
        log_weight = log_weight - log_det[:, None] - ratio
        evidence = torch.logsumexp(log_weight, 1) - math.log(particles)
        weight = torch.softmax(log_weight, 1)
        share = 1 / (weight**2).sum(1) / particles
        gumbel = -torch.log(-torch.log(torch.rand_like(log_weight).clamp(1e-12, 1 - 1e-7)))
        index = (log_weight + gumbel).argmax(1)[:, None, :, None].expand(-1, 1, -1, size)
        return z.gather(1, index)[:, 0] @ self.lower.mT, evidence, share

    def _by_group(self, values: Float[Tensor, "draws ... rows"]) -> Tensor:
        zero = values.new_zeros(*values.shape[:-1], self.groups)
        return zero.index_add(-1, self.place, values)
