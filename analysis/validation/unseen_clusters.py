"""Clusters that training did not see: coverage of the intervals, and the best mode for each case.

The five parts are coverage on simulated clusters; learning from k labelled rows, beside a full
refit; forecasts of countries' fertility from their first years; spirals of unseen radius; and ten
million rows predicted from the command line. Run with
``python -m armed_pyro.analysis.validation.unseen_clusters``; ``--smoke`` takes a minute.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from rich.console import Console

from armed_pyro import ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.analysis import figures
from armed_pyro.analysis.validation.new_clusters import (
    FAMILIES,
    Simulation,
    coverage_rows,
    learning_rows,
)
from armed_pyro.analysis.validation.new_countries import YEARS, Countries, spiral_rows
from armed_pyro.models.linear import linear

__all__ = ["main"]

PARTS = "12345"
BLOCK = 500_000


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts, print the table and write it with the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.validation.unseen_clusters", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/unseen_clusters"), metavar="DIR")
    parser.add_argument(
        "--parts", default=PARTS, help=f"parts to run, '' to draw anew (default: {PARTS})"
    )
    parser.add_argument("--seeds", type=int, default=4, help="simulated data sets of each kind")
    parser.add_argument("--smoke", action="store_true", help="small data and few steps: a trial")
    given = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(given.out, given.parts, 1 if given.smoke else given.seeds, smoke=given.smoke)
    finally:
        torch.set_num_threads(threads)


def run(out: Path, parts: str, seeds: int, *, smoke: bool) -> None:
    """Run the parts, each kept as soon as it is done."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "1": lambda: simulated(seeds, smoke=smoke, learning=False),
        "2": lambda: simulated(seeds, smoke=smoke, learning=True),
        "3": lambda: countries(out, smoke=smoke),
        "4": lambda: spiral(seeds, smoke=smoke),
        "5": lambda: stream(out, 20_000 if smoke else 10_000_000, smoke=smoke),
    }
    for part in parts:
        start, records = time.perf_counter(), []
        for record in makers[part]():
            records.append(record)
            pd.DataFrame(records).to_csv(out / f"part_{part}.csv", index=False)
        console.print(f"part {part}: {time.perf_counter() - start:.0f} s")
    # With those of parts run before into the same folder.
    rows = pd.concat([pd.read_csv(path) for path in sorted(out.glob("part_?.csv"))])
    table = summarise(rows.reset_index(drop=True))
    table.to_csv(out / "unseen_clusters.csv", index=False)
    for part, own in table.groupby("part"):
        console.print(f"\n{part}", style="bold")
        shown = own.drop(columns="part").dropna(axis=1, how="all")
        console.print(shown.to_string(index=False, float_format="{:.3f}".format), markup=False)
    for name, figure in draw(rows):
        figure.savefig(out / f"{name}.png", dpi=150)
        plt.close(figure)
    console.print(f"\nTable and figures are in {out}")


def simulated(seeds: int, *, smoke: bool, learning: bool) -> Iterator[dict[str, Any]]:
    """Parts 1 and 2: coverage of the modes; learning from k rows."""
    size: dict[str, Any] = {"seen": 15, "unseen": 20, "steps": 60} if smoke else {}
    make = learning_rows if learning else coverage_rows
    with warnings.catch_warnings():
        # That the support says too much of the hyperparameters: ess is in the table.
        warnings.simplefilter("ignore")
        for network in (False,) if learning else (False, True):
            for family in FAMILIES:
                for seed in range(seeds):
                    case = Simulation(family, network, seed, **size)
                    yield from make(case, 100 if smoke else 1000)


def countries(out: Path, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Part 3, and the figure of six countries' curves."""
    made = Countries(0, 60 if smoke else 1500, every=6 if smoke else 1)
    draws = 100 if smoke else 1000
    yield from made.rows(draws)
    for k in (0, 5):
        table = made.curves(k, draws)
        with plt.rc_context(figures.STYLE):
            figure = figures.curves(
                table, x="year", outcome="fertility", panel="country",
                labels=(f"year (first {k} known)", "total fertility rate (births per woman)"),
            )  # fmt: skip
            figure.savefig(out / f"countries_{k}_years.png", dpi=150)
            plt.close(figure)


def spiral(seeds: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Part 4."""
    size: dict[str, Any] = {"seen": 4, "unseen": 5, "rows": 100, "steps": 60} if smoke else {}
    for seed in range(seeds):
        yield from spiral_rows(seed, **size)


def stream(out: Path, rows: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Part 5: new rows in 10,000 unseen clusters, in no order, from Parquet to Parquet."""
    rng, new = np.random.default_rng(0), 200 if smoke else 10_000
    site, x, effect = rng.integers(0, 50, 4000), rng.normal(size=(4000, 2)), rng.normal(size=50)
    y = x[:, 0] + effect[site] + rng.normal(size=4000)
    table = pd.DataFrame({"x": x[:, 0], "z": x[:, 1], "site": [f"s{k}" for k in site], "y": y})
    data = ClusteredData.from_frame(table, outcome="y", clusters=["site"])
    model = MixedEffects(linear(2), "(1 + x | site)", bayesian_head=True)
    result = fit(model, data, schedule=Schedule(steps=60 if smoke else 500), progress=False)
    result.save(out / "run", draws=100)
    source, target = out / "rows.parquet", out / "predictions.parquet"
    names = pa.array([f"n{k}" for k in range(new)])
    schema = pa.schema([("x", pa.float64()), ("z", pa.float64()), ("site", pa.string())])
    with pq.ParquetWriter(source, schema) as writer:
        for start in range(0, rows, BLOCK):
            n = min(BLOCK, rows - start)
            columns = [rng.normal(size=n), rng.normal(size=n), names.take(rng.integers(0, new, n))]
            writer.write_table(pa.table(columns, schema=schema))
    start_time = time.perf_counter()
    command = ["predict", str(out / "run"), str(source), "--unseen", "marginal", "--draws", "200"]
    code = "from armed_pyro.cli import app; app()"
    subprocess.run([sys.executable, "-c", code, *command, "--out", str(target)], check=True)
    seconds = time.perf_counter() - start_time
    # The largest of all child processes so far, of which this is the only one.
    rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    written = pq.ParquetFile(target).metadata.num_rows
    source.unlink()
    target.unlink()
    yield {"part": "5 streaming", "case": f"{written:,} rows, {new:,} clusters, 200 draws",
           "mode": "marginal", "seconds": seconds, "rss_mb": rss}  # fmt: skip


def summarise(records: pd.DataFrame) -> pd.DataFrame:
    """Means over data sets; gains over the conventional network, with standard errors."""
    keys = ["part", "case", "mode", "k"]
    records = records.assign(k=records.get("k", np.nan))
    numbers = records.drop(columns=[c for c in ("seed", "radius") if c in records])
    table = numbers.groupby(keys, sort=False, dropna=False).mean(numeric_only=True).reset_index()
    sizes = records.groupby(keys, sort=False, dropna=False).size().to_numpy()
    table.insert(4, "sets", sizes)
    if "coverage_mean" in records:
        spread = records.groupby(keys, sort=False, dropna=False)["coverage_mean"].sem().to_numpy()
        own = table["coverage_mean_se"]
        table["coverage_mean_se"] = np.where(np.isnan(spread), own, spread)
    if "rmse" in records and (records["mode"] == "refit").any():
        refit = table[table["mode"] == "refit"].set_index("case")["rmse"]
        same = (table["k"] == 20) & table["case"].isin(refit.index)
        table["to_refit"] = np.where(same, table["rmse"] / table["case"].map(refit) - 1, np.nan)
    if (records["part"] == "4 spirals").any():
        table = table.merge(_gains(records), how="left", on=["part", "mode"])
    return table


def _gains(records: pd.DataFrame) -> pd.DataFrame:
    """Accuracy less the conventional network's: mean and standard error over data sets.

    Clusters of one data set share its two fits, so that the data sets count.
    """
    spirals = records[records["part"] == "4 spirals"]
    wide = spirals.pivot_table("accuracy", "seed", "mode", sort=False)
    gain = wide.sub(wide["conventional"], axis=0)
    if len(gain) == 1:  # one data set: over its clusters
        by_cluster = spirals.pivot_table("accuracy", "radius", "mode", sort=False)
        gain = by_cluster.sub(by_cluster["conventional"], axis=0)
    claim = np.where(gain.mean() > 2 * gain.sem(), "holds", "does not hold")
    found = pd.DataFrame({"mode": gain.columns, "gain": gain.mean(), "gain_se": gain.sem()})
    found["better_than_conventional"] = np.where(found["mode"] == "conventional", "", claim)
    return found.assign(part="4 spirals").reset_index(drop=True)


def draw(records: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Learning curves, fertility by years known, and spirals by radius, of the parts that ran."""
    found = set(records["part"])
    with plt.rc_context(figures.STYLE):
        if "2 learning" in found:
            yield "learning", _learning(summarise(records[records["part"] == "2 learning"]))
        if "3 fertility" in found:
            yield "fertility", _fertility(records[records["part"] == "3 fertility"])
        if "4 spirals" in found:
            yield "spirals", _spirals(records[records["part"] == "4 spirals"])


def _learning(rows: pd.DataFrame) -> Figure:
    """Means over data sets by case, mode and k, as `summarise` gives them."""
    cases = list(dict.fromkeys(rows["case"]))
    figure, axes = plt.subplots(2, len(cases), figsize=(2.6 * len(cases), 4.6), squeeze=False)
    for (upper, lower), case in zip(axes.T, cases, strict=True):
        one = rows[(rows["case"] == case) & (rows["mode"] == "adapt")]
        refit = rows[(rows["case"] == case) & (rows["mode"] == "refit")]
        place = np.arange(len(one))
        upper.plot(place, one["rmse"], "o-", color=figures.BLUE, label="adapt")
        at = place[(one["k"] == 20).to_numpy()]
        at = at[: len(refit)]  # none yet in a run that was stopped
        upper.plot(at, refit["rmse"], "D", color=figures.ORANGE, label="full refit")
        lower.errorbar(place, one["coverage_mean"], 2 * one["coverage_mean_se"], fmt="o-",
                       color=figures.BLUE)  # fmt: skip
        lower.plot(at, refit["coverage_mean"], "D", color=figures.ORANGE)
        lower.axhspan(0.85, 0.95, color="0.92", zorder=-2)
        lower.axhline(0.9, color="k", linewidth=0.9, linestyle=":")
        upper.set(title=case, ylim=(0, None))
        lower.set(ylim=(0.7, 1))
        for axis in (upper, lower):
            axis.set_xticks(place, one["k"].astype(int))
    axes[0, 0].set_ylabel("error of E[y]\n(root mean square)")
    axes[1, 0].set_ylabel("coverage of E[y] by\n90% intervals (± 2 se)")
    axes[0, -1].legend()
    figure.supxlabel("labelled rows k of each new cluster", fontsize=9)
    return figure


def _fertility(rows: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.0))
    labels = {"rmse": "RMSE (births per woman)", "crps": "CRPS", "coverage": "coverage, 90%"}
    marginal = rows[rows["mode"] == "marginal"].assign(mode="adapt")
    curves = pd.concat([marginal, rows[rows["mode"].isin(["adapt", "MixedLM"])]])
    place = {k: number for number, k in enumerate(YEARS)}
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for mode, colour, mark in (("adapt", figures.BLUE, "o"), ("MixedLM", figures.ORANGE, "s")):
            one = curves[curves["mode"] == mode]
            style: dict[str, Any] = {"color": colour, "marker": mark, "label": mode}
            axis.plot([place[int(k)] for k in one["k"]], one[name], linewidth=1.2, **style)
        for mode, mark in (("population", "v"), ("membership", "^"), ("nearest", "x")):
            one = rows[rows["mode"] == mode]
            axis.plot([0], one[name], mark, color=figures.GREY, label=mode, markersize=5)
        axis.set_xticks(range(len(YEARS)), YEARS)
        axis.set(xlabel="first years known", ylabel=label, ylim=(0, None))
    axes[2].axhline(0.9, color="k", linewidth=0.9, linestyle=":")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=5)
    return figure


def _spirals(rows: pd.DataFrame) -> Figure:
    figure, axis = plt.subplots(figsize=(6.0, 3.4))
    colours = {"conventional": "k", "marginal": figures.GREY, "membership by row": figures.ORANGE,
               "membership": figures.BLUE}  # fmt: skip
    edges = np.quantile(rows["radius"], np.linspace(0, 1, 7))
    for mode, colour in colours.items():
        one = rows[rows["mode"] == mode]
        cell = np.clip(np.searchsorted(edges, one["radius"]) - 1, 0, len(edges) - 2)
        means = one.groupby(cell)[["radius", "accuracy"]].mean()
        axis.plot(one["radius"], one["accuracy"], ".", color=colour, alpha=0.25, markersize=4)
        axis.plot(means["radius"], means["accuracy"], "o-", color=colour, label=mode)
    axis.set(xlabel="radius of the unseen cluster's spirals", ylabel="accuracy")
    axis.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
