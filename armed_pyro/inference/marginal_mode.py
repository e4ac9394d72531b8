"""Mode of the marginal posterior of the hyperparameters, and its curvature there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.guides.base import Guide
from armed_pyro.guides.closed_form import MarginalLikelihood
from armed_pyro.guides.noise import no_noise, proposal_noise
from armed_pyro.inference.marginal_weights import marginal_draws
from armed_pyro.inference.nested_weights import bound_noise, nested_from, weigh
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.inputs import LazyInputs
from armed_pyro.rows.passes import Pieces
from armed_pyro.rows.source import RowSource

__all__ = ["LARGEST_STEP", "climb_to_mode", "particles_needed", "start_at_mode"]

# Log-likelihoods (rows times draws times particles) in one evaluation.
LARGEST_STEP = 2**21
ROUNDS = 6
NEAR = 0.1  # posterior sds
MOST_REFRESHES = 30
# Multiplications of one density beyond which its curvature is made of differences of gradients:
# with a matrix of 1,100 random effects these take a quarter of the time of second derivatives.
DIFFERENCED, DIFFERENCE = 2**25, 0.03  # units of the frame
# Largest sd of a hyperparameter at the start; most hyperparameters are logarithms.
WIDEST = 1.5
SEARCH_SCALE = 0.1
# Nats that a step of the search must gain; coarse, because a Newton step follows.
CLIMBED = 3e-3
# More rows than SEARCHED are searched in a sample of at least FEWEST_SEARCHED whole clusters;
# up to NEWTON_STEPS lead from the sample's mode to the mode of all rows.
SEARCHED, FEWEST_SEARCHED, NEWTON_STEPS = 2**18, 100, 5

# Hyperparameters per row above which no mode is searched.
INTERPOLATING = 0.75


def start_at_mode(
    model: MixedEffects,
    guide: Guide,
    source: RowSource,
    closed: MarginalLikelihood | None = None,
    rounds: int = ROUNDS,
) -> None:
    r"""Set q(theta) to the normal distribution at the mode of the marginal posterior.

    .. math:: \hat\theta = \arg\max_\theta \log p(\theta)
        + \sum_k \log \hat p(y_k \mid \theta), \quad
        q(\theta) = N(\hat\theta, -\nabla^2(\hat\theta)^{-1})

    with the random effects integrated out: in closed form, if `closed` gives log p(y | theta), or
    by the guide's conditional, with a few particles on fixed noise unless it is exact. The
    conditional is refreshed between `rounds` of LBFGS, at most. The guide stays unchanged if it has
    random effects but no nested factor, if effects inside the network make the network run on many
    rows, or if there are nearly as many hyperparameters as rows.

    With `closed`, no row is read. Otherwise, rows that do not fit into one evaluation are read in
    pieces. With a single factor and very many rows the search uses a sample of whole clusters. A
    few Newton steps, with the gradient of all rows and the curvature of the sample, then lead to
    the mode of all rows (Bollapragada, Byrd, Nocedal 2019).
    """
    hyper = guide.hyperparameters
    grouped = guide.nested() is not None or guide.particles() is not None
    searchable = closed is not None or grouped or not model.factors
    # With effects inside the network, the search would run it hundreds of times on all rows.
    affordable = not modulates(model) or len(source) * row_cost(model) <= LARGEST_STEP
    # With nearly as many coefficients as rows the density has no mode: it grows without bound as
    # the rows are interpolated and the residual sd falls to 0.
    interpolating = hyper.size > INTERPOLATING * len(source)
    if not hyper.size or not searchable or not affordable or interpolating:
        return
    frame = torch.diag(_first_scale(model, guide, source))
    before = _center(guide)
    try:
        searched, sample = source, None
        if closed is None:
            searched, sample = _searched(model, guide, source)
        _start_effects(model, guide, searched)
        exact = closed is not None or guide.exact(model)
        known = before
        for round_ in range(rounds):
            if not exact:
                guide.refresh(model, searched)
            before = _center(guide)
            hyper.set_normal(before, frame)
            posterior = _Posterior(model, guide, searched, sample, closed)
            best = posterior.climb()
            hyper.set_normal(best, frame)
            if exact and round_ and _distance(known, best, frame) < NEAR:
                break  # The last curvature still holds at this mode.
            known, (root, step) = best, posterior.curvature()
            frame = frame @ root
            if float(step.norm()) < 1:
                best = best + frame @ step
            hyper.set_normal(best, frame)
            # A moved mode moves the pseudo-observations of an approximate conditional.
            if (float(step.norm()) if exact else _distance(before, best, frame)) < NEAR:
                break
        if sample is not None:
            _newton_steps(model, guide, source, frame)
        elif not exact:
            guide.refresh(model, source)
    except (torch.linalg.LinAlgError, ArithmeticError):  # type: ignore[attr-defined]
        hyper.set_normal(before, frame)


def climb_to_mode(
    model: MixedEffects, guide: Guide, source: RowSource, closed: MarginalLikelihood | None = None
) -> float:
    r"""Move q(theta) to the mode near its centre: :math:`\max_\theta \log p(\theta, y)`.

    Random effects are integrated out as by `start_at_mode`, which has to come first, as it sets
    the units of the search. The conditional of the random effects is refreshed once.
    """
    hyper, before = guide.hyperparameters, _center(guide)
    frame = hyper.frame.detach().clone()
    hyper.set_normal(before, frame)
    if closed is None:
        guide.refresh(model, source)
    posterior = _Posterior(model, guide, source, None, closed)
    try:
        if hyper.size:
            hyper.set_normal(posterior.climb(), frame)
    except ArithmeticError:
        hyper.set_normal(before, frame)
    with torch.no_grad():
        return float(sum(posterior.parts(posterior.point())))


def particles_needed(model: MixedEffects, guide: Guide, source: RowSource) -> int:
    """Particles per cluster that the bound needs; 1 if the guide's conditional is exact."""
    nested = guide.nested()
    if guide.particles() is not None:
        noise = proposal_noise(guide, source.all(), 8, 16, model.reference(), heavy=False)
        with torch.no_grad():
            weighted = weigh(model, guide, source.all(), noise)
        return 1 if float(0.5 * weighted.particles.var(1).mean(0).sum()) < 0.05 else 16
    if nested is None:
        return 1
    # A sample of clusters is enough to estimate the variance.
    clusters = len(source.counts[nested.name])
    share = max(1, clusters * (LARGEST_STEP // 256) // len(source))
    if share < clusters:
        chosen = torch.arange(share, device=source.like.device) * clusters // share
        rows = source.whole_clusters(nested.name, chosen)
    else:
        rows = source.all()
    # An exact conditional is exact for every theta, so one draw of theta shows it.
    draws, like = 1 if guide.exact(model) else 8, model.reference()
    with torch.no_grad():
        noise = proposal_noise(guide, rows, draws, 16, like, stretch=False, heavy=False)
        weighted = weigh(model, guide, rows, noise)
    # A single particle lowers the bound by half the variance of the log-weights.
    loss = 0.5 * weighted.particles.var(1).mean(0)
    if float(loss.mean()) * clusters < 0.05:
        return 1
    return 16 if len(nested.terms) == 1 else 32


@torch.no_grad()
def _start_effects(model: MixedEffects, guide: Guide, source: RowSource) -> None:
    """Refresh q(u | theta) until its centre stops moving: for counts a first step overshoots."""
    if guide.exact(model):
        guide.refresh(model, source)
        return
    rows = source.all()
    before = model.predictor(rows, guide.center(rows)).eta
    for _ in range(MOST_REFRESHES):
        guide.refresh(model, source)
        after = model.predictor(rows, guide.center(rows)).eta
        if float((after - before).abs().max()) < 0.5 * model.data_facts().spread:
            break
        before = after


def _first_scale(model: MixedEffects, guide: Guide, source: RowSource) -> Float[Tensor, " size"]:
    """Search units of about n^-1/2, the sd of a parameter that n clusters or rows inform."""
    sizes = {factor.sd_site: len(source.counts[factor.name]) for factor in model.factors}
    clusters = [len(source.counts[factor.name]) for factor in model.clustered_factors]
    fewest = min([len(source), *clusters])
    of_rows = ["fixed_effect", *(parameter.name for parameter in model.family.parameters)]
    sizes |= dict.fromkeys(of_rows, len(source))
    scale = torch.ones_like(guide.hyperparameters.anchor)
    for site in guide.hyperparameters.sites:
        scale[site.start : site.stop] = sizes.get(site.name, 1) ** -0.5
        if site.name == "fixed_effect":
            # The factor with the fewest clusters limits the precision of an intercept.
            for i, term in enumerate(model.fixed_terms()):
                if term.startswith("Intercept"):
                    scale[site.start + i] = fewest**-0.5
    return scale.clamp(max=SEARCH_SCALE)


def _distance(start: Tensor, end: Tensor, frame: Tensor) -> float:
    moved = torch.linalg.solve_triangular(frame, (end - start)[:, None], upper=False)
    return float(moved.norm())


def _center(guide: Guide) -> Float[Tensor, " size"]:
    with torch.no_grad():
        hyper = guide.hyperparameters
        return hyper.distribution().push(torch.zeros_like(hyper.anchor))


def _searched(
    model: MixedEffects, guide: Guide, source: RowSource
) -> tuple[RowSource, Rows | None]:
    """All rows, or a sample of whole clusters, and the sample weighted to stand for all rows."""
    nested = guide.nested()
    if nested is None or len(model.factors) > 1 or len(source) <= SEARCHED:
        return source, None
    clusters = len(source.counts[nested.name])
    share = clusters * SEARCHED // len(source)
    if share < FEWEST_SEARCHED:
        return source, None
    chosen = torch.randperm(clusters)[:share].sort().values.to(source.like.device)
    rows = source.whole_clusters(nested.name, chosen)
    codes = {name: m.index[m.position] for name, m in rows.memberships.items()}
    counts = {
        name: torch.bincount(code, minlength=len(source.counts[name]))
        for name, code in codes.items()
    }
    optional = (rows.trials, rows.offset, rows.weights, rows.computed)
    slopes, means = rows.slopes, rows.means
    inputs = rows.inputs if isinstance(rows.inputs, LazyInputs) else None
    held = HeldRows(
        rows.x, rows.y, codes, counts, *optional, slopes=slopes, means=means, inputs=inputs
    )
    held = replace(held, censoring=rows.censoring)
    return held, rows


def _newton_steps(model: MixedEffects, guide: Guide, source: RowSource, frame: Tensor) -> None:
    """Newton steps to the mode of the posterior given all rows, in units of the frame."""
    for round_ in range(NEWTON_STEPS):
        if not round_ or not guide.exact(model):
            guide.refresh(model, source)
        posterior = _Posterior(model, guide, source)
        point = posterior.point()
        _, step = posterior.slope(point)
        guide.hyperparameters.set_normal(posterior.theta(step), frame)
        if float(step.norm()) < NEAR:
            break


class _Posterior:
    """log p(theta | y) up to a constant, with the same noise of all other sites at every theta."""

    def __init__(
        self,
        model: MixedEffects,
        guide: Guide,
        source: RowSource,
        sample: Rows | None = None,
        closed: MarginalLikelihood | None = None,
    ) -> None:
        self.model, self.guide, self.closed = model, guide, closed
        if closed is not None:
            return
        like, nested, held = model.reference(), guide.nested(), isinstance(source, HeldRows)
        # Several draws matter only to sites that are neither hyperparameters nor nested. Of an
        # exact conditional the centre is enough.
        exact = guide.exact(model)
        draws = 8 if nested is not None and len(model.factors) > 1 and not exact else 1
        n = len(source)
        whole = n * draws <= LARGEST_STEP or guide.particles() is not None
        size = n if whole else max(1, LARGEST_STEP // (4 * draws))
        if sample is None:
            size = size if held else min(size, SEARCHED)
            self.pieces = Pieces.of(source, size, guide.nested_name(), keep=held)
        else:
            index = None if nested is None else sample.memberships[nested.name].index
            self.pieces = Pieces(lambda: iter([sample]), [index], [1.0])
        by_piece = list(self.pieces.without_rows(model.clusters(), guide.nested_name()))
        if exact:
            self.noise = [no_noise(guide, rows, like) for rows in by_piece]
            return
        particles = min(16, max(1, LARGEST_STEP // (size * draws)))
        if nested is not None and particles > 1:
            rows = next(self.pieces.read())
            trial = proposal_noise(guide, rows, draws, 2, like, stretch=False, heavy=False)
            with torch.no_grad():
                spread = weigh(model, guide, rows, trial).particles.var(1)
            particles = 1 if float(spread.max()) < 1e-6 else particles
        drawn = [bound_noise(guide, rows, draws, particles, like) for rows in by_piece]
        # All sites but the nested effects have the same noise in every piece.
        site = "" if nested is None else nested.effect_site
        self.noise = [nested_from(noise, site, drawn[0]) for noise in drawn]

    def parts(self, theta_noise: Tensor) -> Iterator[Float[Tensor, ""]]:
        """The log-density piece by piece, at the theta that the guide makes of this noise."""
        if self.closed is not None:
            drawn = marginal_draws(self.model, self.guide, self.closed, theta_noise)
            yield (drawn.total - drawn.hyper).mean()
            return
        for rows, noise, share in zip(
            self.pieces.read(), self.noise, self.pieces.shares, strict=True
        ):
            noise = replace(noise, values={**noise.values, "_theta": theta_noise})
            weighted = weigh(self.model, self.guide, rows, noise)
            yield share * (weighted.total() - weighted.hyper).mean()

    def slope(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The log-density and its gradient at the theta that the guide makes of this noise."""
        total, gradient = point.new_zeros(()), torch.zeros_like(point)
        for part in self.parts(point):
            gradient += torch.autograd.grad(part, point)[0]
            total += part.detach()
        return total, gradient

    def point(self) -> Tensor:
        """The noise of the guide's centre."""
        size = self.guide.hyperparameters.size
        return self.model.reference().new_zeros(1, 1, 1, size).requires_grad_()

    def theta(self, noise: Tensor) -> Float[Tensor, " size"]:
        """The hyperparameters that the guide makes of this noise; ArithmeticError if not finite."""
        theta = self.guide.hyperparameters.distribution().push(noise).detach()[0, 0, 0]
        if not torch.isfinite(theta).all():
            raise ArithmeticError("the marginal posterior has no finite mode")
        return theta

    def climb(self) -> Float[Tensor, " size"]:
        """The theta with the highest density, by L-BFGS."""
        start, reached, worst = self.point(), math.inf, -math.inf

        def loss(noise: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal worst
            point = start.new_tensor(noise).reshape(start.shape).requires_grad_()
            total, gradient = self.slope(point)
            if not (total.isfinite() and gradient.isfinite().all()):
                # The line search turns back from a wall.
                return worst + 1e3 * (1 + abs(worst)), np.zeros_like(noise)
            worst = max(worst, -float(total))
            return -float(total), -gradient.flatten().double().cpu().numpy()

        def stop(intermediate_result: scipy.optimize.OptimizeResult) -> None:
            nonlocal reached
            last, reached = reached, float(intermediate_result.fun)
            if last - reached < CLIMBED:
                raise StopIteration

        # The first use of torch.optim's L-BFGS would import torch's compiler, which takes a second.
        best = scipy.optimize.minimize(
            loss,
            np.zeros(start.numel()),
            jac=True,
            method="L-BFGS-B",
            callback=stop,
            options={"maxiter": 30},
        )
        return self.theta(start.new_tensor(best.x).reshape(start.shape))

    def curvature(self) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
        """Cholesky factor of (-Hessian)^-1 in units of the frame; Newton step in posterior sds."""
        point, hyper = self.point(), self.guide.hyperparameters
        if self.closed is not None and self.closed.work > DIFFERENCED:
            return self._newton(*self._differences(point))
        hessian, gradient = point.new_zeros(hyper.size, hyper.size), point.new_zeros(hyper.size)
        for part in self.parts(point):
            (slope,) = torch.autograd.grad(part, point, create_graph=True)
            gradient += slope.detach().flatten()
            for row, component in zip(hessian, slope.flatten(), strict=True):
                row += torch.autograd.grad(component, point, retain_graph=True)[0].flatten()
        return self._newton(hessian, gradient)

    def _differences(self, point: Tensor) -> tuple[Float[Tensor, "size size"], Tensor]:
        """The Hessian from differences of gradients, and the gradient, at this noise."""
        rows, at_point = [], self.slope(point)[1].flatten()
        for step in DIFFERENCE * torch.eye(point.numel()).to(point):
            moved = (point.detach() + step).requires_grad_()
            rows.append((self.slope(moved)[1].flatten() - at_point) / DIFFERENCE)
        return torch.stack(rows), at_point

    def _newton(
        self, hessian: Float[Tensor, "size size"], gradient: Float[Tensor, " size"]
    ) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
        """`curvature` from the Hessian and the gradient."""
        hyper = self.guide.hyperparameters
        if not torch.isfinite(hessian).all():
            raise ArithmeticError("the curvature of the marginal posterior is not finite")
        values, vectors = torch.linalg.eigh(-0.5 * (hessian + hessian.mT))
        least = ((hyper.frame @ vectors).norm(dim=0) / WIDEST) ** 2
        values = torch.maximum(values, least)
        root = torch.linalg.cholesky((vectors / values) @ vectors.mT)
        return root, root.mT @ gradient
