"""Simulation-based calibration: whether fits recover parameters drawn from the program's prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from armed_pyro._messages import check_probability
from armed_pyro._optional import extra
from armed_pyro._plotting import ACCENT, FAINT, INK, PLAIN, tidy
from armed_pyro.checks import rank_tests
from armed_pyro.checks.simulation import (
    Recovered,
    Recovery,
    check_censoring_is_known,
    check_outcomes,
    held,
)
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.train import progress_bar
from armed_pyro.program.model import MixedEffects

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["SimulationCalibration", "simulation_calibration"]

PROB = 0.99  # probability with which an exact posterior passes
MOST_FAILED = 0.01  # largest share of failed fits that passes
MOST_PANELS = 24
MOST_LINES = 5
ALARM = "#c53030"


@dataclass(frozen=True, eq=False)
class SimulationCalibration:
    """Ranks of true values among posterior draws: uniform if the posteriors are exact.

    Attributes
    ----------
    ranks : pandas.DataFrame
        Number of draws below the truth, 0 to `draws`; one row per simulation whose fit succeeded,
        one column per quantity.
    draws : int
        Posterior draws of each fit.
    errors : tuple of str
        Errors of the fits that failed.
    unconverged : int
        Fits whose steps ran out before they converged.

    Examples
    --------
    >>> ranks = pd.DataFrame({"site_sd[Intercept]": np.arange(100)})
    >>> print(SimulationCalibration(ranks, draws=99))
    calibrated: 1 quantity in 100 simulations, 99 draws each; smallest adjusted p = 1
    """

    ranks: pd.DataFrame
    draws: int
    errors: tuple[str, ...] = ()
    unconverged: int = 0

    @property
    def simulations(self) -> int:
        """Number of simulations, including those whose fit failed."""
        return len(self.ranks) + self.failed

    @property
    def failed(self) -> int:
        """Number of simulations whose fit failed; they have no ranks."""
        return len(self.errors)

    @property
    def passed(self) -> bool:
        """Whether all quantities pass at 99% and at most 1% of the fits failed; see `table`."""
        few = self.failed <= MOST_FAILED * self.simulations
        return few and bool(self.table()["passed"].all())

    def table(self, *, prob: float = PROB) -> pd.DataFrame:
        """Tests of every quantity's ranks, one row per quantity.

        p_chi2 is of the chi-square test of binned ranks, p_ecdf of the test of the ECDF, and
        inside_band says whether the ECDF stays in its simultaneous band. coverage_50 and
        coverage_90 are of the central intervals, with Monte Carlo standard errors se_50 and se_90.
        z_rank is positive if the draws lie too low. p_adjusted combines the two tests, with Holm's
        correction for the number of quantities; passed says whether it exceeds 1 - prob. An exact
        posterior passes with probability `prob`: each quantity's ECDF band, and all quantities'
        verdicts together.

        Raises
        ------
        ValueError
            If `prob` is not between 0 and 1.
        """
        check_probability(prob)
        records = []
        for quantity in self.ranks:
            ranks = self.ranks[quantity].to_numpy()
            p_ecdf = rank_tests.ecdf(ranks, self.draws)
            record = {"quantity": quantity, "p_chi2": rank_tests.chi_square(ranks, self.draws)}
            record |= {"p_ecdf": p_ecdf, "inside_band": p_ecdf > 1 - prob}
            for p in (50, 90):
                share, error = rank_tests.coverage(ranks, self.draws, p / 100)
                record |= {f"coverage_{p}": share, f"se_{p}": error}
            records.append(record | {"z_rank": rank_tests.bias(ranks, self.draws)})
        table = pd.DataFrame(records).set_index("quantity")
        smaller = np.minimum(table["p_chi2"].to_numpy(), table["p_ecdf"].to_numpy())
        table["p_adjusted"] = rank_tests.holm((2 * smaller).clip(max=1))
        table["passed"] = table["p_adjusted"] > 1 - prob
        table.attrs["prob"] = prob
        return table

    def __str__(self) -> str:
        table = self.table()
        wrong = table[~table["passed"]].sort_values("p_adjusted")
        lines = [
            f"{'calibrated' if self.passed else 'NOT calibrated'}: "
            f"{f'{len(wrong)} of ' if len(wrong) else ''}{len(table)} "
            f"quantit{'y' if len(table) == 1 else 'ies'} in {self.simulations} simulations, "
            f"{self.draws} draws each; smallest adjusted p = {table['p_adjusted'].min():.2g}"
        ]
        lines += [
            f"  {quantity}: adjusted p = {row['p_adjusted']:.2g}, 90% intervals hold "
            f"{row['coverage_90']:.0%} of the truths (se {row['se_90']:.1%}): {_reading(row)}"
            for quantity, row in wrong.head(MOST_LINES).iterrows()
        ]
        if len(wrong) > MOST_LINES:
            lines.append(f"  and {len(wrong) - MOST_LINES} more, see table()")
        if self.errors:
            fits = "1 fit" if self.failed == 1 else f"{self.failed} fits"
            lines.append(f"  {fits} failed, the first: {self.errors[0]}")
        if self.unconverged:
            lines.append(f"  {self.unconverged} fits had not converged when their steps ran out")
        return "\n".join(lines)

    def plot(self, *, prob: float = PROB) -> Figure:
        """Histogram of every quantity's ranks, with a simultaneous band for uniform ranks.

        With uniform ranks, all bars of a panel lie in the band with probability `prob`. A hump in
        the middle means that posteriors are too wide, humps at the ends that they are too narrow,
        a slope that they are biased. Red panels fail the test of `table`. The plot shows at most
        24 quantities, those with the smallest adjusted p-values.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        mpl = extra("matplotlib", "plotting")
        from matplotlib.figure import Figure

        table = self.table(prob=prob)
        worst = table["p_adjusted"].sort_values(kind="stable").index[:MOST_PANELS]
        shown = [quantity for quantity in table.index if quantity in worst]
        columns = min(4, len(shown))
        height = -(-len(shown) // columns)
        edges = rank_tests.bin_edges(len(self.ranks), self.draws)
        low, high = rank_tests.bin_band(len(self.ranks), self.draws, prob)
        expected = np.diff(edges) * len(self.ranks) / (self.draws + 1)
        with mpl.rc_context({**PLAIN, "axes.edgecolor": FAINT}):
            size = (2.4 * columns + 0.6, 1.6 * height + 0.8)
            figure = Figure(figsize=size, layout="constrained")
            grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
            for axes, quantity in zip(grid.flat, shown, strict=False):
                bars = np.histogram(self.ranks[quantity], edges)[0]
                passed = bool(table.loc[quantity, "passed"])
                color = ACCENT if passed else ALARM
                axes.stairs(bars, edges, fill=True, color=color, alpha=0.25)
                axes.stairs(bars, edges, color=color, lw=1.2)
                axes.stairs(high, edges, baseline=low, fill=True, color=FAINT, alpha=0.35, zorder=0)
                axes.stairs(expected, edges, baseline=None, color=INK, lw=0.8)
                axes.set_title(_short(quantity), fontsize=8.5, color=INK if passed else ALARM)
                axes.set(xlim=(0, self.draws + 1), xticks=[0, self.draws + 1])
                axes.margins(y=0.08)
                tidy(axes)
            for axes in grid.flat[len(shown) :]:
                axes.set_visible(False)
            grid[0, 0].set_ylim(bottom=0)
            notes = [f"draws below the truth, of {self.draws}"]
            notes.append(f"grey: {prob:.0%} band of uniform ranks")
            if len(shown) < len(table):
                notes.append(f"the worst {len(shown)} of {len(table)} quantities")
            figure.supxlabel(("; " if columns > 2 else "\n").join(notes), fontsize=9, color=INK)
            figure.supylabel(f"simulations, of {len(self.ranks)}", fontsize=9, color=INK)
        return figure

    def to_json(self) -> dict[str, Any]:
        """Verdict, table and ranks as JSON values."""
        return {
            "passed": self.passed,
            "simulations": self.simulations,
            "failed": self.failed,
            "draws": self.draws,
            "errors": list(self.errors),
            "unconverged": self.unconverged,
            "table": self.table().reset_index().to_dict("list"),
            "simulation": self.ranks.index.tolist(),
            "ranks": self.ranks.to_dict("list"),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SimulationCalibration:
        """The result that `to_json` wrote."""
        index = pd.Index(values["simulation"], name="simulation")
        ranks = pd.DataFrame(values["ranks"], index)
        return cls(ranks, values["draws"], tuple(values["errors"]), values["unconverged"])


def _short(name: str, most: int = 32) -> str:
    """A panel's title: the name, without its middle if it is long."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"


def _reading(row: pd.Series) -> str:
    """The fault of the posteriors that the ranks indicate."""
    width = (row["coverage_90"] - 0.9) / row["se_90"], (row["coverage_50"] - 0.5) / row["se_50"]
    signs = {
        "posteriors too narrow": min(width) < -2.5,
        "posteriors too wide": max(width) > 2.5,
        "draws too low": row["z_rank"] > 2.5,
        "draws too high": row["z_rank"] < -2.5,
    }
    return ", ".join(sign for sign, seen in signs.items() if seen) or "ranks not uniform"


def simulation_calibration(
    model: MixedEffects,
    data: ClusteredData,
    *,
    simulations: int = 300,
    draws: int = 99,
    schedule: Schedule | None = None,
    refine: bool = True,
    workers: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> SimulationCalibration:
    r"""Ranks of prior draws among the posterior draws of fits to data drawn given them.

    .. math:: p(\theta) = \int p(\theta \mid y) \, p(y \mid \tilde\theta) \, p(\tilde\theta) \,
              dy \, d\tilde\theta

    Draw :math:`\tilde\theta` from the prior, y from the program given :math:`\tilde\theta`, and
    :math:`\theta_1, \dots, \theta_L` from the exact posterior. The number of
    :math:`f(\theta_l) < f(\tilde\theta)` is then uniform on 0, ..., L for every quantity f. The
    quantities, in standardised units, are every sd, correlation, parameter of the family and
    latent fixed effect; the random effects of the first, middle and last cluster of each factor;
    and the log-likelihood of the data. The last detects faults that no marginal shows: a posterior
    that ignores the data has uniform ranks in every marginal.

    The program is laid out for `data` once. Its centre, spread and priors are the same in all
    simulations, and so are features, clusters, trials and offset. Weights of the network that are
    not latent are fixed, its layers are in evaluation mode, and there are no adversaries. Fits run
    on the CPU with one thread each.

    Parameters
    ----------
    model : MixedEffects
        The program, or the program of a fit (``fit.model``).
    data : ClusteredData
        The rows; their outcome sets scales only. Weights must be 0 or 1, because no distribution
        of outcomes has a likelihood with other weights.
    simulations : int
        Data sets drawn and fitted. With ten quantities, 300 detect a posterior sd that is 25% too
        small in 9 of 10 cases; 1,000 detect one that is 15% too small.
    draws : int
        Posterior draws L of each fit. Bins are even if L + 1 is a multiple of 20.
    schedule : Schedule, optional
        Of each fit's training.
    refine : bool
        Whether the guide's draws are importance weighted, as in `fit`. If False, the guide itself
        is judged.
    workers : int
        Processes that fit. The result does not depend on their number.
    seed : int
        Seed from which the simulations' seeds are derived.

    Raises
    ------
    ValueError
        Before the fits begin, if an argument is out of range, nothing is latent, or outcomes
        drawn from the prior are not finite or are counts above 1e9.
    RuntimeError
        If every fit failed.

    References
    ----------
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv 1804.06788; Modrák et al. (2023),
    Bayesian Analysis; Säilynoja, Bürkner, Vehtari (2022), Statistics and Computing 32.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import HalfNormal, Priors
    >>> y, site = np.random.default_rng(0).normal(size=20), np.arange(20) % 4
    >>> data = ClusteredData.from_arrays(np.zeros((20, 0)), y, {"site": site})
    >>> priors = Priors(sd=HalfNormal(1.0), residual_sd=HalfNormal(1.0))
    >>> model = MixedEffects(nn.Linear(0, 1), "(1 | site)", priors=priors, bayesian_head=True)
    >>> result = simulation_calibration(  # real use needs more simulations, draws and steps
    ...     model, data, simulations=10, draws=9, schedule=Schedule(steps=5), progress=False
    ... )
    >>> list(result.ranks)[:3]
    ['site_sd[Intercept]', 'site_effect[0,Intercept]', 'site_effect[2,Intercept]']
    """
    from joblib import Parallel, delayed  # slow to import

    least = {"simulations": (simulations, 10), "draws": (draws, 9), "workers": (workers, 1)}
    for name, (value, smallest) in (least | {"seed": (seed, 0)}).items():
        if value < smallest:
            raise ValueError(f"`{name}` must be at least {smallest}, not {value}")
    frequencies = data.weights if data.weights_kind == "frequency" else None
    if frequencies is not None and bool(((frequencies != 0) & (frequencies != 1)).any()):
        raise ValueError(
            "the data have weights other than 0 and 1: no outcomes can be drawn whose likelihood "
            "is the weighted one; calibrate without them: dataclasses.replace(data, weights=None)"
        )
    check_censoring_is_known(data)
    settings = Schedule() if schedule is None else schedule
    recovery = Recovery(held(model, data), data, draws, settings, refine, seed)
    check_outcomes(recovery, simulations)
    results: list[Recovered] = []
    tasks = (delayed(recovery.run)(number) for number in range(simulations))
    with progress_bar("calibrating", "fit", simulations, progress) as report:
        for result in Parallel(workers, backend="loky", return_as="generator")(tasks):
            results.append(result)
            failed = sum(bool(result.error) for result in results)
            report(len(results), f"{failed} failed" if failed else "")
    errors = [f"simulation {i}: {result.error}" for i, result in enumerate(results) if result.error]
    ranks = {i: result.ranks for i, result in enumerate(results) if not result.error}
    if not ranks:
        raise RuntimeError(f"all {simulations} fits failed, the first in {errors[0]}")
    table = pd.DataFrame.from_dict(ranks, orient="index").rename_axis("simulation")
    unconverged = sum(not result.error and not result.converged for result in results)
    return SimulationCalibration(table, draws, tuple(errors), unconverged)
