"""Random effects of clusters given their rows and everything else: modes, curvature, particles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.distributions.quasi_random import lattice, stretched
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Rows

__all__ = ["Conditionals", "conditionals"]


Latents = Mapping[str, Tensor]
ITERATIONS, LONGEST_STEP, CLOSE = 30, 4.0, 1e-2
# Steps in each draw, from the mode at their mean: particles make up for what is missing.
STEPS = 2
# Points for one, two, or more effects; values in one block of draws.
PARTICLES, BLOCK = (8, 16, 64), 2**23


@dataclass(frozen=True)
class Conditionals:
    """Draws of the effects of C groups of clusters given S posterior draws of everything else.

    Attributes
    ----------
    effects : Float[Tensor, "draws groups size"]
        u = L z.
    evidence : Float[Tensor, "draws groups"]
        log p(y of the group's rows | everything else in the draw).
    efficiency : Float[Tensor, "groups"]
        Mean over draws of the particles' effective number over their number; 1 if exact.

    Examples
    --------
    ``conditionals(model, latents, rows, base, design, lower, place, 3).evidence.mean(0)``
    """

    effects: Float[Tensor, "draws groups size"]
    evidence: Float[Tensor, "draws groups"]
    efficiency: Float[Tensor, " groups"]


@torch.no_grad()
def conditionals(
    model: MixedEffects,
    latents: Latents,
    rows: Rows,
    base: Float[Tensor, "draws rows columns"],
    design: Float[Tensor, "rows size columns"],
    lower: Float[Tensor, "draws size size"],
    place: Int[Tensor, " rows"],
    groups: int,
    noise: Float[Tensor, "draws groups size"] | None = None,
) -> Conditionals:
    r"""p(u_c | y_c, everything else) of groups of clusters that share no rows.

    .. math:: \eta_i = base_i + s \, Z_i^\top L z_{c(i)}, \quad z_c \sim N(0, I)

    Newton's method finds the mode of z in every draw. For gaussian outcomes that gives the exact
    posterior, :math:`N(m, Q^{-1})` with :math:`Q = I + L^\top Z^\top W Z L`; for others particles
    about it, on lattices with stretched tails, are weighted by the likelihood and one is picked.

    Parameters
    ----------
    latents : mapping of str to Tensor
        Posterior draws, for the dispersion.
    rows : Rows
        The rows, with outcomes.
    base : Tensor
        Predictor without these effects; 1 in the place of draws if all have the same.
    design : Tensor
        Z, the columns of a group's effects.
    lower : Tensor
        L, block-diagonal over the group's clusters.
    place : Int[Tensor, "rows"]
        Each row's group.
    groups : int
        C.
    noise : Tensor, optional
        Standard normal noise for exact draws.
    """
    model_draws = _dispersion(model, latents)
    n = max(len(base), len(lower), 1 if model_draws is None else len(model_draws))
    if noise is not None:
        n = max(n, len(noise))
    size, columns = design.shape[1:]
    exact = model.family.name == "gaussian"
    particles = 1 if exact else PARTICLES[min(size, len(PARTICLES)) - 1]
    width = max(size * size + size * columns, particles * columns)
    step = max(1, BLOCK // (max(1, len(rows), groups) * width))
    start = None
    if not exact:  # from the mode at the mean of all draws, a few steps are left in each
        middle = _Problem(
            model,
            None if model_draws is None else model_draws.mean(0, keepdim=True),
            rows,
            base.mean(0, keepdim=True),
            design,
            lower.mean(0, keepdim=True),
            place,
            groups,
        )
        start = middle.mode(base.new_zeros(1, groups, size), ITERATIONS)[0]
    pieces = []
    for first in range(0, n, step):
        part = slice(first, min(first + step, n))

        def some(values: Tensor | None, part: slice = part) -> Tensor | None:
            return values if values is None or len(values) == 1 else values[part]

        count = part.stop - part.start
        bases, scales = some(base), some(lower)
        assert bases is not None  # for mypy: neither is None
        assert scales is not None
        problem = _Problem(model, some(model_draws), rows, bases, design, scales, place, groups)
        begin = (
            base.new_zeros(count, groups, size) if start is None else start.expand(count, -1, -1)
        )
        mode, root = problem.mode(begin.clone(), 1 if exact else STEPS)
        pieces.append(problem.draw(mode, root, particles, some(noise)))
    effects, evidence, share = (torch.cat(one) for one in zip(*pieces, strict=True))
    return Conditionals(effects, evidence, share.mean(0))


@dataclass(frozen=True)
class _Problem:
    """The rows in one block of draws."""

    model: MixedEffects
    dispersion: Tensor | None
    rows: Rows
    base: Tensor
    design: Tensor
    lower: Tensor
    place: Tensor
    groups: int

    def log_likelihood(self, eta: Float[Tensor, "... rows columns"]) -> Float[Tensor, "... rows"]:
        known: dict[str, Tensor] = {}
        if self.dispersion is not None:
            shape = (-1, *(1,) * (eta.dim() - 2))
            known = {str(self.model.family.dispersion_name): self.dispersion.reshape(shape)}
        value = self.model.density(eta, known, self.rows).log_prob(self.rows.outcome())
        if self.rows.weights is None:
            return value
        counted = value.new_zeros(()).where(self.rows.weights == 0, value)
        return self.rows.weights * counted

    def predictor(self, z: Float[Tensor, "draws ... groups size"]) -> Tensor:
        """eta, "draws ... rows columns"."""
        lower, base = self.lower, self.base
        if z.dim() == 4:
            lower, base = lower[:, None], base[:, None]
        u = z @ lower.mT
        spread = self.model.data_facts().spread
        mine = u.index_select(-2, self.place)  # "draws ... rows size"
        return base + spread * torch.einsum("...rd,rdc->...rc", mine, self.design)

    def derivatives(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of log p(y, z) by z, and Q, minus the second derivative."""
        size = z.shape[-1]
        if self.model.family.name == "gaussian":
            pull, square = self._gaussian(z)
        else:
            pull, square = self._by_autograd(z)
        zero = z.new_zeros(len(z), self.groups, size)
        gradient = zero.index_add(1, self.place, pull)
        curve = z.new_zeros(len(square), self.groups, size, size)
        curve = curve.index_add(1, self.place, square)
        if self.model.family.name == "gaussian":
            curve = curve * self._precision()[:, :, None, None]
        lower = self.lower[:, None]
        gradient = (lower.mT @ gradient[..., None])[..., 0] - z
        unit = torch.eye(size, dtype=z.dtype, device=z.device)
        return gradient, lower.mT @ curve @ lower + unit

    def _precision(self) -> Float[Tensor, "draws 1"]:
        """1 / Var(y | eta) of a gaussian outcome."""
        assert self.dispersion is not None  # for mypy: the family has one
        facts = self.model.data_facts()
        return self.model.family.original_dispersion(self.dispersion, facts.spread) ** -2

    def _gaussian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's part in the gradient, and in the curvature but for the precision."""
        spread, design = self.model.data_facts().spread, self.design[..., 0]
        weight = self.rows.weights
        residual = self._precision() * (self.rows.outcome() - self.predictor(z)[..., 0])
        square = spread**2 * design[:, :, None] * design[:, None, :]
        if weight is not None:
            residual, square = weight * residual, weight[:, None, None] * square
        return spread * residual[..., None] * design, square[None]

    def _by_autograd(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's part in the gradient and the curvature by u."""
        spread = self.model.data_facts().spread
        eta = self.predictor(z)
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
        slope, weight = slope.detach() * spread, -second * spread**2
        if weight.shape[-1] == 1:
            weight = weight.clamp(min=0)
        half = torch.einsum("rdc,srce->srde", self.design, weight)
        pull = torch.einsum("rdc,src->srd", self.design, slope)
        return pull, torch.einsum("srde,rfe->srdf", half, self.design)

    def mode(self, z: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """The mode, and the Cholesky factor of Q there."""
        root = z
        for _ in range(iterations):
            gradient, precision = self.derivatives(z)
            root = torch.linalg.cholesky(precision)
            move = torch.cholesky_solve(gradient[..., None], root)[..., 0]
            # Log-links overshoot from afar.
            length = move.norm(dim=-1, keepdim=True)
            if iterations > 1:
                move = move * (LONGEST_STEP / length.clamp(min=LONGEST_STEP))
            z = z + move
            if float(length.max() if length.numel() else 0.0) < CLOSE:
                break
        return z, root

    def draw(
        self, mode: Tensor, root: Tensor, particles: int, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One effect of each group and draw, log-evidence, and particles' efficiency."""
        draws, groups, size = mode.shape
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if particles == 1:
            likelihood = self._by_group(self.log_likelihood(self.predictor(mode)))
            evidence = likelihood - 0.5 * (mode**2).sum(-1) - log_det
            normal = torch.randn_like(mode) if noise is None else noise
            z = mode + torch.linalg.solve_triangular(root.mT, normal[..., None], upper=True)[..., 0]
            return z @ self.lower.mT, evidence, torch.ones_like(evidence)
        points = torch.special.ndtri(lattice(draws, particles, (groups, size), mode))
        points, ratio = stretched(points)
        spread = torch.linalg.solve_triangular(root.mT[:, None], points[..., None], upper=True)
        z = mode[:, None] + spread[..., 0]
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


def _dispersion(model: MixedEffects, latents: Latents) -> Float[Tensor, "draws 1"] | None:
    found = latents.get(model.family.dispersion_name or "")
    return None if found is None else found.reshape(-1, 1)
