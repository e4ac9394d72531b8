"""A program fitted to images by site: its scores, and recovered effects beside known ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.analysis.applications.image_sites import Study, file_study
from armed_pyro.analysis.rivals.rival import in_clusters, outcomes

__all__ = ["Application", "correlation", "draw", "recovered", "run", "scores"]

DRAWS = 100
MODES = ("population", "marginal", "membership")


@dataclass(frozen=True)
class Application:
    """An application of the paper to images.

    Attributes
    ----------
    name, title, factor : str
        Name of its folder of results, title of its figure, and grouping factor.
    study : callable
        Takes a seed and whether to be small, and gives the stand-in.
    program : callable
        Takes a study and whether to be small, and gives the ARMED program.
    schedule : Schedule
        Length and learning rates of the training.
    """

    name: str
    title: str
    factor: str
    study: Callable[[int, bool], Study]
    program: Callable[[Study, bool], MixedEffects]
    schedule: Schedule


def run(application: Application, doc: str | None, argv: Sequence[str] | None) -> None:
    """Fit the program to the user's images or the stand-in; print and write tables and figures."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, in seconds")
    parser.add_argument("--data", type=Path, help="an .npz file: see image_sites.read_images")
    parser.add_argument("--unseen", nargs="+", help="with --data: labels of the clusters held out")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and fit (default: 0)")
    folder = Path("results") / application.name
    parser.add_argument("--out", type=Path, default=folder, help="folder")
    options = parser.parse_args(argv)
    out: Path = options.out
    if options.data is None:
        study = application.study(options.seed, options.smoke)
    else:
        held = 1 / 3 if options.unseen is None else options.unseen
        study = file_study(options.data, factor=application.factor, unseen=held, seed=options.seed)
    torch.manual_seed(options.seed)
    model = application.program(study, options.smoke)
    quick = Schedule(steps=6, window=3, batch_size=16, stages=0)
    result = fit(
        model,
        study.train,
        validation=study.validation,
        schedule=quick if options.smoke else application.schedule,
        seed=options.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    table = scores(result, study)
    table.to_csv(out / "scores.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    _save(draw_attributions(result, study.unseen), out / "attributions.png")
    if model.others:
        # The image with the highest contrast shows the effects best.
        row = study.train.take([int(study.train.features.std((1, 2, 3)).argmax())])
        result.decoded(row).plot().savefig(out / "decoded.png", dpi=150)
    if study.effects is None:
        return
    effects = recovered(result, study)
    effects.to_csv(out / "effects.csv", index=False)
    for effect, rows in effects.groupby("effect", sort=False):
        print(f"{effect}: correlation of known and recovered {correlation(rows):.2f}")
    _save(draw(study, effects, application.title), out / "effects.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scores(result: Fit, study: Study) -> pd.DataFrame:
    """AUROC of validation rows, whose clusters training saw, and of unseen clusters by mode.

    Returns
    -------
    pandas.DataFrame
        Columns rows, effects ("own" for the cluster's, "none" for the fixed effects alone, or the
        mode), auroc, accuracy, and image_mse if images are rebuilt.
    """
    records = [_score(result, study.validation, "seen", "own")]
    records.append(_score(result, study.validation, "seen", "none"))
    records += [_score(result, study.unseen, "unseen", mode) for mode in MODES]
    return pd.DataFrame(records)


def _score(result: Fit, data: ClusteredData, rows: str, effects: str) -> dict[str, str | float]:
    label, record = outcomes(data), dict[str, str | float](rows=rows, effects=effects)
    images: Mapping[str, Any] = {}
    if effects == "none":
        encoded = result.model.encode(data).all()
        with torch.no_grad():
            eta = result.model.predictor(encoded, {}).eta
            chance = result.model.family.mean(eta, encoded).numpy()
    else:
        mode = None if effects == "own" else effects
        made = result.predict(data, unseen=mode, draws=DRAWS)
        chance, images = made.mean, made.others
    record["auroc"] = float(roc_auc_score(label, chance))
    record["accuracy"] = float(((chance > 0.5) == label).mean())
    for name, image in images.items():
        record[f"{name}_mse"] = float(((image.mean - data.features.numpy()) ** 2).mean())
    return record


def recovered(result: Fit, study: Study) -> pd.DataFrame:
    """Known and recovered effects of the seen clusters.

    The effects are the shift of the logit and, if images are rebuilt, contrast, brightness and
    light of the same images under the effects of each cluster.

    Returns
    -------
    pandas.DataFrame
        Columns effect, cluster, known, recovered.

    Raises
    ------
    ValueError
        If the study's effects are not known.
    """
    table = pd.DataFrame({"shift": recovered_shifts(result, study)})
    if result.model.others:
        table = table.join(recovered_appearance(result, study))
    truth = _known_effects(study).loc[table.index]
    pieces = [
        pd.DataFrame(
            {
                "effect": effect,
                "cluster": table.index,
                "known": truth[effect].to_numpy(),
                "recovered": table[effect].to_numpy(),
            }
        )
        for effect in table
        if truth[effect].std() > 0
    ]
    return pd.concat(pieces, ignore_index=True)


def recovered_shifts(result: Fit, study: Study, *, draws: int = 200) -> pd.Series:
    """Mean shift of the logit by the random effects of each seen site (posterior mean)."""
    model = result.model
    rows = model.encode(study.train).all()
    latents = result.draws(draws)
    with torch.no_grad():
        whole = model.predictor(rows, latents).eta[..., 0]
        fixed = model.predictor(rows, {}).eta[..., 0]
    added = pd.Series((whole - fixed).reshape(-1, len(rows)).mean(0).cpu().numpy())
    return added.groupby(study.train.grouping(study.factor).labels()).mean()


def recovered_appearance(
    result: Fit, study: Study, *, images: int = 40, draws: int = 50
) -> pd.DataFrame:
    """Contrast, brightness and light of the same images under the effects of each seen site.

    Returns
    -------
    pandas.DataFrame
        Indexed by site, as in `SiteEffects.table`. Contrast is the sd of the rebuilt images over
        its mean among the sites, less 1; brightness is their mean, less the sites' mean; light is
        the slope from left to right, relative to the mean.
    """
    data, sites = study.train.take(slice(0, images)), study.train.grouping(study.factor).levels
    records = []
    for site in sites:
        rows = in_clusters(data, study.factor, [site] * len(data))
        rebuilt = result.predict(rows, draws=draws).others["image"].mean
        across = np.linspace(-1, 1, rebuilt.shape[-1])
        light = (rebuilt.mean((0, 1, 2)) * across).mean() / (across**2).mean()
        means = {"contrast": rebuilt.std((1, 2, 3)).mean(), "brightness": rebuilt.mean()}
        records.append(means | {"light": light / rebuilt.mean()})
    table = pd.DataFrame(records, index=pd.Index(sites, name=study.factor))
    table["contrast"] = table["contrast"] / table["contrast"].mean() - 1
    table["brightness"] -= table["brightness"].mean()
    return table


def correlation(rows: pd.DataFrame) -> float:
    """Pearson correlation of known and recovered effects."""
    return float(np.corrcoef(rows["known"], rows["recovered"])[0, 1])


def _known_effects(study: Study) -> pd.DataFrame:
    if study.effects is None:
        raise ValueError("the effects of the study's sites are not known")
    return study.effects.table


def draw(study: Study, effects: pd.DataFrame, title: str) -> Figure:
    """Images of clusters from the lowest to the highest shift, above known and recovered effects.

    Parameters
    ----------
    study : Study
        A study with known effects.
    effects : pandas.DataFrame
        Table that `recovered` gives.
    title : str
    """
    names = list(dict.fromkeys(effects["effect"]))
    order = _known_effects(study).loc[study.train.grouping(study.factor).levels, "shift"]
    sites = order.sort_values().index
    sites = sites[np.linspace(0, len(sites) - 1, min(6, len(sites))).astype(int)]
    # In inches: squares side by side, with room for titles above and labels below.
    width = 9.0
    heights = [width / len(sites) + 0.5, min(2.5, width / len(names)) + 0.8]
    figure = plt.figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    labels = study.train.grouping(study.factor).labels()
    for axis, site in zip(above.subplots(1, len(sites)), sites, strict=True):
        images = study.train.features[labels == site][:4, 0].numpy()
        framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
        rows = [np.hstack(list(pair)) for pair in np.split(framed, 2)]
        axis.imshow(np.vstack(rows), cmap="gray", vmin=-0.2, vmax=1.4)
        axis.set_title(f"{site}\nshift {order[site]:+.1f}", fontsize=9)
        axis.set_axis_off()
    for axis, effect in zip(np.atleast_1d(below.subplots(1, len(names))), names, strict=True):
        rows = effects[effects["effect"] == effect]
        axis.scatter(rows["known"], rows["recovered"], s=22, color="#2166ac")
        limits = [
            rows[["known", "recovered"]].min().min(),
            rows[["known", "recovered"]].max().max(),
        ]
        axis.plot(limits, limits, color="grey", linewidth=0.8)
        axis.set_title(f"{effect} (r = {correlation(rows):.2f})", fontsize=10)
        axis.set_xlabel(f"known, by {study.factor}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_box_aspect(1)
        if effect == names[0]:
            axis.set_ylabel("recovered (posterior mean)")
    figure.suptitle(title)
    return figure


def draw_attributions(result: Fit, data: ClusteredData, count: int = 4) -> Figure:
    """Images of both classes, and the pixels by which the fixed effects favour class 1.

    The attribution is by integrated gradients from the mean training image, which belongs to
    neither class.
    """
    label = np.zeros(0) if data.outcome is None else data.outcome.numpy()
    places = [np.flatnonzero(label == value)[:count] for value in (0, 1)]
    rows = data.take(np.concatenate(places))
    attribution = result.attribution("integrated", data=rows, draws=10).rows.to_numpy()
    parts = attribution.reshape(len(rows), *rows.features.shape[1:]).sum(1)
    images = rows.features.numpy().mean(1)
    most = float(np.quantile(np.abs(parts), 0.999)) or 1.0
    figure, axes = plt.subplots(
        2, len(rows), figsize=(1.2 * len(rows) + 1, 3.2), layout="constrained", squeeze=False
    )
    drawn = None
    for axis, image, part, klass in zip(axes.T, images, parts, label[np.concatenate(places)],
                                      strict=True):  # fmt: skip
        axis[0].imshow(image, cmap="gray")
        axis[0].set_title(f"class {klass:.0f}", fontsize=9)
        drawn = axis[1].imshow(part, cmap="RdBu_r", vmin=-most, vmax=most)
    for axis in axes.flat:
        axis.set_axis_off()
    if drawn is not None:
        figure.colorbar(drawn, ax=axes[1], shrink=0.9, pad=0.01, label="part of the logit")
    figure.suptitle("Pixels that speak for class 1, in clusters not seen in training", fontsize=10)
    return figure
