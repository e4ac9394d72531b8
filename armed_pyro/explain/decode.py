"""An image decoded under every cluster's random effects, and along their largest component."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import check_known
from armed_pyro._optional import extra
from armed_pyro._plotting import INK, PLAIN
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import free_name, label_values
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.linearize import mean_fixed_effects
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor, factor_named
from armed_pyro.rows.batch import Membership

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps along the largest component, in its sds.
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
# Clusters in a figure.
MOST_CLUSTERS = 8


@dataclass(frozen=True, eq=False)
class DecodedEffects:
    """Changes of an image by random effects, in units of the predictor or of the other outcome.

    Attributes
    ----------
    factor : str
        The grouping factor.
    images : xarray.Dataset
        Variables with the image's axes (y, x), or (channel, y, x):

        - fixed: the image under the fixed effects alone, posterior mean.
        - image (cluster, ...): the image under the cluster's random effects, posterior mean.
        - difference, difference_sd (cluster, ...): posterior mean and sd of the change by the
          cluster's random effects.
        - walk (step, ...): the image along the largest variance component, in steps of its sd.
        - loading (term): the random effects at step 1, on the original scale.

        The attribute ``share`` is the component's share of the variance between clusters, summed
        over pixels.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import DecodedEffects, MixedEffects, Schedule, fit
    >>> from armed_pyro.families.simulate import mixed_model
    >>> beta = [[0.0] * 4, [1.0] * 4]  # as many columns as an image of 2 x 2 pixels
    >>> data, _ = mixed_model("categorical", 5, 8, coefficients=beta)
    >>> model = MixedEffects(nn.Linear(1, 5), "(1 | site)", "categorical", bayesian_head=True)
    >>> result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    >>> effects: DecodedEffects = result.decoded(data.take([0]), shape=(2, 2))
    >>> dict(effects.images["difference"].sizes)
    {'site': 5, 'y': 2, 'x': 2}
    >>> effects.plot().savefig("clusters.png")  # doctest: +SKIP
    """

    factor: str
    images: xr.Dataset

    def plot(self) -> Figure:
        """Images under the fixed effects and by cluster, the differences, and the walk.

        At most eight clusters are shown: those with the largest differences. Needs matplotlib.
        """
        mpl = extra("matplotlib", "plotting")
        from matplotlib.figure import Figure

        data, name = self.images, self.factor
        cluster = str(data["image"].dims[0])
        inner = list(data["fixed"].dims)
        size = (data["difference"] ** 2).mean(inner).to_numpy()
        shown = np.sort(np.argsort(-size, kind="stable")[:MOST_CLUSTERS])
        labels, steps = data[cluster].to_numpy().astype(str), data["step"].to_numpy()
        titles = [label if label.startswith(name) else f"{name} {label}" for label in labels]
        columns = 1 + max(len(shown), len(steps))
        with mpl.rc_context({**PLAIN, "axes.titlesize": 9}):
            figure = Figure(figsize=(1.25 * columns + 1.2, 4.9), layout="constrained")
            axes = figure.subplots(3, columns, squeeze=False)
            grey = _style("gray", data["fixed"], data["image"][shown])
            most = float(np.abs(data["difference"][shown]).max()) or 1.0
            signed = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
            walked = _style("gray", data["walk"])
            changes = data["difference"][shown]
            changes = changes.mean("channel") if "channel" in inner else changes
            _draw(axes[0, 0], data["fixed"], "fixed effects", **grey)
            walk_titles = [f"{step:+g} sd" if step else "0" for step in steps]
            rows = [
                (data["image"][shown], [titles[k] for k in shown], grey),
                (changes, [""] * len(shown), signed),
                (data["walk"], walk_titles, walked),
            ]
            for row, (images, names, style) in zip(axes, rows, strict=True):
                panels = zip(row[1:], images, names, strict=False)
                drawn = [_draw(axis, image, title, **style) for axis, image, title in panels]
                figure.colorbar(drawn[0], ax=row, shrink=0.8, pad=0.01)
            for axis in axes.flat:
                axis.set_axis_off()
            component = f"largest\ncomponent,\n{data.attrs['share']:.0%} of the\nvariance"
            notes = ["", f"effect of\neach {name}", component]
            for axis, note in zip(axes[:, 0], notes, strict=True):
                axis.text(0.5, 0.5, note, ha="center", va="center", transform=axis.transAxes)
            count = f"{len(shown)} of {len(labels)} clusters, with the largest differences"
            if len(shown) < len(labels):
                figure.supxlabel(count, fontsize=9, color=INK)
        return figure


def decoded(
    posterior: Posterior,
    row: ClusteredData | pd.DataFrame,
    *,
    shape: Sequence[int] | None = None,
    of: str | None = None,
    factor: str | None = None,
    columns: Sequence[str] | None = None,
    draws: int = 100,
    seed: int | None = None,
) -> DecodedEffects:
    r"""The image eta(x, u) for the posterior u of every cluster, and along the principal u.

    The effects of other factors are zero. The image under the fixed effects alone is meaningful
    only if the program was fitted with ``fixed_weight``: otherwise the effects on filters need not
    be centred at zero.

    Let :math:`S S^\top = D` be the posterior mean of the covariance matrix, :math:`S_j` the columns
    of S, and :math:`Z_j = (\eta(S_j) - \eta(-S_j)) / 2`. The walk is :math:`\eta(t S v)`, where v
    is the first right singular vector of Z: the direction of the effects' distribution in which
    images differ most. This is exact if eta is linear in the effects.

    `row` is the image to decode, whose cluster does not matter. `of` is the name of the outcome
    that is an image: another outcome, such as "image" (by default the first), or the family's, with
    a pixel for each of the predictor's `columns` (by default all). `shape` is (height, width) or
    (channels, height, width) of the pixels in their order; an outcome that reconstructs the
    features has their shape by default. The factor is by default the first with random effects.
    `draws` are posterior draws, each a pass of the network; their default seed is that of the fit.

    Raises
    ------
    ValueError
        If there is more than one row, the shape is missing or does not fit, or there is no such
        outcome, factor or column.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7).
    """
    model = posterior.model
    data = posterior.encode(row)
    if data.n_rows != 1:
        raise ValueError(f"give one row, the image to decode, not {data.n_rows}")
    chosen = factor_named(model.factors, factor)
    source = _Images.of(model, chosen, of, columns)
    shape = source.shape(shape)
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    latents = posterior.draws(draws, seed=seed)
    x = model.encode(data, model.data_facts().levels_with(data)).x
    heads = {name: site for name, site in latents.items() if name == "fixed_effect"}
    with torch.no_grad():
        effects = latents[chosen.effect_site]
        none = torch.zeros_like(effects[: len(effects) if heads else 1, :1])
        fixed = source(x, none, heads)
        added = source(x, effects, heads) - fixed
        walk, up, share = _walk(source, x, latents)
    dims = ("y", "x") if len(shape) == 2 else ("channel", "y", "x")

    def shaped(values: Tensor, *lead: str) -> tuple[tuple[str, ...], np.ndarray]:
        return (*lead, *dims), values.unflatten(-1, tuple(shape)).cpu().numpy()

    label = free_name(chosen.name, (*dims, "step", "term"))
    variables = {
        "fixed": shaped(fixed.mean(0)[0]),
        "image": shaped((fixed + added).mean(0), label),
        "difference": shaped(added.mean(0), label),
        "difference_sd": shaped(added.std(0), label),
        "walk": shaped(walk, "step"),
        "loading": (("term",), (chosen.to_original.to(up) @ up).cpu().numpy()),
    }
    levels = model.data_facts().levels[chosen.name]
    coords = {label: label_values(levels), "step": list(STEPS), "term": list(chosen.terms)}
    return DecodedEffects(chosen.name, xr.Dataset(variables, coords, {"share": share}))


def _walk(
    source: _Images, x: Float[Tensor, "1 ..."], latents: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "steps pixels"], Float[Tensor, " terms"], float]:
    """Images along the largest component, the effects at step 1, and its share of the variance."""
    model, factor = source.model, source.factor
    head = mean_fixed_effects(model, latents)
    covariance = factor.covariance(latents)
    covariance = covariance.reshape(-1, *covariance.shape[-2:]).mean(0)
    values, vectors = torch.linalg.eigh(covariance.double())
    S = (vectors * values.clamp(min=0).sqrt()).to(covariance)
    Z = (source(x, S.mT[None], head) - source(x, -S.mT[None], head))[0] / 2
    _, singular, v = torch.linalg.svd(Z.mT.double(), full_matrices=False)
    up = S @ v[0].to(S)
    # The sign of a singular vector is arbitrary: the largest effect is made positive.
    up = up * torch.sign(up[up.abs().argmax()])
    walk = source(x, (torch.tensor(STEPS).to(up)[:, None] * up)[None], head)[0]
    total = float((singular**2).sum())
    return walk, up, float(singular[0] ** 2) / total if total else 0.0


@dataclass(frozen=True)
class _Images:
    """The images of a program, as a function of the random effects of a factor.

    The pixels are values of another outcome or, if that is None, columns of the predictor.
    """

    model: MixedEffects
    factor: Factor
    outcome: str | None
    pixels: tuple[int, ...]

    @classmethod
    def of(
        cls, model: MixedEffects, factor: Factor, name: str | None, columns: Sequence[str] | None
    ) -> _Images:
        """The images of the outcome `name`; by default the first other outcome, or the family's."""
        facts, others = model.data_facts(), [other.name for other in model.others]
        if name is None:
            name = others[0] if others and columns is None else facts.outcome_name
        check_known("outcome", [name], (*others, facts.outcome_name))
        if name in others and columns is not None:
            raise ValueError(
                f"`columns` are of the predictor: leave out either them or of={name!r}"
            )
        check_known("column of the predictor", columns or (), facts.columns)
        if name in others:
            return cls(model, factor, name, tuple(range(math.prod(facts.feature_shape))))
        chosen = facts.columns if columns is None else columns
        return cls(model, factor, None, tuple(map(facts.columns.index, chosen)))

    def shape(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        """The checked shape; by default that of the features, less a single channel."""
        features = self.model.data_facts().feature_shape
        if shape is None and self.outcome is not None:
            shape = features[1:] if len(features) == 3 and features[0] == 1 else features
        if shape is None:
            raise ValueError("give `shape`, (height, width) or (channels, height, width)")
        if len(shape) not in (2, 3) or math.prod(shape) != len(self.pixels):
            raise ValueError(
                f"`shape` must be (height, width) or (channels, height, width) of the "
                f"{len(self.pixels)} pixels, not {tuple(shape)}; name the columns that are "
                "pixels as `columns`"
            )
        return tuple(shape)

    def __call__(
        self,
        x: Float[Tensor, "1 ..."],
        effects: Float[Tensor, "... clusters terms"],
        fixed: Mapping[str, Tensor],
    ) -> Float[Tensor, "... clusters pixels"]:
        """The images of an input under each of these random effects."""
        all_clusters = torch.arange(effects.shape[-2], device=x.device)
        rows = replace(
            self.model.data_facts().one_row(self.model.reference()),
            x=x.expand(len(all_clusters), *x.shape[1:]),
            memberships={self.factor.name: Membership(all_clusters, all_clusters)},
        )
        latents = {**fixed, self.factor.effect_site: effects}
        others = self.outcome is not None
        made = self.model.predictor(rows, latents, return_fixed=False, others=others)
        if self.outcome is None:
            return made.eta[..., list(self.pixels)]
        return made.others[self.outcome].flatten(-x.dim() + 1)


def _style(colours: str, *images: xr.DataArray) -> dict[str, Any]:
    values = np.concatenate([image.to_numpy().ravel() for image in images])
    return {"cmap": colours, "vmin": values.min(), "vmax": values.max()}


def _draw(axis: Any, image: xr.DataArray, title: str, **style: Any) -> Any:
    values = image.to_numpy()
    if values.ndim == 3:  # three channels are colours; other numbers of channels are averaged
        span = (style["vmax"] - style["vmin"]) or 1.0
        scaled = (np.moveaxis(values, 0, -1) - style["vmin"]) / span
        values = scaled if len(values) == 3 else values.mean(0)
    axis.set_title(title, color=INK)
    return axis.imshow(values, interpolation="nearest", **style)
