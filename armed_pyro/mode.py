"""Where the marginal posterior of the hyperparameters has its mode, and its curvature there."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.guides import Guide
from armed_pyro.importance import weigh
from armed_pyro.noise import Noise, gaussian_noise, proposal_noise
from armed_pyro.program import MixedEffects
from armed_pyro.rows import Rows, RowSource

__all__ = ["LARGEST_STEP", "particles_needed", "start_at_mode"]

# Log-likelihoods (rows times draws times particles) in one evaluation.
LARGEST_STEP = 2**21
ROUNDS = 6
MOST_REFRESHES = 30
# Largest sd of a hyperparameter (most of them are logs) that a start is given.
WIDEST = 1.5
SEARCH_SCALE = 0.1


def start_at_mode(model: MixedEffects, guide: Guide, source: RowSource) -> None:
    r"""Set q(theta) to the normal distribution at the mode of the marginal posterior.

    .. math:: \hat\theta = \arg\max_\theta \log p(\theta)
        + \sum_k \log \hat p(y_k \mid \theta), \quad
        q(\theta) = N(\hat\theta, -\nabla^2(\hat\theta)^{-1})

    with the random effects integrated out by the guide's conditional (exactly for gaussian
    outcomes with linear fixed effects, by a few particles on fixed noise otherwise), which is
    refreshed between rounds of LBFGS. Does nothing where that is no good: without nested effects,
    or with more rows than one evaluation holds.

    Parameters
    ----------
    model, guide : MixedEffects, Guide
        The program, its network settled, and its guide.
    source : RowSource
        All training rows.
    """
    hyper = guide.hyperparameters
    searchable = guide.nested() is not None or not model.factors
    if not hyper.size or not searchable or len(source) > LARGEST_STEP:
        return
    rows = source.all()
    frame = SEARCH_SCALE * torch.eye(hyper.size).to(hyper.anchor)
    before = _read(guide)
    try:
        _settle_effects(model, guide, source, rows)
        for _ in range(ROUNDS):
            guide.refresh(model, source)
            before = _read(guide)
            hyper.set_normal(before, frame)
            noise = _fixed_noise(model, guide, rows)
            best = _climb(model, guide, rows, noise)
            hyper.set_normal(best, frame)
            root = frame @ _curvature_root(model, guide, rows, noise)
            hyper.set_normal(best, root)
            frame = root
            moved = torch.linalg.solve_triangular(root, (best - before)[:, None], upper=False)
            if float(moved.detach().norm()) < 0.1:
                break
        guide.refresh(model, source)
    except (torch.linalg.LinAlgError, ArithmeticError):  # type: ignore[attr-defined]
        hyper.set_normal(before, frame)


def particles_needed(model: MixedEffects, guide: Guide, source: RowSource) -> int:
    """Particles a cluster that the bound needs: 1 where the guide's conditional is exact."""
    nested = guide.nested()
    if nested is None:
        return 1
    # Some clusters will do to tell.
    n = max(1, LARGEST_STEP // 256)
    rows = next(iter(source.chunks(n))) if len(source) > n else source.all()
    with torch.no_grad():
        noise = proposal_noise(guide, rows, 8, 16, model.reference(), stretch=False, heavy=False)
        weighted = weigh(model, guide, rows, noise)
    # Half the variance of the log-weights is what a single particle loses.
    loss = 0.5 * weighted.particles.var(1).mean(0)
    if len(rows) == len(source) and float(loss.sum()) < 0.05:
        return 1
    return 16 if len(nested.terms) == 1 else 32


@torch.no_grad()
def _settle_effects(model: MixedEffects, guide: Guide, source: RowSource, rows: Rows) -> None:
    """Refresh the guide at its start: for counts a first step overshoots, and returns 1 a step."""
    before = model.predictor(rows, guide.center(rows)).eta
    for _ in range(MOST_REFRESHES):
        guide.refresh(model, source)
        after = model.predictor(rows, guide.center(rows)).eta
        if float((after - before).abs().max()) < 0.5 * model.data_facts().spread:
            break
        before = after


def _read(guide: Guide) -> Float[Tensor, " size"]:
    with torch.no_grad():
        hyper = guide.hyperparameters
        return hyper.distribution().push(torch.zeros_like(hyper.anchor))


def _fixed_noise(model: MixedEffects, guide: Guide, rows: Rows) -> Noise:
    """Noise of all sites but the hyperparameters', the same for every theta."""
    like = model.reference()
    if guide.nested() is None:
        return gaussian_noise(guide, rows, 1, like)
    # Draws are of use only to sites that are neither hyperparameters nor nested.
    draws = 1 if len(model.factors) == 1 else 8
    particles = max(1, min(16, LARGEST_STEP // (len(rows) * draws)))
    exact = particles_exact = particles == 1
    if not exact:
        noise = proposal_noise(guide, rows, draws, 2, like, stretch=False, heavy=False)
        with torch.no_grad():
            particles_exact = float(weigh(model, guide, rows, noise).particles.var(1).max()) < 1e-6
    if particles_exact:
        return gaussian_noise(guide, rows, draws, like)
    return proposal_noise(guide, rows, draws, particles, like, heavy=False)


def _log_posterior(
    model: MixedEffects, guide: Guide, rows: Rows, noise: Noise, theta_noise: Tensor
) -> Float[Tensor, ""]:
    """log p(theta | y) up to a constant, at the theta that this noise becomes."""
    given = {**noise.values, "_theta": theta_noise}
    weighted = weigh(model, guide, rows, replace(noise, values=given))
    return (weighted.total() - weighted.hyper).mean()


def _climb(model: MixedEffects, guide: Guide, rows: Rows, noise: Noise) -> Float[Tensor, " size"]:
    """The theta with the highest posterior density."""
    point = torch.zeros(1, 1, 1, guide.hyperparameters.size).to(model.reference())
    point.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=30, tolerance_change=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -_log_posterior(model, guide, rows, noise, point)
        (point.grad,) = torch.autograd.grad(value, point)
        return value

    optimizer.step(loss)
    best = guide.hyperparameters.distribution().push(point).detach()[0, 0, 0]
    if not torch.isfinite(best).all():
        raise ArithmeticError("the marginal posterior has no finite mode")
    return best


def _curvature_root(
    model: MixedEffects, guide: Guide, rows: Rows, noise: Noise
) -> Float[Tensor, "size size"]:
    """Cholesky factor of the inverse of minus the Hessian, in units of the frame."""
    point = torch.zeros(1, 1, 1, guide.hyperparameters.size).to(model.reference())
    point.requires_grad_(True)
    value = _log_posterior(model, guide, rows, noise, point)
    (slope,) = torch.autograd.grad(value, point, create_graph=True)
    slope = slope.flatten()
    hessian = torch.stack(
        [torch.autograd.grad(one, point, retain_graph=True)[0].flatten() for one in slope]
    )
    if not torch.isfinite(hessian).all():
        raise ArithmeticError("the curvature of the marginal posterior is not finite")
    values, vectors = torch.linalg.eigh(-0.5 * (hessian + hessian.mT))
    widest = guide.hyperparameters.frame @ vectors
    least = (widest.norm(dim=0) / WIDEST) ** 2
    values = torch.maximum(values, least)
    return torch.linalg.cholesky((vectors / values) @ vectors.mT)
