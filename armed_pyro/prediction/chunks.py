"""Predictions for new rows, in clusters seen in training and in new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.prediction.result import NewEffects, Prediction, Rebuilt
from armed_pyro.prediction.unseen import (
    EffectSource,
    Marginal,
    Population,
    apart,
    check_mode,
    new_clusters,
)

if TYPE_CHECKING:
    from armed_pyro.fitted import Fit
    from armed_pyro.prediction.similarity import Evidence
    from armed_pyro.program.model import MixedEffects
    from armed_pyro.rows.batch import Rows
    from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.program.blocks import BLOCK_VALUES, width

__all__ = ["effect_source", "encoded", "predict_chunks"]


def predict_chunks(
    fit: Fit,
    data: ClusteredData | pd.DataFrame,
    *,
    unseen: str | None = None,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    chunk: int | None = None,
    source: EffectSource | None = None,
    outcomes: bool = True,
) -> Iterator[Prediction]:
    """The same as `predict`, in blocks of consecutive rows, so that memory stays bounded.

    The expected outcomes do not depend on the blocks' size; the draws of the outcome about them
    use other random numbers.

    Parameters
    ----------
    chunk : int, optional
        Rows a block; by default so many that a block's arrays take about 100 MB.
    source : EffectSource, optional
        Where new clusters get their random effects from, if not by `unseen`.
    outcomes : bool
        Whether the outcome is drawn and other outcomes are predicted, which tables of expected
        outcomes do not need.
    """
    _check_settings(draws, prob)
    model, facts = fit.model, fit.model.data_facts()
    data = encoded(fit, data)
    if not data.n_rows:
        raise ValueError("there are no rows to predict")
    if source is None:
        source, _ = effect_source(fit, data, unseen, draws=draws, seed=seed)
    levels = facts.levels_with(data)
    rows_of = model.encode(data, levels)
    n = max([0, *(one.shape[0] for one in source.latents.values() if one.dim() > 1)]) or draws
    size = chunk or max(1, BLOCK_VALUES // (n * width(model, others=outcomes)))
    base = (fit.seed if seed is None else seed) + 1
    latents, used = extended(model, source, levels, rows_of)
    for start, rows in zip(range(0, len(rows_of), size), rows_of.chunks(size), strict=True):
        stop = start + len(rows)
        # Not around the yield: the caller's own random numbers and gradients go on in between.
        with model.seeded(base + stop):
            predictor = model.predictor(rows, latents, alone=False, others=outcomes)
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


def effect_source(
    fit: Fit,
    data: ClusteredData,
    unseen: str | None,
    *,
    support: ClusteredData | pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    seed: int | None = None,
) -> tuple[EffectSource, pd.DataFrame | None]:
    """What gives the new clusters of these rows their effects, and the membership table."""
    new = new_clusters(fit.model.data_facts(), fit.model, data)
    check_mode(unseen, new, support=support is not None)
    evidence = None
    if unseen in ("membership", "nearest") and any(map(len, new.values())):
        from armed_pyro.prediction.similarity import gather, warn_if_alien

        evidence = gather(fit, data if pooled else apart(fit.model, data))
        warn_if_alien(evidence.table())
    source = source_of(fit, unseen, new, support, evidence, draws=draws, seed=seed)
    return source, None if evidence is None else evidence.table()


def source_of(
    fit: Fit,
    unseen: str | None,
    new: Mapping[str, pd.Index],
    support: ClusteredData | pd.DataFrame | None = None,
    evidence: Evidence | None = None,
    *,
    draws: int = 1000,
    seed: int | None = None,
) -> EffectSource:
    """What gives new clusters their effects under a mode that has been checked.

    Parameters
    ----------
    new : mapping of str to pandas.Index
        Labels of all new clusters.
    support, evidence
        For the modes that need them.
    """
    seed = fit.seed if seed is None else seed
    if unseen == "adapt" and support is not None:
        from armed_pyro.prediction.adapt import adapt, check_support

        rows = encoded(fit, support)
        check_support(fit, rows, new)
        return adapt(fit, rows, draws=draws, seed=seed).source()
    latents = fit.draws(draws, seed=seed)
    if evidence is not None:
        from armed_pyro.prediction.similarity import Resembling

        return Resembling(latents, seed, evidence, nearest=unseen == "nearest")
    return Population(latents) if unseen == "population" else Marginal(latents, seed)


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


def encoded(fit: Fit, data: ClusteredData | pd.DataFrame) -> ClusteredData:
    """New rows as the training table was encoded.

    Raises
    ------
    ValueError
        If a table is given but the model was fitted to arrays.
    """
    if isinstance(data, ClusteredData):
        return data
    schema = fit.model.data_facts().schema
    if schema is None:
        raise ValueError(
            "the model was fitted to arrays, so it cannot read a table: pass "
            "ClusteredData.from_arrays(...) with the same features"
        )
    return schema.encode(data)


def _check_settings(draws: int, prob: float) -> None:
    if not 0 < prob < 1:
        raise ValueError(f"`prob` must lie between 0 and 1, not {prob}")
    if draws < 2:
        raise ValueError(f"a prediction needs at least 2 draws, not {draws}")
