"""A table larger than memory: rows in many clusters with known sds, written to Parquet in chunks.

Make it, fit it within 2 GB, and compare with the truth printed here:

    python -m armed_pyro.analysis.largetable --rows 20000000 --out rows.parquet
    armed-pyro fit rows.parquet --outcome y --random "(1 + x0 | g)" --memory 2GB --out run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK = 500_000
INTERCEPT_SD, SLOPE_SD, CORRELATION, RESIDUAL_SD = 0.8, 0.4, 0.3, 1.0


def write(
    path: Path, rows: int, clusters: int, *, features: int = 20, family: str = "gaussian", seed: int
) -> None:
    r"""Write y = x'beta + u_0g + u_1g x_0 + noise, clusters in random order.

    .. math:: u_g \sim N(0, D), \quad sd = (0.8, 0.4), \quad cor = 0.3, \quad
        \beta_j = j / F - 1 / 2

    with standard normal features, of which x1 has mean 50 and sd 10 (and beta a tenth), and
    noise of sd 1 or, for "bernoulli", the logistic distribution's. The same seed gives the same
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
            writer.write_table(pa.table([pa.array(one) for one in columns], schema=schema))


def coefficients(features: int) -> np.ndarray:
    """The fixed effects, of features on their original scale."""
    beta = np.arange(features) / features - 0.5
    if features > 1:
        beta[1] /= 10
    return beta


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and print the truth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--family", choices=["gaussian", "bernoulli"], default="gaussian")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/largetable/rows.parquet"))
    parser.add_argument("--smoke", action="store_true", help="few rows, to see whether it runs")
    given = parser.parse_args(argv)
    rows, clusters = (10_000, 100) if given.smoke else (given.rows, given.clusters)
    options = {"features": given.features, "family": given.family, "seed": given.seed}
    write(given.out, rows, clusters, **options)
    size = given.out.stat().st_size / 1e9
    print(f"{rows} rows x {given.features} features in {clusters} clusters: {size:.2f} GB")
    print(f"sds {INTERCEPT_SD} (intercept), {SLOPE_SD} (x0), correlation {CORRELATION}", end="")
    print(f", residual sd {RESIDUAL_SD}" if given.family == "gaussian" else "")
    print("fixed effects", np.array2string(coefficients(given.features), precision=3))


if __name__ == "__main__":
    main()
