"""Random effects inside a network: filters scaled and shifted by cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from armed_pyro.networks.filters import modulated
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import (
    Latents,
    effects_at,
    filter_effects,
    linear_predictor,
    reaches_predictor,
)
from armed_pyro.random_effects.design import by_column
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["curvature", "mean_draws", "reconstruction_slopes", "sensitivities"]


# Effects up to which a curvature is exact, and beyond that the random combinations of a row's
# values that stand for all of them.
MOST_EXACT, COMBINATIONS = 16, 8


def sensitivities(
    model: MixedEffects,
    rows: Rows,
    factor: Factor,
    activations: Mapping[str, Tensor],
    point: Latents,
) -> Float[Tensor, "rows terms columns"]:
    r"""Z: what an effect of a row's cluster adds to the predictor, in units of the spread.

    phi for effects on the predictor. It is not linear in those on filters, which get its gradient
    where the latent sites are those of `point`: fixed effects, if there are any, and effects that
    may be left out for zero.
    """
    columns = len(model.data_facts().columns)
    linear = by_column(factor.design(rows.x, activations), columns)
    if not factor.filters:
        return linear
    if not reaches_predictor(model):
        return pad(linear, (0, 0, 0, len(factor.terms) - factor.n_linear))
    mine = linear.new_zeros(len(rows), len(factor.terms) - factor.n_linear)
    if factor.effect_site in point:
        mine = filter_effects(factor, point[factor.effect_site], rows)
    fixed = {name: value for name, value in point.items() if name == "fixed_effect"}
    with torch.enable_grad():
        mine = mine.detach().clone().requires_grad_(True)
        with modulated(model.network, effects_at(factor, mine)):
            ran = model.run_network(replace(rows, computed=None), whole=True)
            eta = linear_predictor(model, rows, *ran, fixed)
        slopes = [
            torch.autograd.grad(
                eta[..., column].sum(), mine, retain_graph=True, create_graph=rows.x.requires_grad
            )[0]
            for column in range(columns)
        ]
    spread = model.data_facts().spread
    return torch.cat([linear, torch.stack(slopes, -1) / spread], 1)


def reconstruction_slopes(
    model: MixedEffects, rows: Rows, point: Latents
) -> Iterator[tuple[Factor, Float[Tensor, "rows terms"], Float[Tensor, "rows combinations terms"]]]:
    r"""What the other outcomes' log-likelihoods say of the effects inside the network.

    For each factor with such effects their slope :math:`J^\top r`, and vectors v with
    :math:`\sum v v^\top = J^\top W J`, the Gauss-Newton curvature, where the latent sites are those
    of `point`, divided by tau. With few effects there is a v for every value of a row; with more,
    a few combinations of the values with random signs have that sum as their expectation.
    """
    rebuilt = [one for one in model.others if one.at not in model.unreached]
    own = [factor for factor in model.factors if factor.filters] if rebuilt else []
    if not own:
        return
    facts, tau = model.data_facts(), model.precision(point).mean()
    counts = rows.x.new_ones(len(rows)) if rows.weights is None else rows.weights
    with torch.enable_grad():
        mine = [
            filter_effects(factor, point[factor.effect_site], rows)
            if factor.effect_site in point
            else rows.x.new_zeros(len(rows), len(factor.terms) - factor.n_linear)
            for factor in own
        ]
        mine = [one.detach().clone().requires_grad_(True) for one in mine]
        pairs = zip(own, mine, strict=True)
        blocks = [pair for factor, one in pairs for pair in effects_at(factor, one)]
        with modulated(model.network, blocks):
            _, activations = model.run_network(replace(rows, computed=None), whole=True)
        # Side by side: those of every factor.
        slope, roots = rows.x.new_zeros(len(rows), sum(one.shape[1] for one in mine)), []
        for one in rebuilt:
            mean = activations[one.at]
            sd = facts.feature_spread * point[one.sd_site].mean()
            residual, root = one.information(mean.detach(), sd, rows)
            over = (...,) + (None,) * (mean.dim() - 1)
            slope = slope + _pulled(mean, mine, counts[over] * residual / tau)
            scale = (counts / tau).sqrt() * root
            every = slope.shape[1] <= MOST_EXACT
            found = _jacobian(mean, mine) if every else _combined(mean, mine)
            roots.append(scale[:, None, None] * found)
    widths = [one.shape[1] for one in mine]
    parts = zip(own, slope.split(widths, 1), torch.cat(roots, 1).split(widths, 2), strict=True)
    for factor, first, second in parts:
        yield factor, pad(first, (factor.n_linear, 0)), pad(second, (factor.n_linear, 0))


def _pulled(
    mean: Tensor, mine: Sequence[Tensor], cotangent: Tensor, *, again: bool = False
) -> Float[Tensor, "rows terms"]:
    """J' cotangent of every row."""
    found = torch.autograd.grad(
        mean, list(mine), cotangent, retain_graph=True, create_graph=again, materialize_grads=True
    )
    return torch.cat(found, 1)


def _jacobian(mean: Tensor, mine: Sequence[Tensor]) -> Float[Tensor, "rows values terms"]:
    """J, a column an effect: J'v is linear in v, and its derivatives by v are J's columns."""
    v = torch.zeros_like(mean).requires_grad_(True)
    pulled = _pulled(mean, mine, v, again=True)
    columns = [torch.autograd.grad(one.sum(), v, retain_graph=True)[0] for one in pulled.unbind(1)]
    return torch.stack([one.flatten(1) for one in columns], -1)


def _combined(mean: Tensor, mine: Sequence[Tensor]) -> Float[Tensor, "rows combinations terms"]:
    """Rows of J combined with random signs; the products of the results have mean J'J."""
    signs = [2.0 * torch.randint_like(mean, 2) - 1 for _ in range(COMBINATIONS)]
    return torch.stack([_pulled(mean, mine, one) for one in signs], 1) / COMBINATIONS**0.5


def mean_draws(model: MixedEffects, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means over draws of random effects and latent fixed effects; points are left as they are."""
    means = {
        factor.effect_site: latents[factor.effect_site]
        for factor in model.factors
        if factor.effect_site in latents
    }
    means = {site: value.mean(0) if value.dim() == 3 else value for site, value in means.items()}
    if "fixed_effect" in latents:
        means["fixed_effect"] = (
            latents["fixed_effect"].reshape(-1, len(model.fixed_terms())).mean(0)
        )
    return means


def curvature(
    model: MixedEffects, source: RowSource, latents: Mapping[str, Tensor], size: int
) -> Iterator[tuple[Rows, Tensor, Tensor, Mapping[str, Tensor]]]:
    """Rows in blocks, with the mean over draws of their log-likelihood's curvature and slope.

    Yields
    ------
    rows : Rows
        At most `size` rows.
    weight : Float[Tensor, "rows columns"]
        W, minus the second derivative by each column of the predictor, divided by tau.
    residual : Float[Tensor, "rows columns"]
        r, the first derivative, divided by tau.
    activations : mapping of str to Tensor
        Tapped activations.
    """
    training = model.training
    model.eval()
    spread, tau = model.data_facts().spread, model.precision(latents)[..., None]
    for rows in source.chunks(size):
        with torch.no_grad():
            predictor = model.predictor(rows, latents)
        with torch.enable_grad():
            eta = predictor.eta.detach().requires_grad_(True)
            log_prob = model.density(eta, latents, rows).log_prob(rows.outcome())
            (slope,) = torch.autograd.grad(log_prob.sum(), eta, create_graph=True)
            second = [
                torch.autograd.grad(slope[..., column].sum(), eta, retain_graph=True)[0]
                for column in range(eta.shape[-1])
            ]
        own = torch.stack([one[..., column] for column, one in enumerate(second)], -1)
        weight = (-own * spread**2 / tau).reshape(-1, *eta.shape[-2:]).mean(0).clamp(min=1e-4)
        residual = (slope.detach() * spread / tau).reshape(-1, *eta.shape[-2:]).mean(0)
        if rows.weights is not None:
            # After the clamp, or rows of weight 0 would count.
            weight, residual = rows.weights[:, None] * weight, rows.weights[:, None] * residual
        yield rows, weight, residual, predictor.activations
    model.train(training)
