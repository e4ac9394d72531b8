"""The adversary on new sites: digits whose sites are confounded with their labels.

    python -m armed_pyro.analysis.validation.adversary OPTIONS

    --seeds N      studies [5]
    --weights A,B  numbers and auto [0,1,auto]; 0 is the reference
    --smoke        seconds: to see that it runs

A dense network classifies 8x8 images at 16 sites, and predicts images at 8 new sites. The table has
one row per weight, with means over the studies: the weight used, AUROC and log loss at seen sites
(new images) and at new sites, their differences to weight 0 with standard errors over the studies,
the fresh probe, its chance, and the accuracy of the adversary's own classifier.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from armed_pyro import Adversary, MixedEffects, Schedule, fit
from armed_pyro.analysis.applications.image_sites import Study, digit_study
from armed_pyro.models.dense import dense

OUT = Path("results/adversary")
POSITIVE = (5, 6, 7, 8, 9)
# Effects of the sites; the classes are hard to tell apart, as on the paper's images.
EFFECTS = {"light": 0.3, "shift": 1.0, "grain": 0.5}
SCORES = ("auroc_seen", "auroc_new", "log_loss_seen", "log_loss_new")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit all studies with all weights, print the table and write it."""
    options = _parser().parse_args(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    weights: list[Any] = [w if w == "auto" else float(w) for w in options.weights.split(",")]
    fits = pd.DataFrame(records(options.seeds, weights, smoke=options.smoke))
    fits.to_csv(out / "fits.csv", index=False)
    table = summary(fits)
    table.to_csv(out / "adversary.csv")
    console = Console(width=140, markup=False, emoji=False)
    console.print(table.T.to_string(float_format="{:.3f}".format))


def records(seeds: int, weights: Sequence[Any], *, smoke: bool) -> Iterator[dict[str, Any]]:
    """One record per study and weight."""
    sizes = {"seen": 8, "unseen": 4, "rows": 24} if smoke else {"seen": 16, "unseen": 8, "rows": 60}
    for seed in range(seeds):
        study = digit_study(POSITIVE, size=8, seed=seed, **sizes, **EFFECTS)
        for weight in weights:
            yield {"study": seed, "weight": str(weight), **scored(study, weight, seed, smoke=smoke)}


def scored(study: Study, weight: Any, seed: int, *, smoke: bool) -> dict[str, float]:
    """Scores of a fit with an adversary of this weight on both hidden layers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), *dense(64, hidden=(32, 16)))
    game = Adversary(study.factor, ["2", "4"], weight=weight)
    model = MixedEffects(net, f"(1 | {study.factor})", "bernoulli", game)
    result = fit(
        model,
        study.train,
        validation=study.validation,
        schedule=Schedule(steps=30) if smoke else Schedule(window=10),
        seed=seed,
        refine=False,
        progress=False,
    )
    (probe,) = result.history.probes
    scores = {}
    for name, rows in {"seen": study.validation, "new": study.unseen}.items():
        predicted = result.predict(rows, unseen="marginal", draws=200).mean
        scores[f"auroc_{name}"] = float(roc_auc_score(rows.outcome, predicted))
        scores[f"log_loss_{name}"] = float(log_loss(rows.outcome, predicted))
    return scores | {
        "used": float(result.model.adversaries[0].weight),
        "probe": probe["accuracy"],
        "chance": probe["chance"],
        "own_accuracy": result.history.adversary_accuracy[-1][0],
    }


def summary(fits: pd.DataFrame) -> pd.DataFrame:
    """Means over the studies, and paired differences of the scores to weight 0.

    >>> numbers = dict.fromkeys([*SCORES, "used", "probe", "chance", "own_accuracy"], range(4))
    >>> fits = pd.DataFrame({"study": [0, 0, 1, 1], "weight": ["0.0", "1.0"] * 2, **numbers})
    >>> summary(fits)[["auroc_new", "auroc_new_diff", "auroc_new_se"]].to_numpy().tolist()
    [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0]]
    """
    rows = {}
    reference = fits[fits.weight == "0.0"].set_index("study")
    for weight, part in fits.groupby("weight", sort=False):
        part = part.set_index("study")
        row: dict[str, float] = part.drop(columns="weight").mean().to_dict()
        for score in SCORES if len(reference) else ():
            difference = (part[score] - reference[score]).dropna()
            row[f"{score}_diff"] = float(difference.mean())
            row[f"{score}_se"] = float(difference.std(ddof=1) / np.sqrt(len(difference)))
        rows[weight] = row
    return pd.DataFrame(rows).T.rename_axis("weight")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="studies [5]")
    parser.add_argument("--weights", default="0,1,auto", help="numbers and auto [0,1,auto]")
    parser.add_argument("--out", default=str(OUT), help=f"folder to write to [{OUT}]")
    parser.add_argument("--smoke", action="store_true", help="small studies, to see that it runs")
    return parser


if __name__ == "__main__":
    main()
