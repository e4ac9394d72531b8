"""Coverage of 90% intervals of networks fitted by default, for rows and clusters not seen.

Each table is drawn with known truth: standard normal or uniform features, a random intercept of sd
1 and a residual sd of 1. The network is `dense` with its default widths, far too large for the
smaller tables. "seen" are new rows of the clusters of training, "new" are rows of 40 new clusters;
"ensemble" adds the networks' disagreement to the intervals of new clusters.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from joblib import Parallel, delayed

from armed_pyro import ClusteredData, Fit, MixedEffects, fit
from armed_pyro.models.dense import dense

__all__ = ["TABLES", "Table", "coverage", "main", "summary"]

FEATURES = 5
NEW_CLUSTERS, TEST_ROWS = 40, 20
Array = Float[np.ndarray, "rows ..."]


@dataclass(frozen=True)
class Table:
    """A table of equal clusters.

    Attributes
    ----------
    clusters, rows : int
        Number of clusters, and of training rows in each.
    fixed : callable
        Fixed effects of the features "rows features".
    """

    clusters: int
    rows: int
    fixed: Callable[[Array], Array]

    def draw(self, seed: int) -> dict[str, ClusteredData]:
        """Rows for training, and new rows of seen and of new clusters."""
        rng = np.random.default_rng(seed)
        sizes = {
            "training": (np.arange(self.clusters), self.rows),
            "seen": (np.arange(self.clusters), TEST_ROWS),
            "new": (self.clusters + np.arange(NEW_CLUSTERS), TEST_ROWS),
        }
        effects = rng.normal(size=self.clusters + NEW_CLUSTERS)
        tables = {}
        for name, (labels, rows) in sizes.items():
            cluster = np.repeat(labels, rows)
            x = rng.normal(size=(len(cluster), FEATURES))
            y = self.fixed(x) + effects[cluster] + rng.normal(size=len(cluster))
            tables[name] = ClusteredData.from_arrays(x, y, {"cluster": cluster})
        return tables


def weak(x: Array) -> Array:
    """A slope of 0.3 on one of the features."""
    return 0.3 * x[:, 0]


def curved(x: Array) -> Array:
    """A wave, a parabola and a product."""
    return np.sin(2 * x[:, 0]) + 0.5 * x[:, 1] ** 2 + x[:, 2] * x[:, 3]


TABLES: Mapping[str, Table] = {
    "10 x 10, weak slope": Table(10, 10, weak),
    "40 x 25, weak slope": Table(40, 25, weak),
    "40 x 25, curved": Table(40, 25, curved),
    "100 x 40, curved": Table(100, 40, curved),
}


def coverage(name: str, seed: int, validation: Literal["auto"] | None = "auto") -> dict[str, Any]:
    """Coverage and root mean squared error of one table, the verdict, and the time of the fit."""
    tables = TABLES[name].draw(seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = MixedEffects(dense(FEATURES), "(1 | cluster)")
        result = fit(model, tables["training"], validation=validation, seed=seed, progress=False)
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"table": name, "seed": seed, "validation": validation or "none"}
        row["seen"], row["seen_rmse"] = _scored(result, tables["seen"])
        row["new"], row["new_rmse"] = _scored(result, tables["new"], unseen="marginal")
        ensemble = {"unseen": "marginal", "network_uncertainty": "ensemble"}
        row["new, ensemble"], _ = _scored(result, tables["new"], **ensemble)
        row["verdict"] = result.diagnostics().model.word
    return {**row, "seconds": seconds, "steps": sum(result.history.fold_steps)}


def _scored(result: Fit, rows: ClusteredData, **options: Any) -> tuple[float, float]:
    """Coverage of 90% intervals, and root mean squared error."""
    assert rows.outcome is not None  # for mypy; the table was drawn with it
    predicted, y = result.predict(rows, draws=1000, **options), rows.outcome.numpy()
    lower, upper = np.quantile(predicted.outcome, [0.05, 0.95], axis=0)
    error = predicted.expected.mean(0).reshape(-1) - y
    return float(((lower <= y) & (y <= upper)).mean()), float(np.sqrt((error**2).mean()))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means with standard errors over the seeds, and the share of fits whose verdict fails."""
    measures = ["seen", "new", "new, ensemble", "seen_rmse", "new_rmse", "seconds"]
    groups = rows.groupby(["table", "validation"], sort=False)
    means, errors = groups[measures].mean(), groups[measures].sem()
    table = means.round(3).astype(str) + " (" + errors.round(3).astype(str) + ")"
    failed = (rows.verdict == "fail").groupby([rows.table, rows.validation], sort=False).mean()
    # A verdict that passes over intervals that hold less than they must.
    least = np.where(rows.table.str.startswith("10 x 10"), 0.8, 0.85)
    silent = (rows.verdict != "fail") & (rows.seen < least)
    missed = silent.groupby([rows.table, rows.validation], sort=False).mean()
    return table.assign(failed=failed, **{"passed too low": missed}).reset_index()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line: print the summary, and write one row per fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="tables of each kind")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--without", action="store_true", help="also without held-out rows")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/network_coverage"))
    parser.add_argument("--smoke", action="store_true", help="one small table only")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seeds, options.tables = 1, options.tables[:1]
    ways: list[Literal["auto"] | None] = ["auto", None] if options.without else ["auto"]
    jobs = [(t, seed, way) for t in options.tables for way in ways for seed in range(options.seeds)]
    rows = pd.DataFrame(Parallel(options.workers)(delayed(coverage)(*job) for job in jobs))
    options.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.out / "fits.csv", index=False)
    print(summary(rows).to_string(index=False))


if __name__ == "__main__":
    main()
