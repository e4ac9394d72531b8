"""`PredictionModule`: a fit's expected outcome as one torch module, from inputs as users have them.

It is exported by torch, without this library.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from armed_pyro._messages import cause, listing
from armed_pyro._optional import extra
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.label_matching import places_of
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.tap import chosen_tensor
from armed_pyro.networks.taps import as_type, call
from armed_pyro.prediction.predict import predict
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.design import InputBlock
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.inputs import LazyInputs, mapped

__all__ = ["PredictionModule", "export"]

# Largest difference between the module and `predict`, relative to outcomes above 1.
TOLERANCE = 1e-5
# Rows on which they are compared.
COMPARED = 64


class PredictionModule(nn.Module):
    r"""E[y | x] of a fit, averaged over posterior draws.

    .. math:: \frac{1}{S} \sum_s E[y \mid \eta_s], \quad
        \eta_s = c + spread \, [f(\tilde x) + \tilde x^\top \beta_s + \phi(\tilde x)^\top u_s]

    with :math:`\tilde x` the standardised inputs, and u the effects of the chosen clusters or zero.
    Inputs have the scale of the data: encoded features "rows features", images, or the parts
    of a tuple as arguments, or the dict of a dataset.

    Examples
    --------
    ``fit(model, data).network(data.features.float())``
    """

    mean: Tensor
    scale: Tensor
    center: Tensor
    effects: Tensor
    weights: Tensor | None

    def __init__(
        self, posterior: Posterior, clusters: Mapping[str, Any], draws: int, seed: int | None
    ) -> None:
        super().__init__()
        model = posterior.model
        facts = model.data_facts()
        _check_exportable(model, clusters)
        latents = posterior.draws(draws, seed=seed)
        self._family, self._columns = model.family, facts.columns
        self._spread, self._element, self._dtype = facts.spread, model.output, model.dtype
        self.networks = nn.ModuleList(_networks(model, clusters))
        self.register_buffer("mean", _scales(facts.feature_mean, facts.image_mean, facts))
        self.register_buffer("scale", _scales(facts.feature_scale, facts.image_scale, facts))
        self.register_buffer("center", model.reference().new_tensor(facts.center).cpu())
        self._head = model.bayesian_head
        self._intercept = model.bayesian_head and model.has_intercept
        self._kept = facts.kept if model.linear and facts.dropped else None
        self._linear = bool(facts.linear_names)
        self._keep_draws(model, clusters, latents)
        self.eval().requires_grad_(False)

    def _keep_draws(
        self, model: MixedEffects, clusters: Mapping[str, Any], latents: Mapping[str, Tensor]
    ) -> None:
        """Keep the draws of fixed effects, effects of the clusters, and family parameters."""
        facts = model.data_facts()
        fixed = latents.get("fixed_effect")
        if fixed is not None:
            fixed = fixed.reshape(-1, fixed.shape[-1]).unflatten(-1, (-1, len(facts.columns))).cpu()
        self.register_buffer("weights", fixed)
        self._blocks = nn.ModuleList()
        parts = []
        for factor in model.factors:
            if factor.name not in clusters:
                continue
            place = places_of([clusters[factor.name]], facts.levels[factor.name], factor.name)[0]
            drawn = latents[factor.effect_site][:, int(place)].cpu()
            parts.append(drawn.unflatten(-1, (-1, len(facts.columns))))
            self._blocks.extend(copy.deepcopy(block).cpu() for block in factor.linear)
        effects = torch.cat(parts, 1) if parts else torch.zeros(1, 0, len(facts.columns))
        self.register_buffer("effects", effects.to(self._dtype))
        names = [parameter.name for parameter in model.family.parameters]
        values = model.family_parameters({name: latents[name] for name in names})
        self._parameters_of = tuple(values)
        for name, value in values.items():
            self.register_buffer(f"parameter_{name}", value.reshape(-1, 1).cpu())

    def forward(self, *inputs: Any) -> Tensor:
        """E[y] "rows", or "rows classes"; named inputs are one dict."""
        x = inputs[0] if len(inputs) == 1 else inputs
        like = next((p for p in self.networks.parameters() if p.is_floating_point()), self.center)
        table = torch.zeros(0)
        if isinstance(x, Tensor):
            dtype = torch.float64 if self.mean.numel() and x.dim() == 2 else like.dtype
            if self.mean.numel():
                x = (x.to(dtype) - self.mean.to(dtype)) / self.scale.to(dtype)
            table = x.to(self._dtype)
        taken = mapped(lambda values: as_type(like, values), x)
        outputs = [chosen_tensor(call(net, taken), self._element) for net in self.networks]
        output = torch.stack(outputs).mean(0)
        # Not len(output), which would fix the number of rows of an export.
        eta = self._eta(output.reshape(output.shape[0], -1).to(self._dtype), table)
        rows = Rows(output.new_zeros(output.shape[0], 0), None, {})
        parameters = {name: getattr(self, f"parameter_{name}") for name in self._parameters_of}
        expected = self._family.expected(eta, parameters, rows)
        return expected.mean(0)

    def _eta(self, output: Tensor, table: Tensor) -> Tensor:
        """Linear predictors "draws rows columns"."""
        eta = self.center
        inputs = []
        if self._head:
            hidden = output if self._kept is None else output[:, self._kept]
            ones = [hidden.new_ones(hidden.shape[0], 1)] if self._intercept else []
            inputs = [torch.cat([*ones, hidden], -1)]
        else:
            eta = eta + self._spread * self._family.contrasts(output)
        if self._linear:
            inputs.append(table)
        if inputs and self.weights is not None:
            eta = eta + self._spread * (torch.cat(inputs, -1) @ self.weights)
        if len(self._blocks):
            slope_inputs = table if table.dim() == 2 else output[:, :0]
            phi = torch.cat([block.columns(slope_inputs, {}) for block in self._blocks], -1)  # type: ignore[operator]
            eta = eta + self._spread * torch.einsum(
                "nq,sqp->snp", phi.to(self._dtype), self.effects
            )
        return eta if eta.dim() == 3 else eta[None]


def _check_exportable(model: MixedEffects, clusters: Mapping[str, Any]) -> None:
    """Raise ValueError for programs whose predictor needs more than one row's inputs."""
    facts = model.data_facts()
    reasons = {
        "filters inside the network are modulated (FilterScaleBias)": modulates(model),
        "clusters' means are part of the predictor (fit with between=False)": bool(
            facts.between_names
        ),
        "the family needs the number of trials of each row": model.family.needs_trials,
        "parameters of the family have predictors": bool(model.family.predicted),
    }
    used = [factor for factor in model.factors if factor.name in clusters]
    unknown = [name for name in clusters if name not in {f.name for f in model.factors}]
    if unknown:
        raise ValueError(
            f"there are no random effects of {listing(unknown)}: name clusters of "
            f"{listing([f.name for f in model.factors])}"
        )
    inner = any(not isinstance(block, InputBlock) for f in used for block in f.linear)
    reasons["random effects of the chosen clusters act on hidden layers"] = inner
    reasons["random slopes are on columns that are no features"] = bool(used and facts.slope_names)
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"the fit cannot be one module of its inputs, as {reason}")


def _networks(model: MixedEffects, clusters: Mapping[str, Any]) -> list[nn.Module]:
    """Copies of the networks whose mean is the output; without the last layer if that is latent."""
    folds = model.fold_networks
    networks: Sequence[nn.Module] = [model.network]
    if folds is not None:
        networks = list(folds.networks)
        if folds.factor in clusters:
            levels = model.data_facts().levels[str(folds.factor)]
            place = places_of([clusters[str(folds.factor)]], levels, str(folds.factor))[0]
            networks = [networks[int(folds.of_cluster[int(place)])]]
    copies = [copy.deepcopy(network).cpu().eval() for network in networks]
    if not model.bayesian_head:
        return copies
    path = model.head_path()
    for number, network in enumerate(copies):
        if not path:
            copies[number] = nn.Identity()
            continue
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
    return copies


def _scales(table: Sequence[float], images: Sequence[float], facts: Any) -> Tensor:
    """Means or scales in the shape that a row's features broadcast with; empty without any."""
    if table:
        return torch.tensor(table, dtype=torch.float64)
    values = torch.tensor(images, dtype=torch.float64)
    return values.reshape(len(images), *[1] * (len(facts.feature_shape) - 1)) if images else values


def export(
    posterior: Posterior,
    path: str | Path,
    *,
    clusters: Mapping[str, Any] | None = None,
    draws: int = 200,
    seed: int | None = None,
) -> Path:
    """Write the expected outcome as a file that needs no armed_pyro, checked against `predict`.

    Parameters
    ----------
    path : path
        ``model.pt2``, which `torch.export.load` reads, or ``model.onnx``, for which the packages
        onnx and onnxscript are needed.
    clusters : mapping of str to label, optional
        Clusters by factor whose random effects are added, ``{"site": "a"}``. By default the fixed
        effects alone, as in ``predict(unseen="population")``.
    draws, seed : int
        Posterior draws over which the expected outcome is averaged, and their seed.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ValueError
        If the file's ending is another one, the program needs more than a row's inputs, torch
        cannot export the network, or the module differs from `predict` by more than 1e-5.

    Examples
    --------
    ``fit(model, data).export("model.pt2", clusters={"site": "a"})``
    """
    target = Path(path)
    if target.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"the file must end in .pt2 or .onnx, found {target.name!r}")
    chosen = {} if clusters is None else dict(clusters)
    module = PredictionModule(posterior, chosen, draws, seed)
    x, expected = _compared(posterior, chosen, draws, seed)
    arguments = x if isinstance(x, tuple) else (x,)
    _check_same(module(*arguments), expected, "the module")
    shapes = {"inputs": _with_rows(arguments, Dim("rows"))}
    try:
        program = torch.export.export(module, arguments, dynamic_shapes=shapes)
    except Exception as error:  # torch raises errors of many kinds
        raise ValueError(f"torch cannot export the network: {cause(error)}") from error
    if target.suffix == ".pt2":
        torch.export.save(program, target)
        loaded = torch.export.load(target).module()
        _check_same(loaded(*arguments), expected, "the file")
    else:
        extra("onnxscript", "exporting to ONNX", "onnx")
        torch.onnx.export(program, f=str(target), external_data=False)
    return target


def _with_rows(structure: Any, rows: Any) -> Any:
    """The structure, with the mark of a free number of rows in place of each tensor."""
    if isinstance(structure, dict):
        return {name: _with_rows(part, rows) for name, part in structure.items()}
    if isinstance(structure, tuple):
        return tuple(_with_rows(part, rows) for part in structure)
    return {0: rows}


def _compared(
    posterior: Posterior, clusters: Mapping[str, Any], draws: int, seed: int | None
) -> tuple[Any, np.ndarray]:
    """Inputs of training rows, and what `predict` expects of them in these clusters."""
    rows = posterior.data.take(slice(0, COMPARED))
    here = in_clusters(posterior, rows, clusters)
    predicted = predict(posterior, here, unseen="population", draws=draws, seed=seed)
    inputs = rows.features if rows.inputs is None else rows.inputs
    loaded = inputs.load() if isinstance(inputs, LazyInputs) else inputs
    return loaded, predicted.expected.mean(0)


def in_clusters(
    posterior: Posterior, rows: ClusteredData, clusters: Mapping[str, Any]
) -> ClusteredData:
    """The rows in these clusters, and in new ones of other factors; without offset."""
    groupings = {}
    for name in posterior.model.factor_names():
        label = clusters.get(name, "a cluster of no fit")
        groupings[name] = Grouping.from_labels(np.full(rows.n_rows, label, dtype=object), name)
    return replace(rows, groupings={**rows.groupings, **groupings}, offset=None, fold=None)


def _check_same(actual: Tensor, expected: np.ndarray, what: str) -> None:
    """Raise ValueError if outcomes differ."""
    values = actual.detach().double().numpy()
    worst = float(np.abs(values - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{what} differs from predict by {worst:.2g}, more than {TOLERANCE:g}: the network's "
            "output may depend on the other rows of a batch, or on random numbers"
        )
