"""Fertility of 206 countries, 1960 to 2011: a network of the year with country effects.

The data are the World Bank's panel (total fertility rate, births per woman) that statsmodels ships.
Run with ``python -m armed_pyro.analysis.applications.fertility`` or ``armed-pyro demo``;
``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from statsmodels.datasets import fertility as panel

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit
from armed_pyro.analysis import figures
from armed_pyro.analysis.applications.mixedlm import MixedModel
from armed_pyro.models.dense import dense
from armed_pyro.models.linear import linear

__all__ = ["AGGREGATES", "Split", "load", "main", "split"]

# Entries of the file that are no economies: regions, groups of states and the OECD.
AGGREGATES: Mapping[str, str] = {
    "CAA": "Sub-Saharan Africa (IFC classification)",
    "LCN": "Latin America & Caribbean (all income levels)",
    "OED": "OECD members",
    "OSS": "Other small states",
    "PSS": "Pacific island small states",
}
ORIGIN = 1990  # the year in which decade = 0, to which the sd of the intercept refers
HELD_OUT = 8  # number of last years that are held out of the training countries
SHOWN = ("Brazil", "China", "Iran, Islamic Rep.", "Kenya", "Sweden", "Bangladesh", "Nigeria",
         "Korea, Rep.", "Mexico", "India", "Rwanda", "Poland", "Egypt, Arab Rep.")  # fmt: skip
SLOPE = "(1 + decade | country)"
PROB = 0.9
COMPONENTS = ["model", "statistic", "kind", "estimate", "sd", "lower", "upper"]

Forecast = Callable[[pd.DataFrame, str], pd.DataFrame]


@dataclass(frozen=True)
class Split:
    """Training rows, later years of the same countries, and countries never seen."""

    train: pd.DataFrame
    later: pd.DataFrame
    unseen: pd.DataFrame

    def tests(self) -> Iterator[tuple[dict[str, str], pd.Index]]:
        """Labels (countries, years, mode for unseen clusters) and rows of each test."""
        first, last = self.train["year"].min(), self.train["year"].max()
        early = self.unseen["year"] <= last
        spans = f"{first}-{last}", f"{last + 1}-{self.later['year'].max()}"
        yield {"countries": "seen", "years": spans[1], "mode": ""}, self.later.index
        for span, rows in zip(spans, (early, ~early), strict=True):
            for mode in ("marginal", "population"):
                labels = {"countries": "unseen", "years": span, "mode": mode}
                yield labels, self.unseen.index[rows]


def load() -> pd.DataFrame:
    """One row per country and year: country, year, decade, period, fertility.

    Aggregates and country-years without a value are left out. `decade` is (year - 1990) / 10;
    `period` names blocks of eight years, the last of which is the held-out years.

    Raises
    ------
    ValueError
        If an aggregate is missing, as in another edition of the panel.
    """
    wide = panel.load_pandas().data.set_index("Country Code")
    missing = [
        code for code, name in AGGREGATES.items() if name not in wide["Country Name"].get(code, "")
    ]
    if missing:
        raise ValueError(
            f"the panel in this statsmodels lacks the aggregates {missing}: it is another edition; "
            "check its country names and bring AGGREGATES up to date"
        )
    wide = wide.drop(index=list(AGGREGATES))
    years = [column for column in wide if str(column).isdigit()]
    long = wide.melt("Country Name", years, "year", "fertility").dropna()
    long = long.rename(columns={"Country Name": "country"}).astype({"year": int})
    last = long["year"].max()
    long["decade"] = (long["year"] - ORIGIN) / 10
    long["period"] = (long["year"] - last - 1) // HELD_OUT
    long["period"] = [f"{last + 1 + HELD_OUT * number}" for number in long["period"]]
    return long.sort_values(["country", "year"], ignore_index=True)


def split(table: pd.DataFrame, seed: int) -> Split:
    """Hold out a fifth of the countries, and the last years of the others."""
    countries = np.sort(table["country"].unique())
    unseen = np.random.default_rng(seed).choice(countries, round(len(countries) / 5), replace=False)
    is_unseen = table["country"].isin(unseen)
    is_late = table["year"] > table["year"].max() - HELD_OUT
    train, later = table[~is_unseen & ~is_late], table[~is_unseen & is_late]
    # A country that has only late values cannot be forecast, and is not among the unseen.
    return Split(train, later[later["country"].isin(train["country"])], table[is_unseen])


def train_program(
    train: pd.DataFrame, random: Sequence[str], schedule: Schedule, seed: int, hidden: Sequence[int]
) -> Fit:
    """Fit a program with a network of the decade, whose last layer is latent.

    Without hidden layers the network is linear.
    """
    torch.manual_seed(seed)
    net = dense(1, hidden=hidden) if hidden else linear(1)
    clusters = ["country", "period"] if "period" in "".join(random) else ["country"]
    data = ClusteredData.from_frame(
        train, outcome="fertility", clusters=clusters, features=["decade"]
    )
    return fit(MixedEffects(net, random, bayesian_head=True), data, schedule=schedule, seed=seed)


def forecast_with(result: Fit, draws: int = 1000) -> Forecast:
    """The fit's predictive means and intervals, as a function of rows and mode."""

    def forecast(table: pd.DataFrame, unseen: str) -> pd.DataFrame:
        made = result.predict(table, unseen=unseen, draws=draws, prob=PROB)
        lower, upper = made.interval(of="outcome")
        return table.assign(mean=made.mean, lower=lower, upper=upper)

    return forecast


def score(rows: pd.DataFrame) -> dict[str, float]:
    """Number of rows, RMSE of the mean, and coverage, mean width and mean score of the intervals.

    The interval score is (u - l) + 2 / alpha * distance of y from the interval; lower is better
    (Gneiting and Raftery 2007).
    """
    y, lower, upper = rows["fertility"], rows["lower"], rows["upper"]
    outside = (lower - y).clip(lower=0) + (y - upper).clip(lower=0)
    return {
        "rows": len(rows),
        "rmse": float(np.sqrt(((y - rows["mean"]) ** 2).mean())),
        "coverage": float((outside == 0).mean()),
        "width": float((upper - lower).mean()),
        "interval_score": float((upper - lower + 2 / (1 - PROB) * outside).mean()),
    }


def components(model: str, result: Fit | MixedModel, draws: int = 1000) -> pd.DataFrame:
    """Variance components of a model, one row per component."""
    if isinstance(result, MixedModel):
        estimates = result.components().items()
        return pd.DataFrame(
            {"model": model, "statistic": name, "kind": "REML", "estimate": value}
            for name, value in estimates
        )
    table = result.variance_components(prob=PROB, draws=draws)
    table = table[table["statistic"].isin(["sd", "cor"])]
    name = table["statistic"] + " " + table["term"]
    name = name.where(table["factor"] != "country:period", name + " of period")
    name = name.where(table["factor"] != "Residual", "residual sd")
    numbers = table[["mean", "sd", "lower", "upper"]].rename(columns={"mean": "estimate"})
    return numbers.assign(model=model, statistic=name, kind="posterior mean")[COMPONENTS]


def evaluate(
    model: str, forecast: Forecast, parts: Split
) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """Scores of each test, scores of forecasts by years ahead, autocorrelation of residuals."""
    rows = pd.concat([parts.train, parts.later, parts.unseen])
    made = {mode: forecast(rows, mode) for mode in ("marginal", "population")}
    tests = pd.DataFrame(
        {"model": model, **labels, **score(made[labels["mode"] or "marginal"].loc[index])}
        for labels, index in parts.tests()
    )
    last = parts.train["year"].max()
    ahead = pd.DataFrame(
        {"model": model, "horizon": year - last, **score(block)}
        for year, block in made["marginal"].loc[parts.later.index].groupby("year")
    )
    fitted = made["marginal"].loc[parts.train.index]
    lag1 = float(autocorrelation(fitted, (fitted["fertility"] - fitted["mean"]).to_numpy()))
    return tests, ahead.assign(lag1=lag1), lag1


def autocorrelation(rows: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """Correlation of values "... rows" with those of the next year in the same country."""
    country, year = rows["country"].to_numpy(), rows["year"].to_numpy()
    pair = (country[1:] == country[:-1]) & (year[1:] == year[:-1] + 1)
    values = values - values.mean(-1, keepdims=True)
    now, after = values[..., :-1][..., pair], values[..., 1:][..., pair]
    norm = np.sqrt((now**2).sum(-1) * (after**2).sum(-1))
    return (now * after).sum(-1) / norm


def draw_figures(
    result: Fit, parts: Split, table: pd.DataFrame, draws: int
) -> Iterator[tuple[str, Figure]]:
    """Names and figures: country effects, curves of six countries, predictive check."""
    tree = result.to_datatree(draws=draws, groups=["posterior", "posterior_predictive"])
    unit = "births per woman"
    yield (
        "country_effects",
        figures.caterpillar(
            tree["posterior"]["country_effect"],
            [f"deviation in {ORIGIN}\n({unit})", f"deviation of the slope\n({unit} per decade)"],
            prob=PROB,
        ),
    )
    yield "curves", figures.curves(
        curve_table(result, parts, table, 4 * draws),
        x="year", outcome="fertility", panel="country",
        labels=("year", f"total fertility rate ({unit})"), from_x=parts.train["year"].max() + 0.5,
    )  # fmt: skip
    y = parts.train["fertility"].to_numpy()
    replicated = tree["posterior_predictive"]["fertility"].isel(chain=0).to_numpy()
    means = result.predict(parts.train, draws=draws).mean
    yield "predictive_check", figures.predictive(
        y,
        replicated,
        (float(autocorrelation(parts.train, y - means)),
         autocorrelation(parts.train, replicated - means)),
        (f"total fertility rate ({unit})", "autocorrelation of residuals at lag 1 year"),
    )  # fmt: skip


def curve_table(result: Fit, parts: Split, table: pd.DataFrame, draws: int) -> pd.DataFrame:
    """Predictions for four seen and two unseen countries, in every year."""
    counts = table.groupby("country").size()
    full = set(counts.index[counts == counts.max()])
    known = [*SHOWN, *sorted(full)]
    seen = [name for name in known if name in full & set(parts.train["country"])][:4]
    unseen = [name for name in known if name in full & set(parts.unseen["country"])][:2]
    rows = pd.concat([table[table["country"] == name] for name in [*seen, *unseen]])
    rows = forecast_with(result, draws)(rows, "marginal")
    rows["unseen"] = rows["country"].isin(unseen)
    rows["held_out"] = rows["unseen"] | (rows["year"] > parts.train["year"].max())
    # A country that does not exist is unseen, so its `population` prediction is the curve.
    nobody = rows.assign(country="(population)", period=rows["period"].iloc[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no cluster of 'country'")
        rows["population"] = result.predict(nobody, unseen="population", draws=draws).mean
    return rows


def show(console: Console, title: str, table: pd.DataFrame, index: list[str], value: str) -> None:
    """Print a column of a long table, with one column per model."""
    wide = table.set_index([*index, "model"])[value].unstack("model", sort=False)  # noqa: PD010
    view = Table(title=title, title_justify="left", title_style="bold")
    view.add_column(", ".join(index), no_wrap=True)
    for name in wide:
        view.add_column(str(name).replace(" ", "\n", 1), justify="right")
    for label, row in wide.iterrows():
        cells = ["" if np.isnan(cell) else f"{cell:.3f}" for cell in row]
        view.add_row(label if isinstance(label, str) else " ".join(label), *cells)
    console.print(view)


def main(argv: list[str] | None = None) -> None:
    """Fit, compare with MixedLM and check; write tables, figures and the fit."""
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.applications.fertility", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/fertility"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=3000, help="most steps of a fit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, nets and draws")
    parser.add_argument("--smoke", action="store_true", help="few countries and steps: a trial")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    # In steps of a few milliseconds, threads wait for each other longer than they compute.
    torch.set_num_threads(1)
    try:
        analyse(options.out, options.seed, options.steps, smoke=options.smoke)
    finally:
        torch.set_num_threads(threads)


def analyse(out: Path, seed: int, steps: int, *, smoke: bool) -> None:
    """Fit all models, and print and write their results."""
    console, draws = Console(markup=False, emoji=False), 100 if smoke else 1000
    out.mkdir(parents=True, exist_ok=True)

    table = load()
    if smoke:
        table = table[table["country"].isin(sorted(table["country"].unique())[::6])]
    parts = split(table, seed)
    introduce(console, table, parts)

    fits, forecasts, spread = fit_models(parts, min(steps, 60) if smoke else steps, draws, seed)
    progress = track(forecasts.items(), "evaluating", console=console)
    scores = {name: evaluate(name, forecast, parts) for name, forecast in progress}
    evaluation, ahead = (
        pd.concat([part[place] for part in scores.values()], ignore_index=True) for place in (0, 1)
    )
    tables = {"variance_components": spread, "evaluation": evaluation, "horizons": ahead}
    show(console, "Variance components (births per woman, per decade; posterior means or REML)",
         spread, ["statistic"], "estimate")  # fmt: skip
    tests = ["countries", "years", "mode"]
    show(console, "RMSE of held-out rows (births per woman)", evaluation, tests, "rmse")
    show(console, f"Coverage of their {PROB:.0%} intervals", evaluation, tests, "coverage")
    residual = {name: part[2] for name, part in scores.items()}
    console.print(note(evaluation, ahead, residual))

    for name, written in tables.items():
        written.to_csv(out / f"{name}.csv", index=False)
    fits["network"].save(out / "run")
    with plt.rc_context(figures.STYLE):
        drawn = dict(draw_figures(fits["network"], parts, table, draws))
        drawn["horizons"] = figures.horizons(ahead, label="RMSE (births per woman)")
        for name, figure in drawn.items():
            figure.savefig(out / f"{name}.png")
            plt.close(figure)
    console.print("\nWritten:")
    for path in sorted(out.iterdir()):
        console.print(f"  {path}{'/' if path.is_dir() else ''}", soft_wrap=True, highlight=False)


def fit_models(
    parts: Split, steps: int, draws: int, seed: int
) -> tuple[dict[str, Fit], dict[str, Forecast], pd.DataFrame]:
    """Fits of three programs; forecasts and variance components of these and of two MixedLMs."""
    console = Console(markup=False, emoji=False)
    # All rows in each step: for so few rows that is cheaper than the noise of mini-batches.
    schedule = Schedule(steps=steps, batch_size=len(parts.train))
    plans = {
        "network": ([SLOPE], (16, 8), schedule, draws),
        "linear": ([SLOPE], (), schedule, draws),
        # The joint posterior of two factors is expensive, hence fewer steps and draws.
        "linear + periods": (
            [SLOPE, "(1 | country:period)"], (),
            replace(schedule, steps=min(steps, 500)), draws // 4,
        ),
    }  # fmt: skip
    fits: dict[str, Fit] = {}
    forecasts: dict[str, Forecast] = {}
    spread = []
    for name, (random, hidden, how, n) in plans.items():
        console.print(Text.assemble("\n", (name, "bold"), f": {' + '.join(random)}"))
        fits[name] = train_program(parts.train, random, how, seed, hidden)
        forecasts[name] = forecast_with(fits[name], n)
        spread.append(components(name, fits[name], n))
    # A natural cubic spline is linear beyond the data, where a B-spline would stay cubic.
    for name, mean in (("MixedLM linear", "decade"), ("MixedLM spline", "0 + cr(decade, df=5)")):
        console.print(Text.assemble("\n", (name, "bold"), f": {mean}"))
        classical = MixedModel(parts.train, "fertility", "country", mean, "decade", prob=PROB)
        forecasts[name] = classical.forecast
        spread.append(components(name, classical))
    return fits, forecasts, pd.concat(spread, ignore_index=True)


def introduce(console: Console, table: pd.DataFrame, parts: Split) -> None:
    """Print what the data are, what was left out and what is held out."""
    years = table["year"]
    cells = table["country"].nunique() * years.nunique()
    console.print(
        f"Total fertility rate, births per woman, {years.min()}-{years.max()}; later years have "
        f"no value.\nLeft out as aggregates: {'; '.join(AGGREGATES.values())}.\n"
        f"{table['country'].nunique()} countries have values, in {len(table)} country-years. "
        f"{cells - len(table)} others are missing\n"
        "and left out, which a mixed model allows if they are missing at random.\n"
        f"Time is in decades since {ORIGIN}, so the sd of the intercept is that between countries "
        f"in {ORIGIN}, not in the year 0.\n"
        f"Training: {parts.train['country'].nunique()} countries to {parts.train['year'].max()}, "
        f"{len(parts.train)} rows. Held out: their later years ({len(parts.later)} rows), and "
        f"{parts.unseen['country'].nunique()} whole countries ({len(parts.unseen)} rows).",
        highlight=False,
    )


def note(evaluation: pd.DataFrame, ahead: pd.DataFrame, residual: Mapping[str, float]) -> str:
    """The assumptions that the checks find to fail, in words."""
    seen = evaluation[evaluation["countries"] == "seen"].set_index("model")["coverage"]
    by = ahead.set_index(["model", "horizon"])["coverage"]
    error = evaluation[evaluation["countries"] == "seen"].set_index("model")["rmse"]
    new = evaluation[evaluation["mode"] == "marginal"].set_index(["model", "years"])["coverage"]
    far, periods = ahead["horizon"].max(), "linear + periods"
    held = ", ".join(f"{value:.0%} ({years})" for years, value in new["network"].items())
    return (
        "\nWhere the assumptions fail. The model takes the residuals of a country to "
        f"be independent, but their autocorrelation at lag 1 is {residual['network']:.2f}: "
        "countries leave their straight lines for decades, and many values were interpolated "
        "between surveys before they were published. The posterior of a country's line is then "
        f"too certain: {PROB:.0%} intervals of forecasts hold {seen['network']:.0%} "
        f"({by['network', 1]:.0%} one year ahead, {by['network', far]:.0%} after {far}). MixedLM "
        f"has the same fault: {seen['MixedLM linear']:.0%} (linear) and "
        f"{seen['MixedLM spline']:.0%} (spline).\n"
        "A random intercept for every eight years of a country, (1 | country:period), absorbs "
        f"dependence within periods. Coverage is then {seen[periods]:.0%}, with an RMSE of "
        f"{error[periods]:.2f} against {error['linear']:.2f} and a remaining autocorrelation of "
        f"{residual[periods]:.2f}. It is a remedy, not a model of how fertility changes.\n"
        "For an unseen country the variance between countries dominates: `marginal` intervals hold "
        f"{held}, as far as so few countries can tell. But births cannot be negative and their "
        "spread changes over time, which a gaussian outcome ignores. `population` intervals are "
        "those of an average country, not a forecast for a new one."
    )


if __name__ == "__main__":
    main()
