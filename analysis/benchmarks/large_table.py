"""A table larger than memory: rows in many clusters with known sds, written to Parquet in chunks.

The first command writes the table and prints the truth. The second fits it within 2 GB. The third
compares the posteriors of a streamed fit and of a fit in memory to the rows of 2000 clusters:

    python -m armed_pyro.analysis.benchmarks.large_table --rows 20000000 --out rows.parquet
    armed-pyro fit rows.parquet --outcome y --random "(1 + x0 | g)" --memory 2GB --out run
    python -m armed_pyro.analysis.benchmarks.large_table --compare 2000 --out rows.parquet
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from armed_pyro import ClusteredData, Fit, MixedEffects, StreamedData, fit
from armed_pyro.models.linear import linear

__all__ = ["agreement", "coefficients", "write"]

CHUNK = 500_000
SORTED_AT_ONCE = 2**24  # bytes of memory for a streamed fit, few enough that it sorts in parts
INTERCEPT_SD, SLOPE_SD, CORRELATION, RESIDUAL_SD = 0.8, 0.4, 0.3, 1.0


def write(
    path: Path, rows: int, clusters: int, *, features: int = 20, family: str = "gaussian", seed: int
) -> None:
    r"""Write y = x'beta + u_0g + u_1g x_0 + noise, clusters in random order.

    .. math:: u_g \sim N(0, D), \quad sd = (0.8, 0.4), \quad cor = 0.3, \quad
        \beta_j = j / F - 1 / 2

    The features are standard normal, except that x1 has mean 50 and sd 10 and a tenth of the beta.
    The noise has sd 1, or the logistic distribution for "bernoulli". The same seed gives the same
    file.
    """
    rng = np.random.default_rng([seed, 0])
    low = np.linalg.cholesky([[1.0, CORRELATION], [CORRELATION, 1.0]])
    effects = rng.normal(size=(clusters, 2)) @ low.T * [INTERCEPT_SD, SLOPE_SD]
    beta = coefficients(features)
    names = [f"x{place}" for place in range(features)]
    schema = pa.schema(
        [("y", pa.float32()), ("g", pa.int32()), *((n, pa.float32()) for n in names)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema, compression="NONE", use_dictionary=False) as writer:
        for chunk, start in enumerate(range(0, rows, CHUNK)):
            rng = np.random.default_rng([seed, 1, chunk])
            n = min(CHUNK, rows - start)
            x = rng.standard_normal((n, features), dtype=np.float32)
            x[:, 1] = 50 + 10 * x[:, 1]
            g = rng.integers(clusters, size=n, dtype=np.int32)
            eta = x @ beta.astype(np.float32) + effects[g, 0] + effects[g, 1] * x[:, 0]
            if family == "gaussian":
                y = eta + RESIDUAL_SD * rng.standard_normal(n)
            else:
                y = (rng.random(n) < 1 / (1 + np.exp(-(eta - 50 * beta[1])))).astype(np.float32)
            columns = [y.astype(np.float32), g, *x.T]
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))


def coefficients(features: int) -> np.ndarray:
    """Fixed effects of the features on their original scale."""
    beta = np.arange(features) / features - 0.5
    if features > 1:
        beta[1] /= 10
    return beta


def agreement(
    path: Path, clusters: int, *, family: str = "gaussian", seed: int = 0
) -> pd.DataFrame:
    r"""Posterior means of a streamed fit beside those of a fit in memory to the same rows.

    .. math:: z = \frac{m_1 - m_2}{\sqrt{s_1^2 / n_1 + s_2^2 / n_2}}

    m and s are posterior means and sds, and n the effective numbers of draws. z is of order 1 if
    the fits differ by Monte Carlo error alone.

    Parameters
    ----------
    path : Path
        A table that `write` made.
    clusters : int
        Number of clusters whose rows are fitted, in the file's random order.
    family, seed : str, int
        Family and seed of the fits; the streamed fit has the next seed.

    Returns
    -------
    pandas.DataFrame
        Columns quantity, streamed, in_memory, sd (of the posterior), z; in the last row z is the
        root mean square over the clusters' random effects.
    """
    frame = pd.read_parquet(path, filters=[("g", "<", clusters)])
    model = MixedEffects(linear(frame.shape[1] - 2), "(1 + x0 | g)", family, bayesian_head=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / "rows.parquet"
        frame.to_parquet(part)
        rows = StreamedData.scan(
            part, outcome="y", clusters=["g"], memory=SORTED_AT_ONCE, folder=folder
        )
        streamed = fit(model, rows, seed=seed + 1, progress=False)
    held = ClusteredData.from_frame(frame, outcome="y", clusters=["g"])
    in_memory = _posterior(fit(model, held, seed=seed, progress=False))
    by_stream = _posterior(streamed)
    error = np.hypot(by_stream["error"], in_memory["error"])
    z = (by_stream["mean"] - in_memory["mean"]) / error
    table = pd.DataFrame(
        {
            "streamed": by_stream["mean"],
            "in_memory": in_memory["mean"],
            "sd": in_memory["sd"],
            "z": z,
        }
    )
    effects = table.index.str.startswith("effect")
    table = table[~effects].rename_axis("quantity").reset_index()
    table.loc[len(table), ["quantity", "z"]] = ["effects", float((z[effects] ** 2).mean() ** 0.5)]
    return table


def _posterior(result: Fit) -> pd.DataFrame:
    """Means, sds and Monte Carlo errors of a fit's hyperparameters and random effects."""
    if result.refined is None:
        raise ArithmeticError("the draws were not weighted: their k-hat is above 1")
    latents, n = result.refined.latents, result.refined.quality["ess"]
    parts = []
    for name, draws in latents.items():
        label = "effect" if name == "g_effect" else name
        values = draws.flatten(1).double()
        cells = [f"{label}[{place}]" for place in range(values.shape[1])]
        parts.append(pd.DataFrame({"mean": values.mean(0), "sd": values.std(0)}, index=cells))
    table = pd.concat(parts)
    table = table[table.sd > 1e-9]  # cells of a correlation's Cholesky factor can be constant
    return table.assign(error=table.sd / n**0.5)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and print the truth, or compare two fits to a part of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--family", choices=["gaussian", "bernoulli"], default="gaussian")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/largetable/rows.parquet"))
    parser.add_argument("--compare", type=int, help="number of clusters to fit in two ways")
    parser.add_argument("--smoke", action="store_true", help="few rows: a trial")
    settings = parser.parse_args(argv)
    if settings.compare:
        table = agreement(
            settings.out, settings.compare, family=settings.family, seed=settings.seed
        )
        print(table.to_string(index=False, float_format="{:.4g}".format))
        return
    rows, clusters = (10_000, 100) if settings.smoke else (settings.rows, settings.clusters)
    options = {"features": settings.features, "family": settings.family, "seed": settings.seed}
    write(settings.out, rows, clusters, **options)
    size = settings.out.stat().st_size / 1e9
    print(f"{rows} rows x {settings.features} features in {clusters} clusters: {size:.2f} GB")
    print(f"sds {INTERCEPT_SD} (intercept), {SLOPE_SD} (x0), correlation {CORRELATION}", end="")
    print(f", residual sd {RESIDUAL_SD}" if settings.family == "gaussian" else "")
    print("fixed effects", np.array2string(coefficients(settings.features), precision=3))


if __name__ == "__main__":
    main()
