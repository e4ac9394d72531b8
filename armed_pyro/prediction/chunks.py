"""Predictions for new rows, in clusters seen in training and in new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.result import NewEffects, Prediction, Rebuilt
from armed_pyro.prediction.unseen import (
    EffectSource,
    new_clusters,
)
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows

__all__ = ["check_settings", "extended", "new_effects", "predict_chunks"]


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
) -> Iterator[Prediction]:
    """The same as `predict`, in blocks of consecutive rows, so that memory stays bounded.

    The expected outcomes do not depend on the blocks' size; the draws of the outcome about them
    use other random numbers.

    Parameters
    ----------
    source : EffectSource
        The posterior draws, and where new clusters get their random effects from.
    chunk : int, optional
        Rows per block; by default a block's arrays take about 100 MB.
    outcomes : bool
        Whether the outcome is drawn and other outcomes are predicted, which tables of expected
        outcomes do not need.
    """
    check_settings(draws, prob)
    model, facts = posterior.model, posterior.model.data_facts()
    data = posterior.encode(data)
    if not data.n_rows:
        raise ValueError("there are no rows to predict")
    levels = facts.levels_with(data)
    rows_of = model.encode(data, levels)
    n = max([0, *(one.shape[0] for one in source.latents.values() if one.dim() > 1)]) or draws
    size = chunk or max(1, BLOCK_VALUES // (n * values_per_row(model, others=outcomes)))
    base = (posterior.seed if seed is None else seed) + 1
    latents, used = extended(model, source, levels, rows_of)
    for start, rows in zip(range(0, len(rows_of), size), rows_of.chunks(size), strict=True):
        stop = start + len(rows)
        # Not around the yield: the caller's own random numbers and gradients go on in between.
        with model.seeded(base + stop):
            predictor = model.predictor(rows, latents, return_fixed=False, others=outcomes)
            # Without latent sites all draws have the same predictor.
            eta = predictor.eta.expand(n, *predictor.eta.shape[-2:])
            expected = model.family.mean(eta, rows)
            outcome = model.density(eta, latents, rows).sample() if outcomes else eta[..., 0]
        yield Prediction(
            expected.cpu().numpy(),
            outcome.cpu().numpy(),
            used[start:stop],
            data.row_labels[start:stop],
            facts.outcome_name,
            None if facts.classes is None else tuple(map(str, facts.classes)),
            prob,
            others={name: _rebuilt(one, rows) for name, one in predictor.others.items()},
        )


def _rebuilt(means: Tensor, rows: Rows) -> Rebuilt:
    """From draws "... rows values"; without effects inside there is only one."""
    draws = means.reshape(-1, *rows.x.shape)
    return Rebuilt(draws.mean(0).cpu().numpy(), draws.std(0, correction=0).cpu().numpy())


def extended(
    model: MixedEffects, source: EffectSource, levels: Mapping[str, pd.Index], rows: HeldRows
) -> tuple[dict[str, Tensor], Shaped[np.ndarray, " rows"]]:
    """Draws with the effects of new clusters after those of the seen ones; the mode of each row.

    Parameters
    ----------
    levels : mapping of str to pandas.Index
        Labels of all clusters, as the rows' codes count them.
    """
    latents, used = dict(source.latents), np.full(len(rows), "", dtype="<U10")
    for factor in model.factors:
        seen = len(model.data_facts().levels[factor.name])
        with torch.no_grad():
            effects, modes = source.effects(factor, levels[factor.name][seen:])
        latents[factor.effect_site] = torch.cat([latents[factor.effect_site], effects], -2)
        codes = rows.codes[factor.name].cpu().numpy()
        own = np.array(["", *modes])[np.maximum(codes - seen + 1, 0)]
        # A row with one adapted and one unknown cluster was adapted.
        used = np.where((own != "") & (used != "adapt"), own, used)
    return latents, used


def new_effects(
    model: MixedEffects, source: EffectSource, data: ClusteredData
) -> dict[str, NewEffects]:
    """Effects of all new clusters of these rows, on the original scale."""
    found = {}
    labels = new_clusters(model.data_facts(), model, data)
    for factor in model.factors:
        if len(labels[factor.name]):
            with torch.no_grad():
                effects, modes = source.effects(factor, labels[factor.name])
                values = effects.double() @ factor.to_original.to(effects.device).double().mT
            array = values.cpu().numpy()
            found[factor.name] = NewEffects(labels[factor.name], factor.terms, array, tuple(modes))
    return found


def check_settings(draws: int, prob: float) -> None:
    """Raise ValueError unless there are draws enough, and `prob` is a probability."""
    if not 0 < prob < 1:
        raise ValueError(f"`prob` must lie between 0 and 1, not {prob}")
    if draws < 2:
        raise ValueError(f"a prediction needs at least 2 draws, not {draws}")
