"""Expected outcomes over two features, cluster by cluster: decision boundaries and surfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

from armed_pyro._messages import check_known
from armed_pyro._optional import extra
from armed_pyro._plotting import INK, PLAIN
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import free_name, label_values
from armed_pyro.inference.posterior import Posterior
from armed_pyro.random_effects.grouping_factor import factor_named
from armed_pyro.rows.batch import Membership, Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Extent = Sequence[tuple[float, float]]
Points = tuple[Float[np.ndarray, "rows 2"], Float[np.ndarray, " rows"]]
# Clusters that a figure shows unless others are asked for.
MOST_CLUSTERS = 8
BLUE, RED = "#2166ac", "#b2182b"


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Expected outcome over a grid of two features, by cluster.

    Attributes
    ----------
    factor : str
        The grouping factor.
    surface : xarray.DataArray
        Posterior mean of E[y | x, cluster] (cluster, second feature, first feature): the
        probability of class 1 for binary outcomes, and of the class `of` for several classes.
    fixed : xarray.DataArray
        The same surface for the fixed effects alone.
    level : float or None
        Value at which the boundary is drawn: 0.5 for probabilities, None for other outcomes.
    of : optional
        The class whose probability is shown, if the outcome has classes.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import Boundaries, MixedEffects, Schedule, fit
    >>> from armed_pyro.families.simulate import mixed_model
    >>> data, _ = mixed_model("bernoulli", 5, 40, coefficients=[0.0, 2.0, 1.0])
    >>> model = MixedEffects(nn.Linear(2, 1), "(1 | site)", "bernoulli", bayesian_head=True)
    >>> result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    >>> expected: Boundaries = result.boundaries(("x0", "x1"), size=20)
    >>> expected.surface.name, expected.surface.shape
    ('P(y)', (5, 20, 20))
    >>> expected.plot(data).savefig("boundaries.png")  # doctest: +SKIP
    """

    factor: str
    surface: xr.DataArray
    fixed: xr.DataArray
    level: float | None
    of: Any = None

    def plot(self, data: ClusteredData | None = None, *, clusters: Sequence[Any] = ()) -> Figure:
        """One panel for the fixed effects, and one per cluster with its rows in `data` as points.

        `clusters` are labels of the clusters to draw; by default the first eight.

        Raises
        ------
        ValueError
            If there is no such cluster, or the rows have no outcome.
        """
        mpl = extra("matplotlib", "plotting")
        from matplotlib.figure import Figure

        name, second, first = (str(dim) for dim in self.surface.dims)
        known = self.surface[name].to_numpy().tolist()
        check_known(f"cluster of {self.factor!r}", clusters, known)
        shown = list(map(known.index, clusters)) or list(range(len(known)))[:MOST_CLUSTERS]
        columns = min(5, len(shown) + 1)
        height = -(-(len(shown) + 1) // columns)
        x, y = self.surface[first].to_numpy(), self.surface[second].to_numpy()
        both = np.append(self.surface, self.fixed)
        low, high = (0.0, 1.0) if self.level is not None else (both.min(), both.max())
        style: dict[str, Any] = {"vmin": low, "vmax": high, "level": self.level}
        with mpl.rc_context({**PLAIN, "axes.titlesize": 9}):
            figure = Figure(figsize=(2.1 * columns + 0.9, 2.1 * height + 0.5), layout="constrained")
            axes = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
            image = _draw_panel(axes[0, 0], self.fixed.to_numpy(), (x, y), **style)
            axes[0, 0].set_title("fixed effects", color=INK)
            for axis, k in zip(axes.flat[1:], shown, strict=False):
                points = None if data is None else _points(data, self, known[k])
                _draw_panel(axis, self.surface[k].to_numpy(), (x, y), points, **style)
                axis.set_title(f"{self.factor} {known[k]}", color=INK)
            for number, axis in enumerate(axes.flat):
                axis.set_visible(number <= len(shown))
                axis.tick_params(labelbottom=number + columns > len(shown))
            figure.supxlabel(first, fontsize=9)
            figure.supylabel(second, fontsize=9)
            figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01, label=self.surface.name)
        return figure


def boundaries(
    posterior: Posterior,
    features: tuple[str, str],
    *,
    factor: str | None = None,
    of: Any = None,
    extent: Extent | None = None,
    size: int = 60,
    draws: int = 200,
    seed: int | None = None,
) -> Boundaries:
    """E[y | x, cluster] over two features, with all other features at their training means.

    The features are the horizontal and the vertical axis, each with `size` points from its lowest
    to its highest value: `extent`, or by default that of the training rows. Effects of all grouping
    factors but `factor`, by default the first with random effects, are zero. `of` is the class
    whose probability is shown, if the outcome has more than two. For counts out of trials it is the
    expected share. `draws` are posterior draws; their default seed is that of the fit.

    Raises
    ------
    ValueError
        If a feature, factor or class does not exist, or a class is needed and not named.
    """
    model, facts = posterior.model, posterior.model.data_facts()
    chosen = factor_named(model.factors, factor)
    family = model.family
    classes = family.class_labels(facts.classes) if family.has_class_probabilities else None
    if classes is not None and of not in classes:
        raise ValueError(f"name one of the classes as `of`: {', '.join(map(str, classes))}")
    if draws < 2 or size < 2:
        raise ValueError(f"`draws` and `size` must be at least 2, not {draws} and {size}")
    axes = _axes(posterior, features, extent, size)
    rows = posterior.data.features
    means = rows.mean(0).tolist() if len(rows) else facts.feature_mean
    centre = dict(zip(facts.feature_names, means, strict=True))
    x = facts.scaling.standardise(plane(axes, centre).features).to(model.reference())
    # Columns of random slopes beside the features are at their means, which is 0 standardised.
    slopes = x.new_zeros(len(x), len(facts.slope_names)) if facts.slope_names else None
    latents = posterior.draws(draws, seed=seed)
    kept = {
        k: v
        for k, v in latents.items()
        if k in (chosen.effect_site, "fixed_effect", *(p.name for p in family.parameters))
    }
    levels = facts.levels[chosen.name]
    all_clusters = torch.arange(len(levels), device=x.device)

    def surface(cluster: int | None) -> Tensor:
        membership = Membership(all_clusters, torch.full((len(x),), cluster or 0, device=x.device))
        rows = Rows(
            x, None, {chosen.name: membership}, trials=torch.ones_like(x[:, 0]), slopes=slopes
        )
        predictor = model.predictor(rows, kept)
        assert predictor.fixed is not None  # for mypy: the fixed part is returned by default
        eta = predictor.fixed if cluster is None else predictor.eta
        mean = model.expected(eta, latents, rows)
        mean = mean if classes is None else mean[..., classes.index(of)]
        return mean.reshape(-1, size, size).mean(0)

    with torch.no_grad():
        values = torch.stack([surface(k) for k in [*range(len(levels)), None]]).cpu().numpy()
    first, second = features
    of = facts.classes[1] if classes is None and facts.classes is not None else of
    probability = model.family.is_probability
    event = facts.outcome_name if of is None else f"{facts.outcome_name} = {of}"
    title = f"P({event})" if probability else f"E({event})"
    cluster = free_name(chosen.name, features)
    coords = {cluster: label_values(levels), second: axes[second], first: axes[first]}
    by_cluster = xr.DataArray(values[:-1], coords, [cluster, second, first], name=title)
    fixed = by_cluster[0].copy(data=values[-1])
    return Boundaries(chosen.name, by_cluster, fixed, 0.5 if probability else None, of)


def _axes(
    posterior: Posterior, features: tuple[str, str], extent: Extent | None, size: int
) -> dict[str, Float[np.ndarray, " points"]]:
    """Values of each feature, from the lowest to the highest."""
    names = posterior.model.data_facts().feature_names
    check_known("feature", features, names)
    if len(set(features)) != 2:
        raise ValueError(f"give two different features, not {features}")
    if extent is None:
        if not posterior.data.n_rows:
            raise ValueError("the fit was kept without its training rows: give an `extent`")
        values = posterior.data.features[:, list(map(names.index, features))].numpy()
        extent = tuple(zip(values.min(0), values.max(0), strict=True))
    return {name: np.linspace(*ends, size) for name, ends in zip(features, extent, strict=True)}


def _points(data: ClusteredData, result: Boundaries, cluster: Any) -> Points:
    """Features and outcomes of a cluster's rows."""
    if data.outcome is None:
        raise ValueError("points are coloured by their outcome, but the rows have none")
    factor, second, first = (str(dim) for dim in result.surface.dims)
    inside = data.grouping(factor).labels() == cluster
    columns = [data.feature_names.index(name) for name in (first, second)]
    outcome = data.outcome if data.trials is None else data.outcome / data.trials
    if data.classes is not None:
        outcome = (outcome == data.classes.index(result.of)).double()
    return data.features.numpy()[inside][:, columns], outcome.numpy()[inside]


def plane(
    axes: Mapping[str, Float[np.ndarray, " points"]],
    centre: Mapping[str, float],
    clusters: Mapping[str, Shaped[np.ndarray, " clusters"]] | None = None,
) -> ClusteredData:
    """Rows over a grid of two features, with all others at `centre`; once for each cluster.

    The first feature varies fastest, clusters slowest.

    >>> rows = plane({"x": np.arange(3.0), "y": np.arange(2.0)}, {"x": 0, "y": 0, "z": 7})
    >>> rows.features[:4].tolist()
    [[0.0, 0.0, 7.0], [1.0, 0.0, 7.0], [2.0, 0.0, 7.0], [0.0, 1.0, 7.0]]
    """
    grid = dict(zip(axes, np.meshgrid(*axes.values()), strict=True))
    columns = np.broadcast_arrays(*{**centre, **grid}.values())
    features = np.stack(columns, -1).reshape(-1, len(centre)).astype(float)
    groups = {name: np.repeat(labels, len(features)) for name, labels in (clusters or {}).items()}
    repeated = np.tile(features, (max(map(len, (clusters or {}).values()), default=1), 1))
    return ClusteredData.from_arrays(repeated, None, groups, feature_names=list(centre))


def _draw_panel(
    axis: Any,
    surface: Float[np.ndarray, "y x"],
    grid: tuple[np.ndarray, np.ndarray],
    points: Points | None = None,
    *,
    vmin: float,
    vmax: float,
    level: float | None,
) -> Any:
    """Draw a surface as colours, its boundary as a line, and rows as points coloured by outcome.

    Points above the level of the boundary are red, others blue. Returns the surface's image.
    """
    x, y = grid
    ends = (x[0], x[-1], y[0], y[-1])
    shades: dict[str, Any] = {"cmap": "RdBu_r", "vmin": vmin, "vmax": vmax}
    image = axis.imshow(surface, extent=ends, origin="lower", aspect="auto", alpha=0.55, **shades)
    if level is not None and surface.min() < level < surface.max():
        axis.contour(x, y, surface, levels=[level], colors="black", linewidths=1.2)
    if points is not None:
        colours: dict[str, Any] = {"c": points[1], **shades}
        if level is not None:
            colours = {"c": [RED if outcome > level else BLUE for outcome in points[1]]}
        axis.scatter(*points[0].T, s=7, edgecolors="white", linewidths=0.25, **colours)
        axis.set(xlim=ends[:2], ylim=ends[2:])
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(length=0, labelsize=8)
    return image
