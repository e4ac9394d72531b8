"""Where the marginal posterior of the hyperparameters has its mode, and its curvature there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.guides.base import Guide
from armed_pyro.guides.noise import Noise, gaussian_noise, no_noise, proposal_noise
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.cluster_chunks import Pieces
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource

__all__ = ["LARGEST_STEP", "particles_needed", "start_at_mode"]


# Log-likelihoods (rows times draws times particles) in one evaluation.
LARGEST_STEP = 2**21
ROUNDS = 6
NEAR = 0.1  # posterior sds
MOST_REFRESHES = 30
# Largest sd of a hyperparameter (most of them are logs) that a start is given.
WIDEST = 1.5
SEARCH_SCALE = 0.1
# Of more rows than these the mode is searched among some, in at least so many clusters; then so
# many Newton steps at most go to that of all.
SEARCHED, FEWEST_SEARCHED, NEWTON_STEPS = 2**18, 100, 5


def start_at_mode(model: MixedEffects, guide: Guide, source: RowSource) -> None:
    r"""Set q(theta) to the normal distribution at the mode of the marginal posterior.

    .. math:: \hat\theta = \arg\max_\theta \log p(\theta)
        + \sum_k \log \hat p(y_k \mid \theta), \quad
        q(\theta) = N(\hat\theta, -\nabla^2(\hat\theta)^{-1})

    with the random effects integrated out by the guide's conditional (exactly for gaussian
    outcomes with linear fixed effects, by a few particles on fixed noise otherwise), which is
    refreshed between rounds of LBFGS. Does nothing where that is no good: without nested effects,
    or where effects inside make the network run on many images.
    More rows than one evaluation holds are taken a piece at a time. Of very many rows with a single
    factor the mode is first searched among some whole clusters that stand for all; from there a
    few Newton steps, with the gradient of all rows and the curvature of some, lead to that of all
    (Bollapragada, Byrd, Nocedal 2019).

    Parameters
    ----------
    model, guide : MixedEffects, Guide
        The program, its network settled, and its guide.
    source : RowSource
        All training rows.
    """
    hyper = guide.hyperparameters
    searchable = guide.nested() is not None or not model.factors
    # With effects inside the network would run hundreds of times on all rows.
    affordable = not modulates(model) or len(source) * row_cost(model) <= LARGEST_STEP
    if not hyper.size or not searchable or not affordable:
        return
    frame = torch.diag(_first_scale(model, guide, source))
    before = _read(guide)
    try:
        some = _some_clusters(model, guide, source)
        searched = source if some is None else some.source
        _settle_effects(model, guide, searched)
        exact = guide.exact(model)
        known = before
        for round_ in range(ROUNDS):
            if not exact:
                guide.refresh(model, searched)
            before = _read(guide)
            hyper.set_normal(before, frame)
            posterior = _Posterior.of(model, guide, source, some)
            best = posterior.climb()
            hyper.set_normal(best, frame)
            if exact and round_ and _distance(known, best, frame) < NEAR:
                break  # The curvature is that of this place.
            known, (root, step) = best, posterior.curvature()
            frame = frame @ root
            if float(step.norm()) < 1:
                best = best + frame @ step
            hyper.set_normal(best, frame)
            # The pseudo-observations may move on when the mode does.
            if (float(step.norm()) if exact else _distance(before, best, frame)) < NEAR:
                break
        if some is None and not exact:
            guide.refresh(model, source)
        elif some is not None:
            before = _to_all(model, guide, source, frame)
    except (torch.linalg.LinAlgError, ArithmeticError):  # type: ignore[attr-defined]
        hyper.set_normal(before, frame)


def particles_needed(model: MixedEffects, guide: Guide, source: RowSource) -> int:
    """Particles a cluster that the bound needs: 1 where the guide's conditional is exact."""
    nested = guide.nested()
    if nested is None:
        return 1
    # Some clusters will do to tell.
    clusters = len(source.counts[nested.name])
    share = max(1, clusters * (LARGEST_STEP // 256) // len(source))
    if share < clusters:
        chosen = torch.arange(share, device=source.like.device) * clusters // share
        rows = source.whole_clusters(nested.name, chosen)
    else:
        rows = source.all()
    # What is exact for one draw of theta is for all.
    draws, like = 1 if guide.exact(model) else 8, model.reference()
    with torch.no_grad():
        noise = proposal_noise(guide, rows, draws, 16, like, stretch=False, heavy=False)
        weighted = weigh(model, guide, rows, noise)
    # Half the variance of the log-weights is what a single particle loses.
    loss = 0.5 * weighted.particles.var(1).mean(0)
    if float(loss.mean()) * clusters < 0.05:
        return 1
    return 16 if len(nested.terms) == 1 else 32


@torch.no_grad()
def _settle_effects(model: MixedEffects, guide: Guide, source: RowSource) -> None:
    """Refresh the guide at its start: for counts a first step overshoots, and returns 1 a step."""
    rows = source.all()
    before = model.predictor(rows, guide.center(rows)).eta
    for _ in range(MOST_REFRESHES):
        guide.refresh(model, source)
        if guide.exact(model):
            break
        after = model.predictor(rows, guide.center(rows)).eta
        if float((after - before).abs().max()) < 0.5 * model.data_facts().spread:
            break
        before = after


def _first_scale(model: MixedEffects, guide: Guide, source: RowSource) -> Float[Tensor, " size"]:
    """What is known of n things is so to about n^-1/2: in such units the search is shorter."""
    sizes = {one.joint_covariance.sd_site: len(source.counts[one.name]) for one in model.factors}
    fewest = min([len(source), *sizes.values()])
    of_rows = ["fixed_effect", *(parameter.name for parameter in model.family.parameters)]
    sizes |= dict.fromkeys(of_rows, len(source))
    scale = torch.ones_like(guide.hyperparameters.anchor)
    for site in guide.hyperparameters.sites:
        scale[site.start : site.stop] = sizes.get(site.name, 1) ** -0.5
        if site.name == "fixed_effect":
            # All clusters have it in common.
            names = model.fixed_terms()
            common = [site.start + i for i, one in enumerate(names) if one.startswith("Intercept")]
            scale[common] = fewest**-0.5
    return scale.clamp(max=SEARCH_SCALE)


def _distance(one: Tensor, other: Tensor, frame: Tensor) -> float:
    moved = torch.linalg.solve_triangular(frame, (other - one)[:, None], upper=False)
    return float(moved.norm())


def _read(guide: Guide) -> Float[Tensor, " size"]:
    with torch.no_grad():
        hyper = guide.hyperparameters
        return hyper.distribution().push(torch.zeros_like(hyper.anchor))


@dataclass(frozen=True)
class _Some:
    """Rows of some clusters, which stand for all: alone, and as a sample of all."""

    source: HeldRows
    rows: Rows


def _some_clusters(model: MixedEffects, guide: Guide, source: RowSource) -> _Some | None:
    """A random sample of whole clusters, where that is enough to search in."""
    nested = guide.nested()
    if nested is None or len(model.factors) > 1 or len(source) <= SEARCHED:
        return None
    clusters = len(source.counts[nested.name])
    share = clusters * SEARCHED // len(source)
    if share < FEWEST_SEARCHED:
        return None
    chosen = torch.randperm(clusters)[:share].sort().values.to(source.like.device)
    rows = source.whole_clusters(nested.name, chosen)
    codes = {name: one.index[one.position] for name, one in rows.memberships.items()}
    sizes = {name: len(one) for name, one in source.counts.items()}
    counts = {name: torch.bincount(one, minlength=sizes[name]) for name, one in codes.items()}
    optional = (rows.trials, rows.offset, rows.weights, rows.computed)
    return _Some(HeldRows(rows.x, rows.y, codes, counts, *optional), rows)


def _to_all(
    model: MixedEffects, guide: Guide, source: RowSource, frame: Tensor
) -> Float[Tensor, " size"]:
    """Newton steps to the mode of all rows' posterior, in units of the frame."""
    best = _read(guide)
    for round_ in range(NEWTON_STEPS):
        if not round_ or not guide.exact(model):
            guide.refresh(model, source)
        posterior = _Posterior.of(model, guide, source)
        point = posterior.point()
        step = torch.zeros_like(point)
        for part in posterior.parts(point):
            step += torch.autograd.grad(part, point)[0]
        best = guide.hyperparameters.distribution().push(step).detach()[0, 0, 0]
        if not torch.isfinite(best).all():
            raise ArithmeticError("the marginal posterior has no finite mode")
        guide.hyperparameters.set_normal(best, frame)
        if float(step.norm()) < NEAR:
            break
    return best


@dataclass(frozen=True)
class _Posterior:
    """log p(theta | y) up to a constant, the other sites' noise the same for every theta."""

    model: MixedEffects
    guide: Guide
    pieces: Pieces
    noise: list[Noise]

    @classmethod
    def of(
        cls, model: MixedEffects, guide: Guide, source: RowSource, some: _Some | None = None
    ) -> _Posterior:
        like, nested = model.reference(), guide.nested()
        # Draws are of use only to sites that are neither hyperparameters nor nested, and where
        # theirs is not the exact conditional, of which its centre tells all.
        exact = guide.exact(model)
        draws = 8 if nested is not None and len(model.factors) > 1 and not exact else 1
        n = len(source if some is None else some.source)
        size = n if n * draws <= LARGEST_STEP else max(1, LARGEST_STEP // (4 * draws))
        if some is None:
            size = size if isinstance(source, HeldRows) else min(size, SEARCHED)
            pieces = Pieces.of(source, size, guide.nested_name(), keep=isinstance(source, HeldRows))
        else:
            index = None if nested is None else some.rows.memberships[nested.name].index
            pieces = Pieces(lambda: iter([some.rows]), [index], [1.0])
        if exact:
            held = [
                no_noise(guide, one, like)
                for one in pieces.without_rows(model.clusters(), guide.nested_name())
            ]
            return cls(model, guide, pieces, held)
        particles = min(16, max(1, LARGEST_STEP // (size * draws)))
        if nested is not None and particles > 1:
            rows = next(pieces.read())
            trial = proposal_noise(guide, rows, draws, 2, like, stretch=False, heavy=False)
            with torch.no_grad():
                spread = weigh(model, guide, rows, trial).particles.var(1)
            particles = 1 if float(spread.max()) < 1e-6 else particles
        noises: list[Noise] = []
        shared: dict[str, Tensor] = {}
        for clusters in pieces.without_rows(model.clusters(), guide.nested_name()):
            if nested is None or particles == 1:
                noise = gaussian_noise(guide, clusters, draws, like)
            else:
                noise = proposal_noise(guide, clusters, draws, particles, like, heavy=False)
            if nested is not None:
                shared = shared or {
                    site: one for site, one in noise.values.items() if site != nested.effect_site
                }
                noise = replace(noise, values={**noise.values, **shared})
            noises.append(noise)
        return cls(model, guide, pieces, noises)

    def parts(self, theta_noise: Tensor) -> Iterator[Float[Tensor, ""]]:
        """Its pieces, at the theta that this noise becomes."""
        for rows, noise, share in zip(
            self.pieces.read(), self.noise, self.pieces.shares, strict=True
        ):
            given = {**noise.values, "_theta": theta_noise}
            weighted = weigh(self.model, self.guide, rows, replace(noise, values=given))
            yield share * (weighted.total() - weighted.hyper).mean()

    def point(self) -> Tensor:
        """The noise of the guide's centre."""
        point = torch.zeros(1, 1, 1, self.guide.hyperparameters.size)
        return point.to(self.model.reference()).requires_grad_(True)

    def climb(self) -> Float[Tensor, " size"]:
        """The theta with the highest density."""
        point = self.point()
        # A Newton step follows.
        optimizer = torch.optim.LBFGS(
            [point], max_iter=30, tolerance_change=1e-2, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            point.grad, total = torch.zeros_like(point), point.new_zeros(())
            for part in self.parts(point):
                point.grad -= torch.autograd.grad(part, point)[0]
                total -= part.detach()
            return total

        optimizer.step(loss)
        best = self.guide.hyperparameters.distribution().push(point).detach()[0, 0, 0]
        if not torch.isfinite(best).all():
            raise ArithmeticError("the marginal posterior has no finite mode")
        return best

    def curvature(self) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
        """Cholesky factor of minus the Hessian's inverse, in units of the frame; Newton's step.

        The step is in units of the factor, posterior sds.
        """
        point, hyper = self.point(), self.guide.hyperparameters
        hessian, gradient = point.new_zeros(hyper.size, hyper.size), point.new_zeros(hyper.size)
        for part in self.parts(point):
            (slope,) = torch.autograd.grad(part, point, create_graph=True)
            gradient += slope.detach().flatten()
            hessian += torch.stack(
                [
                    torch.autograd.grad(one, point, retain_graph=True)[0].flatten()
                    for one in slope.flatten()
                ]
            )
        if not torch.isfinite(hessian).all():
            raise ArithmeticError("the curvature of the marginal posterior is not finite")
        values, vectors = torch.linalg.eigh(-0.5 * (hessian + hessian.mT))
        widest = hyper.frame @ vectors
        least = (widest.norm(dim=0) / WIDEST) ** 2
        values = torch.maximum(values, least)
        root = torch.linalg.cholesky((vectors / values) @ vectors.mT)
        return root, root.mT @ gradient
