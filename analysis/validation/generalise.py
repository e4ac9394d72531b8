"""Errors on new clusters, and on new rows of seen clusters, beside those of rivals on each table.

A quarter of the clusters is held out, and a quarter of the rows of the others. Errors are RMSE, or
log loss for outcomes of 0 and 1. Run with ``python -m armed_pyro.analysis.validation.generalise``;
``--data FOLDER`` adds tables that are files, and ``--smoke`` takes a minute or two.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from rich.console import Console
from torch import nn

from armed_pyro import ClusteredData, DivergenceError, MixedEffects, Schedule, fit, tune
from armed_pyro.analysis.rivals.boosted_trees import BoostedTrees
from armed_pyro.analysis.rivals.learners import (
    Learner,
    LinearMixedModel,
    PlainNetwork,
    Predict,
    Task,
    TwoStages,
)
from armed_pyro.analysis.rivals.mixed_forest import MixedForest
from armed_pyro.analysis.rivals.rival import outcomes
from armed_pyro.analysis.validation.generalise_tables import TABLES, Table, load
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear

__all__ = ["Ours", "learners", "main", "summarise"]

SHARE = 0.25  # of the clusters, and of the rows of the others, that are held out
MOST = 1.02  # largest error relative to the best rival's
DRAWS = 400
NEW, SEEN = "new clusters", "new rows"
EDGE = 1e-6  # least predicted probability of an outcome
GRID: Mapping[str, Sequence[Any]] = {"between": [None, True], "fixed_weight": [0.0, 0.3]}
QUICK = Schedule(steps=40, stages=0)


@dataclass(frozen=True)
class Ours(Learner):
    """A program of this library with a random intercept, fitted with its defaults.

    New clusters are predicted by the mode "marginal".

    Attributes
    ----------
    network : bool
        Whether the fixed effects are a dense network, or linear with latent coefficients.
    between : bool or None
        Whether the program has cluster means of the features; None is the library's default.
    tuned : bool
        Whether `tune` chooses the settings of `GRID` by three folds of clusters.
    by_rows : bool
        Whether networks are cross-fitted by rows, not by clusters.
    schedule : Schedule or None
        Length and rates of the training.

    Examples
    --------
    ``Ours("dense", network=True).train(data, Task("id", "gaussian"), seed=0)(rows)``
    """

    name: str
    network: bool
    between: bool | None = None
    tuned: bool = False
    by_rows: bool = False
    schedule: Schedule | None = None

    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        model = self.program(data, task, seed)
        if self.tuned:
            model = tune(
                model, data, over=GRID, folds=3, schedule=self.schedule, workers=1, seed=seed,
                criterion="log_score" if task.binary else "rmse", progress=False,
            ).model  # fmt: skip
        schedule = Schedule() if self.schedule is None else self.schedule
        schedule = replace(schedule, fold_by="rows" if self.by_rows else "clusters")
        result = fit(model, data, schedule=schedule, seed=seed, progress=False)
        return lambda rows: result.predict(rows, unseen="marginal", draws=DRAWS).mean

    def program(self, data: ClusteredData, task: Task, seed: int) -> MixedEffects:
        """The program, with the network's weights from this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = data.n_features
            net: nn.Module = dense(width) if self.network else linear(width)
        random = f"(1 | {task.factor})"
        head = not self.network
        return MixedEffects(net, random, task.family, bayesian_head=head, between=self.between)


def learners(
    *, smoke: bool, schedule: Schedule | None = None
) -> tuple[tuple[Learner, ...], tuple[Learner, ...]]:
    """The rivals and the library's programs; GPBoost is a rival if it is installed."""
    rivals: list[Learner] = [PlainNetwork(), TwoStages(), LinearMixedModel()]
    rivals.append(MixedForest(trees=20, sweeps=3) if smoke else MixedForest())
    if importlib.util.find_spec("gpboost") is not None:
        rivals.append(BoostedTrees())
    schedule = QUICK if smoke else schedule
    ours = (
        Ours("linear", network=False, schedule=schedule),
        Ours("linear, means", network=False, between=True, schedule=schedule),
        Ours("dense", network=True, schedule=schedule),
        Ours("dense, rows", network=True, by_rows=True, schedule=schedule),
        Ours("dense, tuned", network=True, tuned=True, schedule=schedule),
    )
    return tuple(rivals), ours


@dataclass(frozen=True, eq=False)
class Split:
    """Training rows, and held-out rows by their kind."""

    train: ClusteredData
    held_out: Mapping[str, ClusteredData]


def split(table: Table, seed: int) -> Split:
    """Hold out a quarter of the clusters, and a quarter of the rows of the others."""
    factor = table.task.factor
    kept, new = table.data.hold_out_clusters(factor, fraction=SHARE, seed=seed)
    train, rows = kept.split_rows(SHARE, by=factor, seed=seed)
    return Split(train, {NEW: new, SEEN: rows})


def losses(y: np.ndarray, predicted: np.ndarray, task: Task) -> np.ndarray:
    """Squared error of each row, or -log p(y) of an outcome of 0 or 1."""
    if not task.binary:
        return np.square(y - predicted)
    p = predicted.clip(EDGE, 1 - EDGE)
    return -np.log(np.where(y > 0.5, p, 1 - p))


def evaluate(name: str, table: Table, number: int, learner: Learner) -> list[dict[str, Any]]:
    """Sums of losses by cluster, after training on one split."""
    parts, threads = split(table, number), torch.get_num_threads()
    base = {"table": name, "model": learner.name, "split": number, "binary": table.task.binary}
    start = time.perf_counter()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predict = learner.train(parts.train, table.task, number)
            made = {kind: predict(rows) for kind, rows in parts.held_out.items()}
    except (DivergenceError, RuntimeError, np.linalg.LinAlgError) as error:
        return [{**base, "rows": kind, "error": str(error)} for kind in parts.held_out]
    finally:
        torch.set_num_threads(threads)
    seconds, records = time.perf_counter() - start, []
    for kind, rows in parts.held_out.items():
        frame = pd.DataFrame({"loss": losses(outcomes(rows), made[kind], table.task), "n": 1})
        cluster = pd.Series(rows.grouping(table.task.factor).labels()).astype(str)
        for label, sums in frame.groupby(cluster.to_numpy()).sum().iterrows():
            record = {**base, "rows": kind, "cluster": label, "seconds": seconds}
            records.append({**record, "n": int(sums["n"]), "loss": float(sums["loss"])})
    return records


def summarise(records: pd.DataFrame, ours: Sequence[str]) -> pd.DataFrame:
    r"""Errors of every model, relative to the best rival's, with standard errors over clusters.

    Losses of a cluster are summed over the splits. With g the root (RMSE) or the identity (log
    loss), and :math:`d_k = g'(m) (S_k - n_k m) / \sum_k n_k` what cluster k contributes to
    :math:`g(m)`, :math:`m = \sum_k S_k / \sum_k n_k`, the variance of g(m) is
    :math:`\frac{K}{K-1} \sum_k d_k^2`; that of a ratio takes the difference of :math:`d_k / g(m)`.
    """
    tables = []
    for (table, kind), every in records.groupby(["table", "rows"], sort=False):
        part, binary = _complete(every), bool(every["binary"].iloc[0])
        errors = {
            str(model): _error(sums.groupby("cluster")[["loss", "n"]].sum(), binary)
            for model, sums in part.groupby("model", sort=False)
        }
        rivals = {model: error for model, error in errors.items() if model not in ours}
        best = min(rivals, key=lambda model: rivals[model][0])
        for model, (value, influence) in errors.items():
            relative = influence / value - rivals[best][1] / rivals[best][0]
            ratio = value / rivals[best][0]
            record = {"table": table, "rows": kind, "model": model}
            record |= {"metric": "log loss" if binary else "rmse"}
            record |= {"error": value, "error_se": _spread(influence), "best_rival": best}
            record |= {"ratio": ratio, "ratio_se": ratio * _spread(relative)}
            record |= {"splits": part["split"].nunique(), "clusters": len(influence)}
            record["seconds"] = part.loc[part["model"] == model, "seconds"].mean()
            tables.append(record)
    return pd.DataFrame(tables)


def _complete(part: pd.DataFrame) -> pd.DataFrame:
    """Records of the splits that all models have, without models that failed in one.

    An interrupted run has fewer splits of some models.
    """
    if "error" in part:
        failed = part.loc[part["error"].notna(), "model"].unique()
        part = part[~part["model"].isin(failed)]
    models = part.groupby("split")["model"].nunique()
    return part[part["split"].isin(models.index[models == models.max()])]


def _error(sums: pd.DataFrame, binary: bool) -> tuple[float, np.ndarray]:
    """The error, and what each cluster contributes to it."""
    mean = sums["loss"].sum() / sums["n"].sum()
    part = ((sums["loss"] - mean * sums["n"]) / sums["n"].sum()).to_numpy()
    return (mean, part) if binary else (np.sqrt(mean), part / (2 * np.sqrt(mean)))


def _spread(influence: np.ndarray) -> float:
    clusters = len(influence)
    return float(np.sqrt(clusters / max(1, clusters - 1) * (influence**2).sum()))


def markdown(table: pd.DataFrame, kind: str) -> str:
    """Errors on one kind of rows: a table of Markdown, one row per table, best figures in bold."""
    part = table[table["rows"] == kind]
    models = list(dict.fromkeys(part["model"]))
    lines = [f"| table | {' | '.join(models)} |", f"| --- |{' ---: |' * len(models)}"]
    for name, of_table in part.groupby("table", sort=False):
        cells, by_model = [], of_table.set_index("model")
        for model in models:
            if model not in by_model.index:
                cells.append("")
                continue
            row = by_model.loc[model]
            text = f"{row['error']:.3g} ({row['error_se']:.2g})"
            best = row["error"] <= of_table["error"].min()
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {name} ({of_table['metric'].iloc[0]}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(table: pd.DataFrame, ours: Sequence[str]) -> Iterator[str]:
    """A sentence for each of the library's programs and each kind of rows."""
    for kind in (NEW, SEEN):
        for model in ours:
            part = table[(table["rows"] == kind) & (table["model"] == model)]
            if part.empty:
                continue
            behind = part[part["ratio"] > MOST]
            listed = ", ".join(
                f"{row['table']} ({row['ratio']:.2f} ± {row['ratio_se']:.2f}, {row['best_rival']})"
                for _, row in behind.iterrows()
            )
            count = f"{len(part) - len(behind)} of {len(part)} tables"
            end = f"; behind on {listed}" if listed else ""
            yield f"{model}, {kind}: at most {MOST} times the best rival's error on {count}{end}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison, print its tables and write them."""
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.validation.generalise", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = ", ".join(TABLES)
    parser.add_argument("--out", type=Path, default=Path("results/generalise"), metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of sleepstudy.csv, ...")
    parser.add_argument("--tables", default="", help=f"names with commas (default: all): {known}")
    parser.add_argument("--models", default="", help="names with semicolons (default: all)")
    parser.add_argument("--splits", type=int, default=5, help="splits of each table (default: 5)")
    parser.add_argument(
        "--steps", type=int, help="limit of the library's training steps (default: its own)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--small", action="store_true", help="about 240 rows of each table")
    parser.add_argument("--smoke", action="store_true", help="few rows, steps and splits: a trial")
    options = parser.parse_args(argv)
    names = [name for name in options.tables.split(",") if name] or list(TABLES)
    for name in names:
        if name not in TABLES:
            parser.error(f"there is no table {name!r}; the tables are {known}")
    run(options, names)


def run(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Train every model on every split of every table, and keep the losses as they come."""
    console = Console(markup=False, emoji=False)
    schedule = None if options.steps is None else Schedule(steps=options.steps)
    rivals, ours = learners(smoke=options.smoke, schedule=schedule)
    if not any(isinstance(rival, BoostedTrees) for rival in rivals):
        console.print("GPBoost is not installed and left out: pip install 'armed_pyro[rivals]'")
    chosen = [name for name in options.models.split(";") if name]
    models = [model for model in (*rivals, *ours) if not chosen or model.name in chosen]
    small = options.small or options.smoke
    tables = {name: load(name, options.data, small=small) for name in names}
    for name in (name for name, table in tables.items() if table is None):
        console.print(f"{name} is a file, and left out: give its folder by --data")
    splits = 1 if options.smoke else options.splits
    tasks = (
        delayed(evaluate)(name, table, number, model)
        for name, table in tables.items()
        if table is not None
        for number in range(splits)
        for model in models
    )
    options.out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for part in Parallel(options.workers, return_as="generator")(tasks):
        records += part
        pd.DataFrame(records).to_csv(options.out / "losses.csv", index=False)
        first = part[0]
        state = first.get("error") or f"{first['seconds']:.0f} s"
        console.print(f"{first['table']}, split {first['split']}, {first['model']}: {state}")
    floors = {name: table.floor for name, table in tables.items() if table is not None}
    report(pd.DataFrame(records), [model.name for model in ours], floors, options.out, console)


def report(
    records: pd.DataFrame,
    ours: Sequence[str],
    floors: Mapping[str, float | None],
    out: Path,
    console: Console,
) -> None:
    """Print the tables and sentences, and write them."""
    table = summarise(records, ours)
    table.to_csv(out / "generalise.csv", index=False)
    page = []
    for kind in (NEW, SEEN):
        page += [f"Error on {kind}, with its standard error over clusters:", markdown(table, kind)]
    page += [f"- {sentence}." for sentence in verdicts(table, ours)]
    page += [
        f"- {name}, {NEW}: the truth itself has an error of {floor:.3g}."
        for name, floor in floors.items()
        if floor is not None
    ]
    text = "\n\n".join(page[:4]) + "\n\n" + "\n".join(page[4:]) + "\n"
    (out / "generalise.md").write_text(text)
    console.print(text, soft_wrap=True)
    console.print(f"Tables are in {out}")


if __name__ == "__main__":
    main()
