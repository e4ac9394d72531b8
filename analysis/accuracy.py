"""How good the variance components are: against NUTS, known truth, and the program itself.

    python -m armed_pyro.analysis.accuracy --data FOLDER     # sleepstudy, Penicillin, cbpp
    python -m armed_pyro.analysis.accuracy                   # what needs no files
    python -m armed_pyro.analysis.accuracy --smoke           # a minute, to see that it runs

Writes tables, a figure of rank histograms for each family, and `accuracy.csv`, one line a claim.
What is finished is kept: a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from armed_pyro import (
    ClusteredData,
    HalfNormal,
    MixedEffects,
    Priors,
    Schedule,
    SimulationCalibration,
    simulation_calibration,
)
from armed_pyro.analysis import reference, replication
from armed_pyro.data.simulate import mixed_model
from armed_pyro.families.registry import FAMILIES
from armed_pyro.models.linear import linear

OUT = Path("results/accuracy")
# Limits that the tables are held against.
Z, RATIO, BIAS, COVERAGE = 0.1, (0.9, 1.1), 0.05, (0.85, 0.95)
TIME = 1 / 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts, print the table of claims and write everything."""
    options = _parser().parse_args(arguments)
    out, console = Path(options.out), Console(width=120)
    out.mkdir(parents=True, exist_ok=True)
    scale = 0.02 if options.smoke else 1.0
    claims: list[dict[str, Any]] = []
    if options.data is not None:
        claims += against_nuts(Path(options.data), out, options.workers, smoke=options.smoke)
    claims += against_truth(out, round(100 * scale), options.workers, smoke=options.smoke)
    claims += calibrated(out, max(10, round(300 * scale)), options.workers)
    claims += warned(out, 1 if options.smoke else 5)
    table = pd.DataFrame(claims)
    table.to_csv(out / "accuracy.csv", index=False)
    console.print(table.to_string(index=False, float_format="{:.3f}".format), markup=False)
    met = int(table["met"].sum())
    console.print(f"\n{met} of {len(table)} claims are met. Tables and figures are in {out}")


def claim(
    what: str, value: float, limit: str, met: bool, error: float = float("nan")
) -> dict[str, Any]:
    """One line of the table: a figure, its standard error, its limit, and whether it is met."""
    return {"claim": what, "value": value, "se": error, "limit": limit, "met": bool(met)}


def against_nuts(folder: Path, out: Path, workers: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Means, sds and random effects beside NUTS; the time both took to the same error."""
    path = out / "reference_summary.csv"
    if not path.exists():
        sizes = {"draws": 40, "warmup": 40} if smoke else {"draws": 4000, "warmup": 400}
        found = reference.compare_all(folder, workers=workers, **sizes)
        pd.concat([one.table for one in found]).to_csv(out / "reference.csv", index=False)
        pd.DataFrame([one.summary for one in found]).to_csv(path, index=False)
    for row in pd.read_csv(path).to_dict("records"):
        data, low, high = row["data"], *RATIO
        yield claim(f"{data}: NUTS R-hat", row["nuts_r_hat"], "< 1.01", row["nuts_r_hat"] < 1.01)
        yield claim(
            f"{data}: sds, correlations, worst |z| of the mean",
            row["max_z"],
            f"<= {Z}",
            row["max_z"] <= Z,
        )
        for name, what in (("sd_ratio", "posterior sds"), ("effects_ratio", "random effects' sds")):
            worst = max((row[f"{name}_low"], row[f"{name}_high"]), key=lambda one: abs(one - 1))
            met = low <= row[f"{name}_low"] and row[f"{name}_high"] <= high
            yield claim(f"{data}: {what}, worst ratio to NUTS", worst, f"{low} to {high}", met)
        rms = row["effects_rms_z"]
        yield claim(f"{data}: random effects, rms z", rms, f"<= {Z}", rms <= Z)
        yield claim(f"{data}: k-hat", row["k_hat"], "< 0.7", row["k_hat"] < 0.7)
        yield claim(f"{data}: verdict", 1.0, "pass", row["verdict"] == "pass")
        if data == "sleepstudy":
            ratio = row["time_ratio"]
            yield claim("sleepstudy: time over NUTS', same error", ratio, "<= 0.2", ratio <= TIME)


def against_truth(out: Path, n: int, workers: int, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Relative bias and coverage in designs with known truth."""
    folder = out / "replications"
    folder.mkdir(exist_ok=True)
    designs = replication.DESIGNS[:2] if smoke else replication.DESIGNS
    tables = [
        replication.replications(design, folder, max(2, n), workers=workers) for design in designs
    ]
    table = replication.summary(pd.concat(tables))
    table.to_csv(out / "replications.csv", index=False)
    for row in table.to_dict("records"):
        what, low, high = f"{row['design']}: {row['parameter']}", *COVERAGE
        # Judged beyond two standard errors: of 100 replications, exact 90% intervals hold fewer
        # than 85 once in twenty times.
        if str(row["parameter"]).startswith("sd["):
            met = abs(row["bias"]) - 2 * row["bias_se"] <= BIAS
            yield claim(f"{what}, bias of the median", row["bias"], "<= 5%", met, row["bias_se"])
        exact = (0.9 * 0.1 / row["replications"]) ** 0.5
        met = low - 2 * exact <= row["coverage"] <= high + 2 * exact
        limit = f"{low} to {high}"
        yield claim(f"{what}, 90% interval holds", row["coverage"], limit, met, row["coverage_se"])


def calibrated(out: Path, simulations: int, workers: int) -> Iterator[dict[str, Any]]:
    """Simulation-based calibration of every family, with a figure of its rank histograms."""
    import matplotlib.pyplot as plt

    for family in FAMILIES:
        path = out / f"calibration_{family}.json"
        if path.exists():
            found = SimulationCalibration.from_json(json.loads(path.read_text("utf-8")))
        else:
            model, data = program(family)
            found = simulation_calibration(
                model,
                data,
                simulations=simulations,
                schedule=Schedule(window=10),
                workers=workers,
                seed=1,
            )
            path.write_text(json.dumps(found.to_json()), encoding="utf-8")
        found.table().to_csv(out / f"calibration_{family}.csv")
        figure = found.plot()
        figure.savefig(out / f"calibration_{family}.png", dpi=120)
        plt.close(figure)
        worst = float(found.table()["p_adjusted"].min())
        yield claim(f"calibration of {family}: adjusted p", worst, "> 0.01", found.passed)


def program(family: str) -> tuple[MixedEffects, ClusteredData]:
    """The program that is calibrated, and the rows whose outcomes are drawn from it."""
    coefficients = np.zeros((2, 2)) if family == "categorical" else (0.0, 0.0)
    data, _ = mixed_model(family, 12, 6, sd=(0.5,), coefficients=coefficients, seed=3)
    counts = family in ("poisson", "negative_binomial")
    priors = Priors(sd=HalfNormal(0.5 if counts else 1.0), fixed_sd=0.5 if counts else 1.0)
    net = linear(1, 3 if family == "categorical" else 1)
    return MixedEffects(net, "(1 | site)", family, priors=priors, bayesian_head=True), data


def warned(out: Path, n: int) -> Iterator[dict[str, Any]]:
    """Fits that cannot be trusted must not pass."""
    path = out / "verdicts.csv"
    if not path.exists():
        replication.verdicts(replication.BAD, n).to_csv(path, index=False)
    for name, part in pd.read_csv(path).groupby("case", sort=False):
        share = float((part["verdict"] != "pass").mean())
        yield claim(f"{name}: share of fits with warn or fail", share, "1", share == 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", help="folder with sleepstudy.csv, penicillin.csv and cbpp.csv")
    parser.add_argument("--out", default=str(OUT), help=f"folder to write to [{OUT}]")
    parser.add_argument("--workers", type=int, default=2, help="processes [2]")
    parser.add_argument("--smoke", action="store_true", help="few repetitions, to see that it runs")
    return parser


if __name__ == "__main__":
    main()
