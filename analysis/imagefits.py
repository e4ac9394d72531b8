"""A program fitted to images by site: its scores, and known effects beside recovered ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from armed_pyro import ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.analysis.imagesites import (
    Study,
    file_study,
    recovered_appearance,
    recovered_shifts,
)
from armed_pyro.fitting import Fit

__all__ = ["Application", "draw", "recovered", "run", "scores"]

DRAWS = 100
MODES = ("population", "marginal", "membership")


@dataclass(frozen=True)
class Application:
    """One of the paper's applications to images.

    Attributes
    ----------
    name, title, factor : str
        Of its folder of results, of its figure, and its grouping factor.
    study : callable
        The stand-in with this seed; small, if asked for.
    program : callable
        The ARMED program for a study; small, if asked for.
    schedule : Schedule
        Length and rates of training.
    """

    name: str
    title: str
    factor: str
    study: Callable[[int, bool], Study]
    program: Callable[[Study, bool], MixedEffects]
    schedule: Schedule


def run(application: Application, doc: str | None, argv: Sequence[str] | None) -> None:
    """Fit the program to the user's images or the stand-in, print and write tables and figure."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, in seconds")
    parser.add_argument("--data", type=Path, help="an .npz file: see imagesites.read_images")
    parser.add_argument("--unseen", nargs="+", help="with --data: labels of the clusters held out")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and fit (default: 0)")
    folder = Path("results") / application.name
    parser.add_argument("--out", type=Path, default=folder, help="folder")
    chosen = parser.parse_args(argv)
    if chosen.data is None:
        study = application.study(chosen.seed, chosen.smoke)
    else:
        held = 1 / 3 if chosen.unseen is None else chosen.unseen
        study = file_study(chosen.data, factor=application.factor, unseen=held, seed=chosen.seed)
    torch.manual_seed(chosen.seed)
    model = application.program(study, chosen.smoke)
    steps = Schedule(steps=6, window=3, batch_size=16, stages=0)
    result = fit(
        model,
        study.train,
        validation=study.validation,
        schedule=steps if chosen.smoke else application.schedule,
        seed=chosen.seed,
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    table = scores(result, study)
    table.to_csv(chosen.out / "scores.csv", index=False)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    _save(draw_attributions(result, study.unseen), chosen.out / "attributions.png")
    if model.others:
        # The image of the most contrast.
        row = study.train.take([int(study.train.features.std((1, 2, 3)).argmax())])
        result.decoded(row).plot().savefig(chosen.out / "decoded.png", dpi=150)
    if study.effects is None:
        return
    found = recovered(result, study)
    found.to_csv(chosen.out / "effects.csv", index=False)
    for effect, rows in found.groupby("effect", sort=False):
        print(f"{effect}: correlation of known and recovered {correlation(rows):.2f}")
    _save(draw(study, found, application.title), chosen.out / "effects.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scores(result: Fit, study: Study) -> pd.DataFrame:
    """AUROC of validation rows, whose clusters training saw, and of unseen clusters by mode.

    Returns
    -------
    pandas.DataFrame
        Columns rows, effects (the cluster's own, or the mode), auroc, accuracy, and image_mse
        where images are rebuilt.
    """
    records = [_score(result, study.validation, "seen", "own", None)]
    records.append(_score(result, study.validation, "seen", "none", {}))
    records += [_score(result, study.unseen, "unseen", mode, None) for mode in MODES]
    return pd.DataFrame(records)


def _score(
    result: Fit, data: ClusteredData, rows: str, effects: str, none: dict[str, torch.Tensor] | None
) -> dict[str, str | float]:
    assert data.outcome is not None  # for mypy: read_images and digit_study give labels
    label, record = data.outcome.numpy(), dict[str, str | float](rows=rows, effects=effects)
    images = {}
    if none is None:
        mode = None if effects == "own" else effects
        made = result.predict(data, unseen=mode, draws=DRAWS)
        chance, images = made.mean, {name: one.mean for name, one in made.others.items()}
    else:
        encoded = result.model.encode(data).all()
        with torch.no_grad():
            eta = result.model.predictor(encoded, none).eta
            chance = result.model.family.mean(eta, encoded).numpy()
    record["auroc"] = float(roc_auc_score(label, chance))
    record["accuracy"] = float(((chance > 0.5) == label).mean())
    for name, one in images.items():
        record[f"{name}_mse"] = float(((one - data.features.numpy()) ** 2).mean())
    return record


def recovered(result: Fit, study: Study) -> pd.DataFrame:
    """Known and recovered effects of the seen clusters: columns effect, cluster, known, recovered.

    The shift of the logit; and, where images are rebuilt, contrast, brightness and light of the
    same images under every cluster's effects.
    """
    assert study.effects is not None  # for mypy: see `run`
    found = pd.DataFrame({"shift": recovered_shifts(result, study)})
    if result.model.others:
        found = found.join(recovered_appearance(result, study))
    truth = study.effects.table.loc[found.index]
    pieces = [
        pd.DataFrame(
            {
                "effect": effect,
                "cluster": found.index,
                "known": truth[effect].to_numpy(),
                "recovered": found[effect].to_numpy(),
            }
        )
        for effect in found
        if truth[effect].std() > 0
    ]
    return pd.concat(pieces, ignore_index=True)


def correlation(rows: pd.DataFrame) -> float:
    """Pearson correlation of known and recovered effects."""
    return float(np.corrcoef(rows["known"], rows["recovered"])[0, 1])


def draw(study: Study, found: pd.DataFrame, title: str) -> Figure:
    """Images of clusters from the lowest shift to the highest, over known and recovered effects."""
    assert study.effects is not None  # for mypy: see `run`
    names = list(dict.fromkeys(found["effect"]))
    order = study.effects.table.loc[study.train.grouping(study.factor).levels, "shift"]
    sites = order.sort_values().index
    sites = sites[np.linspace(0, len(sites) - 1, min(6, len(sites))).astype(int)]
    # Squares beside each other, with room for what is written above and below: inches.
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
        rows = found[found["effect"] == effect]
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
    """Images of either class, and which of their pixels speak for class 1 by the fixed effects.

    By integrated gradients, from the mean training image, which belongs to neither class.
    """
    label = np.zeros(0) if data.outcome is None else data.outcome.numpy()
    places = [np.flatnonzero(label == value)[:count] for value in (0, 1)]
    rows = data.take(np.concatenate(places))
    found = result.attribution("integrated", data=rows, draws=10).rows.to_numpy()
    parts = found.reshape(len(rows), *rows.features.shape[1:]).sum(1)
    images = rows.features.numpy().mean(1)
    most = float(np.quantile(np.abs(parts), 0.999)) or 1.0
    figure, axes = plt.subplots(
        2, len(rows), figsize=(1.2 * len(rows) + 1, 3.2), layout="constrained", squeeze=False
    )
    drawn = None
    for axis, image, part, one in zip(axes.T, images, parts, label[np.concatenate(places)],
                                      strict=True):  # fmt: skip
        axis[0].imshow(image, cmap="gray")
        axis[0].set_title(f"class {one:.0f}", fontsize=9)
        drawn = axis[1].imshow(part, cmap="RdBu_r", vmin=-most, vmax=most)
    for axis in axes.flat:
        axis.set_axis_off()
    if drawn is not None:
        figure.colorbar(drawn, ax=axes[1], shrink=0.9, pad=0.01, label="part of the logit")
    figure.suptitle("Which pixels speak for class 1, in clusters not seen in training", fontsize=10)
    return figure
