"""Predictions in blocks of rows, for clusters seen in training and for new clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from armed_pyro._messages import INTEGER, check_probability, check_type
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.guides.base import n_draws, selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.result import NewEffects, Prediction, Reconstructed
from armed_pyro.prediction.unseen import EffectSource, new_clusters
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.fold_networks import FoldNetworks
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows

__all__ = [
    "NetworkUncertainty",
    "check_settings",
    "new_effects",
    "predict_chunks",
    "predict_rows",
    "with_new_effects",
]

NetworkUncertainty = Literal["none", "ensemble"]


def predict_chunks(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame,
    source: EffectSource,
    *,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    chunk: int | None = None,
    outcomes: bool = True,
    others: bool = True,
    network_uncertainty: NetworkUncertainty = "none",
) -> Iterator[Prediction]:
    """Yield the predictions of `predict` in blocks of consecutive rows, in bounded memory.

    The expected outcomes do not depend on the block size. The draws of the outcome do, as each
    block has its own random numbers. `source` has the posterior draws and the effects of new
    clusters; `draws` is their number where the program has no latent site. By default the arrays of
    a block take about 100 MB. Without `outcomes`, which tables of expected outcomes do not need,
    `Prediction.outcome` holds the predictor, and no other outcome is predicted. Raises ValueError
    if there are no rows, fewer than two draws, or `prob` is not a probability.
    """
    reconstruct = outcomes and others
    check_settings(draws, prob)
    model, facts = posterior.model, posterior.model.data_facts()
    data = posterior.encode(data)
    if not data.n_rows:
        raise ValueError("there are no rows to predict")
    levels = facts.levels_with(data)
    rows_of = model.encode(data, levels)
    n = n_draws(source.latents) or draws
    size = chunk or max(1, BLOCK_VALUES // (n * values_per_row(model, others=reconstruct)))
    names = None if facts.classes is None else tuple(map(str, facts.classes))
    base = (posterior.seed if seed is None else seed) + 1
    latents, used = with_new_effects(model, source, levels, rows_of)
    for start, rows in zip(range(0, len(rows_of), size), rows_of.chunks(size), strict=True):
        stop = start + len(rows)
        # The seed must not be set around the yield: the caller's code runs there.
        with model.seeded(base + stop):
            folds = model.fold_networks
            rebuilt: Mapping[str, Tensor] = {}
            if network_uncertainty == "ensemble" and folds is not None and folds.averages(rows):
                eta = _in_turn(model, folds, rows, latents, n)
            else:
                made = model.predictor(rows, latents, return_fixed=False, others=reconstruct)
                # Without latent sites the predictor has a single draw.
                eta, rebuilt = made.eta.expand(n, *made.eta.shape[-2:]), made.others
            expected = model.expected(eta, latents, rows)
            outcome = model.density(eta, latents, rows).sample() if outcomes else eta[..., 0]
        yield Prediction(
            expected.cpu().numpy(),
            outcome.cpu().numpy(),
            used[start:stop],
            data.row_labels[start:stop],
            facts.outcome_name,
            model.family.class_labels(names),
            prob,
            others={name: _reconstructed(means, rows) for name, means in rebuilt.items()},
        )


def _in_turn(
    model: MixedEffects, folds: FoldNetworks, rows: Rows, latents: Mapping[str, Tensor], n: int
) -> Tensor:
    """The predictor of n draws, of which each takes one network in place of the mean of all."""
    like, x = model.network_reference(), rows.network_inputs
    parts, places = list[Tensor](), list[Tensor]()
    for number in range(min(len(folds), n)):
        place = torch.arange(number, n, len(folds), device=like.device)
        outputs = folds.run(rows, x, number, like=like, element=model.output)
        fixed = replace(rows, computed={"": outputs})
        eta = model.predictor(fixed, selected(latents, place), return_fixed=False).eta
        parts.append(eta.expand(len(place), *eta.shape[-2:]))
        places.append(place)
    return torch.cat(parts)[torch.cat(places).argsort()]


def predict_rows(
    posterior: Posterior, data: ClusteredData, source: EffectSource, **settings: Any
) -> Prediction:
    """The blocks of `predict_chunks` as one prediction."""
    parts = list(predict_chunks(posterior, data, source, **settings))
    return replace(
        parts[0],
        expected=np.concatenate([part.expected for part in parts], 1),
        outcome=np.concatenate([part.outcome for part in parts], 1),
        unseen=np.concatenate([part.unseen for part in parts]),
        row_labels=data.row_labels,
        others={
            name: Reconstructed(
                np.concatenate([part.others[name].mean for part in parts]),
                np.concatenate([part.others[name].sd for part in parts]),
            )
            for name in parts[0].others
        },
    )


def _reconstructed(means: Tensor, rows: Rows) -> Reconstructed:
    """Mean and sd over the draws "... rows values"; there may be a single draw."""
    draws = means.reshape(-1, *rows.x.shape)
    return Reconstructed(draws.mean(0).cpu().numpy(), draws.std(0, correction=0).cpu().numpy())


def with_new_effects(
    model: MixedEffects, source: EffectSource, levels: Mapping[str, pd.Index], rows: HeldRows
) -> tuple[dict[str, Tensor], Shaped[np.ndarray, " rows"]]:
    """Posterior draws with the effects of new clusters appended, and the mode of each row.

    The codes of `rows` point to `levels`, seen clusters first. The mode is empty for rows in seen
    clusters only.
    """
    latents, used = dict(source.latents), np.full(len(rows), "", dtype="<U10")
    for factor in model.factors:
        seen = len(model.data_facts().levels[factor.name])
        with torch.no_grad():
            effects, modes = source.effects(factor, levels[factor.name][seen:])
        latents[factor.effect_site] = torch.cat([latents[factor.effect_site], effects], -2)
        codes = rows.codes[factor.name].cpu().numpy()
        row_modes = np.array(["", *modes])[np.maximum(codes - seen + 1, 0)]
        # A row counts as adapted if one of its clusters was, even if another one is marginal.
        used = np.where((row_modes != "") & (used != "adapt"), row_modes, used)
    return latents, used


def new_effects(
    model: MixedEffects, source: EffectSource, data: ClusteredData
) -> dict[str, NewEffects]:
    """Effects of all new clusters of these rows by factor, on the original scale."""
    by_factor = {}
    new = new_clusters(model, data)
    for factor in model.factors:
        if len(labels := new[factor.name]):
            with torch.no_grad():
                effects, modes = source.effects(factor, labels)
                values = effects.double() @ factor.to_original.to(effects.device).double().mT
            array = values.cpu().numpy()
            by_factor[factor.name] = NewEffects(labels, factor.terms, array, tuple(modes))
    return by_factor


def check_settings(draws: int, prob: float, network_uncertainty: str = "none") -> None:
    """Raise ValueError for fewer than two draws, no probability, or an unknown choice."""
    if network_uncertainty not in get_args(NetworkUncertainty):
        raise ValueError(
            f"`network_uncertainty` is {network_uncertainty!r}, but must be one of "
            f"{', '.join(get_args(NetworkUncertainty))}"
        )
    check_probability(prob)
    check_type(draws, INTEGER, "`draws`")
    if draws < 2:
        raise ValueError(f"a prediction needs at least 2 draws, not {draws}")
