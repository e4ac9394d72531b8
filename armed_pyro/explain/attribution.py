"""Importance of features for the fixed effects, and the sd of their slopes over clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.autograd.functional import jacobian

from armed_pyro._messages import check_known, check_probability
from armed_pyro._optional import extra
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.taps import module_at, tapped
from armed_pyro.program.linearize import mean_fixed_effects, sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.design import InputBlock
from armed_pyro.random_effects.grouping_factor import Factor

# Most rows that integrated gradients and Grad-CAM explain; nodes of the integral over the path.
MOST_ROWS, NODES = 1000, 50
METHODS: Mapping[str, str] = {
    "gradient": "gradient of the fixed effects at the mean input",
    "integrated": "integrated gradients from the mean input to each row",
    "grad_cam": "Grad-CAM: regions of an image where a layer's feature maps raise the predictor",
}


@dataclass(frozen=True, eq=False)
class Attribution:
    r"""Importance of every feature for the fixed effects, and the sd of its slope over clusters.

    Attributes
    ----------
    method : str
        One of `METHODS`.
    posterior : xarray.Dataset
        Draws (chain, draw, feature[, column]), in units of the predictor per sd of the feature. The
        sds are the coordinate ``scale`` (1 for 0/1 columns). Images have axis_1, axis_2, ... for
        feature.

        - importance: \|slope\|, or the mean over rows of \|attribution\|. Without chain and draw
          unless the network's last layer, or linear effects beside it, are latent: other weights
          are point estimates.
        - slope: the signed gradient; only for the method "gradient".
        - ``<factor>_slope`` (..., cluster, feature): deviation of each cluster's slope.
        - ``<factor>_sd``: sd of these deviations over clusters; see
          `armed_pyro.explain.attribution.attribution`.
    rows : xarray.DataArray
        Posterior mean of every row's signed attribution (row, feature[, column]).

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import Attribution, MixedEffects, Schedule, fit
    >>> from armed_pyro.families.simulate import mixed_model
    >>> data, _ = mixed_model("gaussian", 8, 10, sd=[1.0, 0.5], coefficients=[0.0, 2.0, 0.1])
    >>> model = MixedEffects(nn.Linear(2, 1), "(1 + x0 | site)", bayesian_head=True)
    >>> result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    >>> importance: Attribution = result.attribution(draws=100)
    >>> importance.table(units="original").set_index("feature")["site_sd"] > 0
    feature
    x0     True
    x1    False
    Name: site_sd, dtype: bool
    """

    method: str
    posterior: xr.Dataset
    rows: xr.DataArray

    def table(self, *, prob: float = 0.9, units: str = "sd") -> pd.DataFrame:
        """Posterior means and equal-tailed intervals of probability `prob`, by importance.

        Values are per standard deviation of the feature (`units` "sd") or per unit of it
        ("original"). The columns are feature, column (if the predictor has several), and for
        importance, slope (method "gradient") and every ``<factor>_sd``: the mean, under this name,
        and the interval, ``..._lower`` and ``..._upper``, NaN for point estimates.

        Raises
        ------
        ValueError
            If `prob` is not a probability, or there are no such units for the method: integrated
            gradients and Grad-CAM are parts of the predictor, not slopes.
        """
        check_probability(prob)
        check_known("unit", [units], ("sd", "original"))
        if units == "original" and self.method != "gradient":
            raise ValueError(
                f"attributions by {self.method!r} are parts of the predictor, not slopes: they "
                'have no original units; choose units="sd", or the method "gradient"'
            )
        data = self.posterior
        scale = data["scale"] if units == "original" else 1.0
        inner = [dim for dim in data["importance"].dims if dim not in ("chain", "draw")]
        first = data["importance"].isel(chain=0, draw=0, missing_dims="ignore")
        labels = first.to_dataframe("value").reset_index()[inner].astype(str)
        features = [dim for dim in inner if dim != "column"]
        frame = pd.DataFrame({"feature": labels[features].agg(",".join, axis=1)})
        if "column" in inner:
            frame["column"] = labels["column"]
        tail = (1 - prob) / 2
        for name, values in data.items():
            if str(name).endswith("_slope"):
                continue
            drawn = (values / scale).transpose("chain", "draw", *inner, missing_dims="ignore")
            flat = drawn.to_numpy().reshape(-1, len(frame))
            frame[name] = flat.mean(0)
            latent = "draw" in drawn.dims
            ends = np.quantile(flat, [tail, 1 - tail], axis=0) if latent else (np.nan, np.nan)
            frame[f"{name}_lower"], frame[f"{name}_upper"] = ends
        frame.attrs |= {"prob": prob, "units": units, "method": self.method}
        return frame.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def attribution(
    posterior: Posterior,
    method: str = "gradient",
    *,
    data: ClusteredData | pd.DataFrame | None = None,
    layer: str | None = None,
    columns: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int | None = None,
) -> Attribution:
    r"""Importance of features for the fixed effects f, and sds of their slopes over clusters.

    With :math:`\bar x` the mean input and x in standardised units,

    .. math::
        gradient_j = \partial f / \partial x_j (\bar x), \quad
        integrated_{ij} = (x_{ij} - \bar x_j) \int_0^1
            \frac{\partial f}{\partial x_j}(\bar x + t (x_i - \bar x)) \, dt

    Integrated gradients sum to :math:`f(x_i) - f(\bar x)`. Grad-CAM weights a layer's feature maps
    by their mean gradients, and keeps the positive part.

    Cluster k adds :math:`J_j^\top u_k` to the slope of feature j, with
    :math:`J = \partial \phi / \partial x (\bar x)`. For effects on filters, phi is the gradient of
    the predictor in them. If all effects of a factor are intercepts and slopes on features, the sd
    over clusters is that of the population, :math:`\sqrt{J_j^\top D J_j}`; for ``(1 + x | site)``,
    the sd of the random slope. Otherwise it is the sd over the clusters in the data, draw by draw,
    as D of a hidden layer's slopes spreads their variance over all features: it does not know the
    direction in which clusters differ.

    The rows of `data` (by default the training rows) are explained, a random sample of 1,000 if
    there are more, and the mean input is theirs. The method is "gradient" (as in the ARMED paper),
    "integrated", or "grad_cam", for networks of images and their feature maps at the module path
    `layer`; the last two need captum. `columns` are columns of the predictor, such as classes of
    the outcome, by default all. `draws` are posterior draws; their default seed is that of the fit.

    Raises
    ------
    ValueError
        If there is no such method, layer or column, no features, or no rows.
    ImportError
        If captum is needed and not installed.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7): gradients at the mean.
    Sundararajan, Taly, Yan (2017), "Axiomatic attribution for deep networks", ICML.
    Selvaraju et al. (2017), "Grad-CAM", ICCV.
    """
    check_known("method", [method], METHODS)
    if (method == "grad_cam") != (layer is not None):
        raise ValueError(
            "Grad-CAM, and no other method, needs `layer`, the module path of feature maps: pass "
            'method="grad_cam" with a layer, or neither of them'
        )
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    model, seed = posterior.model, posterior.seed if seed is None else seed
    names = model.data_facts().columns
    check_known("column of the predictor", columns or (), names)
    chosen = [names.index(name) for name in (names if columns is None else columns)]
    source = posterior.data if data is None else posterior.encode(data)
    x = _inputs(model, source)
    mean = x.mean(0, keepdim=True)
    sample = np.sort(np.random.default_rng([seed, 17]).permutation(len(x))[:MOST_ROWS])
    labels = pd.Index(["mean"]) if method == "gradient" else source.row_labels.take(sample)
    explained = x[torch.as_tensor(sample, device=x.device)]
    if method == "gradient":
        parts = jacobian(lambda at: _basis(model, at, chosen)[0], mean)[None, :, 0]
    elif layer is None:
        parts = _integrated(model, explained, mean, chosen)
    else:
        parts = _maps(model, explained, chosen, layer)
    latents = posterior.draws(draws, seed=seed)
    weights = _weights(model, latents, chosen)
    # Attributions are linear in the basis, so the network runs once for all draws. Only Grad-CAM
    # takes the positive part of every draw.
    by_draw = (torch.einsum("rb...,bp->rp...", parts, draw) for draw in weights)
    if layer is not None:
        by_draw = (_positive(values, x.shape[2:]) for values in by_draw)
    importance, rows = [], torch.zeros(()).to(x)
    for values in by_draw:
        importance.append(values.abs().mean(0))
        rows = rows + values / len(weights)
    fixed = {"importance": torch.stack(importance)}
    if method == "gradient":
        fixed["slope"] = torch.einsum("b...,dbp->dp...", parts[0], weights)
    random: dict[str, Tensor] = {}
    if model.data_facts().feature_names:
        for factor in model.factors:
            random |= _between(model, factor, latents, mean, chosen)
    labelled = _labelled(model, fixed, random, chosen, draws)
    dims = ["row", *(dim for dim in labelled["importance"].dims if dim not in ("chain", "draw"))]
    coords = {dim: labelled[dim].to_numpy() for dim in dims if dim in labelled.coords}
    coords["row"] = label_values(labels)
    array = _columns_last(model, rows, 1)
    return Attribution(method, labelled, xr.DataArray(array, coords, dims))


def _inputs(model: MixedEffects, data: ClusteredData) -> Tensor:
    """Standardised features of the rows to explain."""
    if not data.n_rows:
        raise ValueError(
            "there are no rows to explain: the fit was kept without its training rows, so pass "
            "rows as `data`"
        )
    if not data.n_features:
        raise ValueError("the model has no features, so there is nothing to attribute to")
    return model.encode(data, model.data_facts().levels_with(data)).x


def _basis(model: MixedEffects, x: Tensor, chosen: list[int]) -> Float[Tensor, "rows basis"]:
    """Factor of `_weights`: inputs of the latent last layer, or columns of the output.

    Features with linear effects beside the network follow.
    """
    # In no cluster: cross-fitted networks then give the mean of their outputs.
    rows = replace(model.data_facts().one_row(model.reference()), x=x, memberships={})
    output, activations = model.run_network(rows)
    if model.bayesian_head:
        basis = model.head_inputs(activations)
    else:
        basis = model.family.contrasts(output.reshape(len(x), -1))[:, chosen]
    return torch.cat([basis, x.to(basis)], 1) if model.data_facts().linear_names else basis


def _weights(
    model: MixedEffects, latents: Latents, chosen: list[int]
) -> Float[Tensor, "draws basis columns"]:
    """Weights of the basis in units of the predictor; a single draw unless they are latent."""
    facts, columns = model.data_facts(), len(model.data_facts().columns)
    output = torch.eye(len(chosen)).to(model.reference())[None]
    if not (model.bayesian_head or facts.linear_names):
        return facts.spread * output
    fixed = latents["fixed_effect"]
    fixed = fixed.reshape(-1, fixed.shape[-1] // columns, columns)
    # Effects of clusters' means, which come last, are no effects of the row's features.
    fixed = fixed[:, : fixed.shape[1] - len(facts.between_names), chosen]
    if not model.bayesian_head:
        fixed = torch.cat([output.expand(len(fixed), -1, -1), fixed], 1)
    return facts.spread * fixed


def _between(
    model: MixedEffects,
    factor: Factor,
    latents: Latents,
    mean: Float[Tensor, "1 features"],
    chosen: list[int],
) -> dict[str, Tensor]:
    """Draws of every cluster's deviation from each slope, and of the sd of these deviations."""
    point = mean_fixed_effects(model, latents)

    def phi(x: Tensor) -> Float[Tensor, "terms columns"]:
        rows = replace(model.data_facts().one_row(model.reference()), x=x)
        _, activations = model.run_network(rows)
        return sensitivities(model, rows, factor, activations, point)[0][:, chosen]

    J = jacobian(phi, mean)[:, :, 0] * model.data_facts().spread  # terms columns features
    effects = latents[factor.effect_site].reshape(-1, *latents[factor.effect_site].shape[-2:])
    slopes = torch.einsum("dkt,tpj->dkpj", effects, J)
    sd = slopes.std(1)
    if all(isinstance(block, InputBlock) for block in factor.blocks):
        root = factor.scale_matrix(latents).reshape(-1, *2 * effects.shape[-1:])
        sd = torch.einsum("dts,tpj->dspj", root, J).square().sum(1).sqrt()
    return {f"{factor.name}_sd": sd, f"{factor.name}_slope": slopes}


def _integrated(
    model: MixedEffects, x: Tensor, mean: Tensor, chosen: list[int]
) -> Float[Tensor, "rows basis ..."]:
    """Integrated gradients of the basis."""
    captum = extra("captum.attr", "an attribution by integrated gradients")
    method = captum.IntegratedGradients(lambda rows: _basis(model, rows, chosen))
    size = _basis(model, mean, chosen).shape[1]
    options: dict[str, Any] = {"n_steps": NODES, "internal_batch_size": 4096}
    parts = [method.attribute(x, mean, target=k, **options).detach() for k in range(size)]
    return torch.stack(parts, 1)


def _maps(
    model: MixedEffects, x: Tensor, chosen: list[int], layer: str
) -> Float[Tensor, "rows basis ..."]:
    """Grad-CAM maps of the basis: a layer's feature maps, weighted by their mean gradients."""
    module = module_at(model.network, layer)
    with torch.no_grad(), tapped(model.network, [layer]) as record:
        size = _basis(model, x[:1], chosen).shape[1]
    if layer not in record or record[layer].dim() != x.dim() or x.dim() < 3:
        shape = tuple(record[layer].shape[1:]) if layer in record else "nothing"
        raise ValueError(
            f"Grad-CAM needs images and a layer of feature maps with as many dimensions, but the "
            f"features have the shape {tuple(x.shape[1:])} and the layer {layer!r} gives {shape}: "
            "name a convolution"
        )
    captum = extra("captum.attr", "Grad-CAM")
    method = captum.LayerGradCam(lambda rows: _basis(model, rows, chosen), module)
    pieces = [
        torch.stack([method.attribute(part, target=k).detach()[:, 0] for k in range(size)], 1)
        for part in x.clone().requires_grad_(True).split(64)
    ]
    return torch.cat(pieces)


def _positive(maps: Float[Tensor, "rows columns ..."], shape: tuple[int, ...]) -> Tensor:
    """The positive part of the maps, interpolated to the size of the images."""
    captum = extra("captum.attr", "Grad-CAM")
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    return captum.LayerAttribution.interpolate(maps.clamp(min=0), shape, mode)


def _columns_last(model: MixedEffects, values: Tensor, at: int) -> np.ndarray:
    """Move the predictor's columns from dimension `at` to the end; an only column is dropped."""
    single = len(model.data_facts().columns) == 1
    return (values.select(at, 0) if single else values.movedim(at, -1)).cpu().numpy()


def _labelled(
    model: MixedEffects, fixed: Latents, random: Latents, chosen: list[int], draws: int
) -> xr.Dataset:
    """Draws of fixed and random quantities as a dataset with labelled dimensions."""
    facts = model.data_facts()
    coords: dict[str, Any] = {"chain": [0], "draw": np.arange(draws), "scale": 1.0}
    axes = fixed["importance"].dim() - 2
    inner: tuple[str, ...] = tuple(f"axis_{axis}" for axis in range(1, axes + 1))
    if facts.feature_names:
        inner, scale = ("feature",), list(facts.feature_scale)
        coords |= {"feature": list(facts.feature_names), "scale": (inner, scale)}
    if len(facts.columns) > 1:
        inner = (*inner, "column")
        coords["column"] = [facts.columns[column] for column in chosen]
    variables: dict[str, Any] = {}
    for name, values in {**fixed, **random}.items():
        factor, by_cluster = name.removesuffix("_slope"), name.endswith("_slope")
        cluster = (variable_name(factor),) if by_cluster else ()
        coords |= {dim: label_values(facts.levels[factor]) for dim in cluster}
        array = _columns_last(model, values, 1 + len(cluster))
        if name in fixed and not (model.bayesian_head or facts.linear_names):
            variables[name] = (inner, array[0])
        else:  # an sd that is known in advance has a single draw
            shape = (1, draws, *array.shape[1:])
            dims = ("chain", "draw", *cluster, *inner)
            variables[variable_name(name)] = (dims, np.broadcast_to(array, shape))
    return xr.Dataset(variables, coords)
