"""Derivatives of predictor and log-likelihood, by which guides linearise the program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from armed_pyro.networks.taps import modulated
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import linear_predictor, reaches_predictor
from armed_pyro.program.working import derivatives, gradients
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.design import by_column
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = [
    "curvature",
    "mean_draws",
    "mean_fixed_effects",
    "reconstruction_slopes",
    "sensitivities",
]

# Up to MOST_EXACT effects, the curvature of a reconstruction is exact; beyond that it is estimated
# from this number of random combinations of a row's values.
MOST_EXACT, COMBINATIONS = 16, 8


def sensitivities(
    model: MixedEffects, rows: Rows, factor: Factor, activations: Latents, point: Latents
) -> Float[Tensor, "rows terms columns"]:
    r"""Z: derivative of each row's predictor in its cluster's effects, in units of the spread.

    It is phi for effects on the predictor. The predictor is not linear in effects on filters;
    for these Z is the gradient at `point`, which holds fixed effects, if they are latent, and
    random effects "clusters terms". A factor that is left out counts as zero. `activations` are
    those without effects inside.
    """
    columns = len(model.data_facts().columns)
    linear = by_column(factor.design(rows.slope_inputs(), activations), columns)
    if not factor.filters:
        return linear
    if not reaches_predictor(model):
        return pad(linear, (0, 0, 0, len(factor.terms) - factor.n_linear))
    fixed = {name: value for name, value in point.items() if name == "fixed_effect"}
    with torch.enable_grad():
        effects = _leaf(factor.filter_effects(point, rows))
        with modulated(model.network, factor.by_layer(effects)):
            output, tapped = model.run_network(replace(rows, computed=None), whole=True)
            eta = linear_predictor(model, rows, output, tapped, fixed)
        slopes = gradients(eta, effects, create_graph=rows.x.requires_grad)
    spread = model.data_facts().spread
    return torch.cat([linear, torch.stack(slopes, -1) / spread], 1)


def reconstruction_slopes(
    model: MixedEffects, rows: Rows, point: Latents
) -> Iterator[tuple[Factor, Float[Tensor, "rows terms"], Float[Tensor, "rows combinations terms"]]]:
    r"""Slope and curvature of the other outcomes' log-likelihoods in the effects inside.

    With J the derivative of an outcome's mean in these effects, r its residual and W its
    precision, they are :math:`J^\top r` and the Gauss-Newton curvature :math:`J^\top W J`, both
    at `point` and divided by tau. The curvature comes as vectors v with
    :math:`\sum v v^\top = J^\top W J`. With few effects there is one v for every value of a row.
    With more, a few combinations of the values with random signs have that sum as expectation.

    Each factor with effects inside is yielded with its slope and vectors v, which are zero for
    effects on the predictor; none is if no other outcome depends on them.
    """
    rebuilt = [other for other in model.others if other.tap not in model.unreached]
    inside = [factor for factor in model.factors if factor.filters] if rebuilt else []
    if not inside:
        return
    facts, tau = model.data_facts(), model.precision(point).mean()
    frequencies = model.frequencies(rows)
    counts = tau.new_ones(len(rows)) if frequencies is None else frequencies
    with torch.enable_grad():
        effects = [_leaf(factor.filter_effects(point, rows)) for factor in inside]
        pairs = zip(inside, effects, strict=True)
        blocks = [block for factor, value in pairs for block in factor.by_layer(value)]
        with modulated(model.network, blocks):
            _, activations = model.run_network(replace(rows, computed=None), whole=True)
        # The terms of all factors, side by side.
        slope, roots = tau.new_zeros(len(rows), sum(value.shape[1] for value in effects)), []
        for other in rebuilt:
            mean = activations[other.tap]
            sd = facts.feature_spread * point[other.sd_site].mean()
            residual, root = other.information(mean.detach(), sd, rows)
            over = (...,) + (None,) * (mean.dim() - 1)
            slope = slope + _pulled_back(mean, effects, counts[over] * residual / tau)
            scale = (counts / tau).sqrt() * root
            exact = slope.shape[1] <= MOST_EXACT
            jacobian = _jacobian(mean, effects) if exact else _combined(mean, effects)
            roots.append(scale[:, None, None] * jacobian)
    widths = [value.shape[1] for value in effects]
    parts = zip(inside, slope.split(widths, 1), torch.cat(roots, 1).split(widths, 2), strict=True)
    for factor, first, second in parts:
        yield factor, pad(first, (factor.n_linear, 0)), pad(second, (factor.n_linear, 0))


def _leaf(effects: Tensor) -> Tensor:
    """A copy with respect to which gradients are taken."""
    return effects.detach().clone().requires_grad_(True)


def _pulled_back(
    mean: Tensor, effects: Sequence[Tensor], cotangent: Tensor, *, create_graph: bool = False
) -> Float[Tensor, "rows terms"]:
    """J' cotangent of every row, with the effects of all factors side by side."""
    options = {"retain_graph": True, "create_graph": create_graph, "materialize_grads": True}
    return torch.cat(torch.autograd.grad(mean, list(effects), cotangent.to(mean), **options), 1)


def _jacobian(mean: Tensor, effects: Sequence[Tensor]) -> Float[Tensor, "rows values terms"]:
    """J, one column per effect: J'v is linear in v, and its derivatives in v are J's columns."""
    v = torch.zeros_like(mean).requires_grad_(True)
    pulled = _pulled_back(mean, effects, v, create_graph=True)
    return torch.stack([column.flatten(1) for column in gradients(pulled, v)], -1)


def _combined(mean: Tensor, effects: Sequence[Tensor]) -> Float[Tensor, "rows combinations terms"]:
    """Combinations of J's rows with random signs, whose outer products have mean J'J in sum."""
    signs = [2.0 * torch.randint_like(mean, 2) - 1 for _ in range(COMBINATIONS)]
    return torch.stack([_pulled_back(mean, effects, sign) for sign in signs], 1) / COMBINATIONS**0.5


def mean_draws(model: MixedEffects, latents: Latents) -> dict[str, Tensor]:
    """Means over draws of random effects "clusters terms" and of latent fixed effects "terms".

    Points, without draws, stay as they are. Other sites are left out.
    """
    sites = [factor.effect_site for factor in model.factors if factor.effect_site in latents]
    means = {site: latents[site] for site in sites}
    means = {site: value.mean(0) if value.dim() == 3 else value for site, value in means.items()}
    return means | mean_fixed_effects(model, latents)


def mean_fixed_effects(model: MixedEffects, latents: Latents) -> dict[str, Tensor]:
    """Mean over draws of the latent fixed effects "terms"; empty if there are none."""
    if "fixed_effect" not in latents:
        return {}
    fixed = latents["fixed_effect"].reshape(-1, len(model.fixed_terms()))
    return {"fixed_effect": fixed.mean(0)}


def curvature(
    model: MixedEffects, source: RowSource, latents: Latents, size: int
) -> Iterator[tuple[Rows, Tensor, Tensor, Mapping[str, Tensor]]]:
    """Blocks of at most `size` rows with W, r "rows columns" and their tapped activations.

    W is minus the second derivative of the log-likelihood in each column of the predictor, r the
    first derivative; both are divided by tau and averaged over draws. The network is in evaluation
    mode meanwhile.
    """
    training = model.training
    model.eval()
    spread, tau = model.data_facts().spread, model.precision(latents)[..., None]
    for rows in source.chunks(size):
        with torch.no_grad():
            predictor = model.predictor(rows, latents)
        slope, minus_second = derivatives(model, predictor.eta, latents, rows)
        shape = predictor.eta.shape[-2:]
        weight = (minus_second * spread**2 / tau).reshape(-1, *shape).mean(0).clamp(min=1e-4)
        residual = (slope * spread / tau).reshape(-1, *shape).mean(0)
        frequencies = model.frequencies(rows)
        if frequencies is not None:
            # After the clamp: before it, rows of frequency 0 would count.
            weight, residual = frequencies[:, None] * weight, frequencies[:, None] * residual
        yield rows, weight, residual, predictor.activations
    model.train(training)
