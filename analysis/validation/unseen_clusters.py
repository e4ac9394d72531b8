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
    YEARS,
    Countries,
    Simulation,
    coverage_rows,
    learning_rows,
    spiral_rows,
)
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
        "--parts", default=PARTS, help=f"parts to run; '' redraws the figures (default: {PARTS})"
    )
    parser.add_argument("--seeds", type=int, default=4, help="simulated data sets of each kind")
    parser.add_argument("--smoke", action="store_true", help="small data and few steps: a trial")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seeds = 1 if options.smoke else options.seeds
        run(options.out, options.parts, seeds, smoke=options.smoke)
    finally:
        torch.set_num_threads(threads)


def run(out: Path, parts: str, seeds: int, *, smoke: bool) -> None:
    """Run the parts, and keep the rows of each as they come."""
    console = Console(markup=False, emoji=False)
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
    # The table includes parts that earlier runs left in the folder.
    rows = pd.concat([pd.read_csv(path) for path in sorted(out.glob("part_?.csv"))])
    table = summarise(rows.reset_index(drop=True))
    table.to_csv(out / "unseen_clusters.csv", index=False)
    for part, block in table.groupby("part"):
        console.print(f"\n{part}", style="bold")
        shown = block.drop(columns="part").dropna(axis=1, how="all")
        console.print(shown.to_string(index=False, float_format="{:.3f}".format), markup=False)
    for name, figure in draw(rows):
        figure.savefig(out / f"{name}.png", dpi=150)
        plt.close(figure)
    console.print(f"\nTable and figures are in {out}")


def simulated(seeds: int, *, smoke: bool, learning: bool) -> Iterator[dict[str, Any]]:
    """Part 1, coverage of the modes, or part 2, learning from k rows."""
    size: dict[str, Any] = {"seen": 15, "unseen": 20, "steps": 60} if smoke else {}
    make = learning_rows if learning else coverage_rows
    with warnings.catch_warnings():
        # Adapting warns where the support changes the hyperparameters much; the table has its ess.
        warnings.simplefilter("ignore")
        for network in (False,) if learning else (False, True):
            for family in FAMILIES:
                for seed in range(seeds):
                    case = Simulation(family, network, seed, **size)
                    yield from make(case, 100 if smoke else 1000)


def countries(out: Path, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Part 3, with figures of six countries' curves."""
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
    """Part 4, spirals of unseen radius."""
    size: dict[str, Any] = {"seen": 4, "unseen": 5, "rows": 100, "steps": 60} if smoke else {}
    for seed in range(seeds):
        yield from spiral_rows(seed, **size)


def stream(out: Path, rows: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Part 5, unsorted rows of 10,000 unseen clusters predicted from Parquet to Parquet."""
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
    command = [sys.executable, "-m", "armed_pyro.cli", "predict", str(out / "run"), str(source)]
    settings = ["--unseen", "marginal", "--draws", "200", "--out", str(target)]
    subprocess.run([*command, *settings], check=True)
    seconds = time.perf_counter() - start_time
    # The peak of all child processes so far; this is the only child.
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
        within = table["coverage_mean_se"]
        table["coverage_mean_se"] = np.where(np.isnan(spread), within, spread)
    if "rmse" in records and (records["mode"] == "refit").any():
        refit = table[table["mode"] == "refit"].set_index("case")["rmse"]
        same = (table["k"] == 20) & table["case"].isin(refit.index)
        table["to_refit"] = np.where(same, table["rmse"] / table["case"].map(refit) - 1, np.nan)
    if (records["part"] == "4 spirals").any():
        table = table.merge(_gains(records), how="left", on=["part", "mode"])
    return table


def _gains(records: pd.DataFrame) -> pd.DataFrame:
    """Gain in accuracy over the conventional network: mean and standard error over data sets.

    The unit is a data set, because its clusters share two fits.
    """
    spirals = records[records["part"] == "4 spirals"]
    wide = spirals.pivot_table("accuracy", "seed", "mode", sort=False)
    gain = wide.sub(wide["conventional"], axis=0)
    if len(gain) == 1:  # with a single data set, the unit is a cluster
        by_cluster = spirals.pivot_table("accuracy", "radius", "mode", sort=False)
        gain = by_cluster.sub(by_cluster["conventional"], axis=0)
    claim = np.where(gain.mean() > 2 * gain.sem(), "holds", "does not hold")
    table = pd.DataFrame({"mode": gain.columns, "gain": gain.mean(), "gain_se": gain.sem()})
    table["better_than_conventional"] = np.where(table["mode"] == "conventional", "", claim)
    return table.assign(part="4 spirals").reset_index(drop=True)


def draw(records: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Learning curves, fertility by years known, and spirals by radius, for parts that ran."""
    parts = set(records["part"])
    with plt.rc_context(figures.STYLE):
        if "2 learning" in parts:
            yield "learning", _learning(summarise(records[records["part"] == "2 learning"]))
        if "3 fertility" in parts:
            yield "fertility", _fertility(records[records["part"] == "3 fertility"])
        if "4 spirals" in parts:
            yield "spirals", _spirals(records[records["part"] == "4 spirals"])


def _learning(rows: pd.DataFrame) -> Figure:
    """Learning curves from the means that `summarise` gives by case, mode and k."""
    cases = list(dict.fromkeys(rows["case"]))
    figure, axes = plt.subplots(2, len(cases), figsize=(2.6 * len(cases), 4.6), squeeze=False)
    for (upper, lower), case in zip(axes.T, cases, strict=True):
        adapted = rows[(rows["case"] == case) & (rows["mode"] == "adapt")]
        refit = rows[(rows["case"] == case) & (rows["mode"] == "refit")]
        place = np.arange(len(adapted))
        upper.plot(place, adapted["rmse"], "o-", color=figures.BLUE, label="adapt")
        at = place[(adapted["k"] == 20).to_numpy()]
        at = at[: len(refit)]  # an interrupted run has no refit yet
        upper.plot(at, refit["rmse"], "D", color=figures.ORANGE, label="full refit")
        error = 2 * adapted["coverage_mean_se"]
        lower.errorbar(place, adapted["coverage_mean"], error, fmt="o-", color=figures.BLUE)
        lower.plot(at, refit["coverage_mean"], "D", color=figures.ORANGE)
        lower.axhspan(0.85, 0.95, color="0.92", zorder=-2)
        lower.axhline(0.9, color="k", linewidth=0.9, linestyle=":")
        upper.set(title=case, ylim=(0, None))
        lower.set(ylim=(0.7, 1))
        for axis in (upper, lower):
            axis.set_xticks(place, adapted["k"].astype(int))
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
            line = curves[curves["mode"] == mode]
            style: dict[str, Any] = {"color": colour, "marker": mark, "label": mode}
            axis.plot([place[int(k)] for k in line["k"]], line[name], linewidth=1.2, **style)
        for mode, mark in (("population", "v"), ("membership", "^"), ("nearest", "x")):
            point = rows[rows["mode"] == mode]
            axis.plot([0], point[name], mark, color=figures.GREY, label=mode, markersize=5)
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
        points = rows[rows["mode"] == mode]
        cell = np.clip(np.searchsorted(edges, points["radius"]) - 1, 0, len(edges) - 2)
        means = points.groupby(cell)[["radius", "accuracy"]].mean()
        axis.plot(points["radius"], points["accuracy"], ".", color=colour, alpha=0.25, markersize=4)
        axis.plot(means["radius"], means["accuracy"], "o-", color=colour, label=mode)
    axis.set(xlabel="radius of the unseen cluster's spirals", ylabel="accuracy")
    axis.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
