"""One image decoded under every cluster's random effects, and along their largest component."""

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

from armed_pyro._messages import unknown
from armed_pyro._optional import extra
from armed_pyro._plotting import INK, PLAIN
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import label_values
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.linearize import mean_draws
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor, factor_named
from armed_pyro.rows.batch import Membership

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["DecodedEffects", "decoded"]


STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
MOST_CLUSTERS = 8


@dataclass(frozen=True, eq=False)
class DecodedEffects:
    """What random effects do to one image, in units of the predictor or of the other outcome.

    Attributes
    ----------
    factor : str
        The grouping factor.
    images : xarray.Dataset
        With the image's axes (y, x), or (channel, y, x):

        - fixed: decoded by the fixed effects alone, posterior mean.
        - image, difference (cluster, ...): with the cluster's random effects, and what they add;
          posterior means. difference_sd: the posterior sd of the latter.
        - walk (step, ...): along the largest variance component, steps in its sds.
        - loading (term): the random effects one step up, on the original scale.

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
    >>> found: DecodedEffects = result.decoded(data.take([0]), shape=(2, 2))
    >>> dict(found.images["difference"].sizes)
    {'site': 5, 'y': 2, 'x': 2}
    >>> found.plot().savefig("clusters.png")  # doctest: +SKIP
    """

    factor: str
    images: xr.Dataset

    def plot(self) -> Figure:
        """The image by the fixed effects and by cluster, the differences, and the walk.

        At most eight clusters are shown, those that differ most.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        mpl = extra("matplotlib", "plotting")
        from matplotlib.figure import Figure

        data, name = self.images, self.factor
        cluster = str(data["image"].dims[0])
        inner = list(data["fixed"].dims)
        size = (data["difference"] ** 2).mean(inner).to_numpy()
        shown = np.sort(np.argsort(-size, kind="stable")[:MOST_CLUSTERS])
        labels, steps = data[cluster].to_numpy(), data["step"].to_numpy()
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
            rows = [
                [
                    _draw(axes[0, place], data["image"][k], _named(name, labels[k]), **grey)
                    for place, k in enumerate(shown, 1)
                ],
                [_draw(axes[1, place], one, "", **signed) for place, one in enumerate(changes, 1)],
                [
                    _draw(axes[2, place], one, f"{step:+g} sd" if step else "0", **walked)
                    for place, (step, one) in enumerate(zip(steps, data["walk"], strict=True), 1)
                ],
            ]
            for axis in axes.flat:
                axis.set_axis_off()
            component = f"largest\ncomponent,\n{data.attrs['share']:.0%} of the\nvariance"
            notes = ["", f"what each\n{name} adds", component]
            for axis, note in zip(axes[:, 0], notes, strict=True):
                axis.text(0.5, 0.5, note, ha="center", va="center", transform=axis.transAxes)
            for row, drawn in zip(axes, rows, strict=True):
                figure.colorbar(drawn[0], ax=row, shrink=0.8, pad=0.01)
            count = f"{len(shown)} of {len(labels)} clusters, those that differ most"
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
    r"""An image, eta(x, u), for the posterior u of every cluster, and for the principal u.

    The effects of other factors are zero. (The fixed effects alone are only a picture if the
    program was fitted with ``fixed_weight``: without it, effects on filters need not be about
    zero.) With :math:`S S^\top = D`, the posterior mean of the
    covariance matrix, and half-differences :math:`Z_j = (\eta(S_j) - \eta(-S_j)) / 2` over the
    columns of S, the walk is :math:`\eta(t S v)`, v the first right singular vector of Z: the
    direction of the effects' distribution in which images differ most (exactly so where eta is
    linear in the effects).

    Parameters
    ----------
    posterior : Posterior
        A fit that rebuilds images, or whose predictor has a column for each pixel.
    row : ClusteredData or table
        The image to decode: one row, whose cluster does not matter.
    shape : sequence of int, optional
        (height, width), or (channels, height, width), of the pixels in their order. That of the
        features, if not given, for an outcome that rebuilds them.
    of : str, optional
        The outcome that is an image: one beside the family's, such as "image", or the family's.
        By default the first of the others or, if there is none, the family's.
    factor : str, optional
        Grouping factor; the first with random effects, if not given.
    columns : sequence of str, optional
        The predictor's columns that are pixels; by default all of them.
    draws : int
        Posterior draws; the network runs once a draw.
    seed : int, optional
        Seed of the draws; the fit's own by default.

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
    given = posterior.encode(row)
    if given.n_rows != 1:
        raise ValueError(f"give one row, the image to decode, not {given.n_rows}")
    own = factor_named(model.factors, factor)
    source = _Images.of(model, own, of, columns)
    shape = source.shape(shape)
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    latents = posterior.draws(draws, seed=seed)
    x = model.encode(given, model.data_facts().levels_with(given)).x

    heads = {name: one for name, one in latents.items() if name == "fixed_effect"}
    head = {name: one for name, one in mean_draws(model, latents).items() if name in heads}

    def images(effects: Tensor, fixed: Mapping[str, Tensor]) -> Float[Tensor, "... pixels"]:
        return source(x, effects, fixed)

    with torch.no_grad():
        effects = latents[own.effect_site]
        none = torch.zeros_like(effects[: len(effects) if heads else 1, :1])
        fixed = images(none, heads)
        added = images(effects, heads) - fixed
        covariance = own.covariance(latents)
        covariance = covariance.reshape(-1, *covariance.shape[-2:]).mean(0)
        values, vectors = torch.linalg.eigh(covariance.double())
        S = (vectors * values.clamp(min=0).sqrt()).to(covariance)
        Z = (images(S.mT[None], head) - images(-S.mT[None], head))[0] / 2
        _, singular, v = torch.linalg.svd(Z.mT.double(), full_matrices=False)
        up = S @ v[0].to(S)
        up = up * torch.sign(up[up.abs().argmax()])
        walk = images((torch.tensor(STEPS).to(up)[:, None] * up)[None], head)[0]
    dims = ("y", "x") if len(shape) == 2 else ("channel", "y", "x")

    def shaped(values: Tensor, *lead: str) -> tuple[tuple[str, ...], np.ndarray]:
        return (*lead, *dims), values.unflatten(-1, tuple(shape)).cpu().numpy()

    label = f"{own.name}_" if own.name in (*dims, "step", "term") else own.name
    variables = {
        "fixed": shaped(fixed.mean(0)[0]),
        "image": shaped((fixed + added).mean(0), label),
        "difference": shaped(added.mean(0), label),
        "difference_sd": shaped(added.std(0), label),
        "walk": shaped(walk, "step"),
        "loading": (("term",), (own.to_original.to(up) @ up).cpu().numpy()),
    }
    levels = model.data_facts().levels[own.name]
    coords = {label: label_values(levels), "step": list(STEPS), "term": list(own.terms)}
    total = float((singular**2).sum())
    share = float(singular[0] ** 2) / total if total else 0.0
    return DecodedEffects(own.name, xr.Dataset(variables, coords, {"share": share}))


@dataclass(frozen=True)
class _Images:
    """Where a program's images come from.

    Attributes
    ----------
    outcome : str or None
        Outcome beside the family's; None for the predictor.
    pixels : tuple of int
        Its values that are pixels.
    """

    model: MixedEffects
    factor: Factor
    outcome: str | None
    pixels: tuple[int, ...]

    @classmethod
    def of(
        cls, model: MixedEffects, factor: Factor, name: str | None, columns: Sequence[str] | None
    ) -> _Images:
        """The outcome of this name, or the one that is most likely an image."""
        facts, others = model.data_facts(), [one.name for one in model.others]
        if name is None:
            name = others[0] if others and columns is None else facts.outcome_name
        if name not in (*others, facts.outcome_name):
            raise unknown("outcome", name, (*others, facts.outcome_name))
        if name in others and columns is not None:
            raise ValueError(f"`columns` are of the predictor: leave them out, or of={name!r}")
        for column in columns or ():
            if column not in facts.columns:
                raise unknown("column of the predictor", column, facts.columns)
        if name in others:
            return cls(model, factor, name, tuple(range(math.prod(facts.feature_shape))))
        chosen = facts.columns if columns is None else columns
        return cls(model, factor, None, tuple(facts.columns.index(one) for one in chosen))

    def shape(self, given: Sequence[int] | None) -> tuple[int, ...]:
        """The image's shape, checked; one channel is left out where it is that of the features."""
        features = self.model.data_facts().feature_shape
        if given is None and self.outcome is not None:
            given = features[1:] if len(features) == 3 and features[0] == 1 else features
        if given is None:
            raise ValueError("give `shape`, (height, width) or (channels, height, width)")
        if len(given) not in (2, 3) or math.prod(given) != len(self.pixels):
            raise ValueError(
                f"`shape` must be (height, width) or (channels, height, width) of the "
                f"{len(self.pixels)} pixels, not {tuple(given)}; `columns` chooses those that are "
                "pixels"
            )
        return tuple(given)

    def __call__(
        self,
        x: Float[Tensor, "1 ..."],
        effects: Float[Tensor, "... clusters terms"],
        fixed: Mapping[str, Tensor],
    ) -> Float[Tensor, "... clusters pixels"]:
        """The images of one input under each of these random effects."""
        everyone = torch.arange(effects.shape[-2], device=x.device)
        rows = replace(
            self.model.data_facts().one_row(self.model.reference()),
            x=x.expand(len(everyone), *x.shape[1:]),
            memberships={self.factor.name: Membership(everyone, everyone)},
        )
        latents = {**fixed, self.factor.effect_site: effects}
        made = self.model.predictor(
            rows, latents, return_fixed=False, others=self.outcome is not None
        )
        if self.outcome is None:
            return made.eta[..., list(self.pixels)]
        return made.others[self.outcome].flatten(-x.dim() + 1)


def _named(factor: str, label: Any) -> str:
    """A cluster's label, with the factor's name unless it has that already."""
    return str(label) if str(label).startswith(factor) else f"{factor} {label}"


def _style(colours: str, *images: xr.DataArray) -> dict[str, Any]:
    values = np.concatenate([one.to_numpy().ravel() for one in images])
    return {"cmap": colours, "vmin": values.min(), "vmax": values.max()}


def _draw(axis: Any, image: xr.DataArray, title: str, **style: Any) -> Any:
    values = image.to_numpy()
    if values.ndim == 3:  # colours between 0 and 1, or channels of anything else, averaged
        span = (style["vmax"] - style["vmin"]) or 1.0
        scaled = (np.moveaxis(values, 0, -1) - style["vmin"]) / span
        values = scaled if len(values) == 3 else values.mean(0)
    axis.set_title(title, color=INK)
    return axis.imshow(values, interpolation="nearest", **style)
