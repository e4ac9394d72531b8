"""Weights of draws from sums of the rows, beside weights from the rows themselves.

Run with ``python -m armed_pyro.analysis.benchmarks.closed_forms``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import torch

from armed_pyro import ClusteredData, MixedEffects
from armed_pyro.guides.closed_form import ClosedForm, closed_form
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.guides.noise import gaussian_noise
from armed_pyro.inference.marginal_weights import marginal_draws
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.models.linear import linear

__all__ = ["compare", "main", "shapes"]

DRAWS, TURNS = 32, 5
# Rows, inner and outer clusters, sds of inner effects, outer effects and residual; "1 + x" or "1".
SHAPES = {
    "sleepstudy": (180, 18, 0, 0.9, 0.0, 0.45, "1 + x"),
    "Chem97": (31_022, 2410, 131, 1.5, 0.4, 2.8, "1"),
    "egsingle": (7230, 1721, 60, 0.8, 0.4, 0.55, "1 + x"),
}


def shapes(scale: float = 1.0, *, seed: int = 0) -> dict[str, tuple[ClusteredData, str]]:
    """Simulated data and random effects in the shape of known data sets, `scale` of the size."""
    made = {}
    for name, (n, inner, outer, *sds, terms) in SHAPES.items():
        rng = np.random.default_rng(seed)
        rows, clusters = max(60, round(scale * n)), max(12, round(scale * inner))
        groups = max(4, round(scale * outer)) if outer else 0
        child = np.concatenate([np.arange(clusters), rng.integers(clusters, size=rows - clusters)])
        x = rng.normal(size=(rows, 3))
        y = x @ [1.0, 0.3, 0.0] + sds[2] * rng.normal(size=rows)
        labels, random = {"child": child}, f"({terms} | child)"
        u = sds[0] * rng.normal(size=(clusters, 2)) * [1.0, 0.3 * ("x" in terms)]
        y = y + u[child, 0] + u[child, 1] * x[:, 0]
        if groups:
            school = rng.integers(groups, size=clusters)[child]
            y = y + sds[1] * rng.normal(size=groups)[school]
            labels, random = labels | {"school": school}, f"{random} + ({terms} | school)"
        data = ClusteredData.from_arrays(x, y, labels)
        made[name] = data, random.replace("x", data.feature_names[0])
    return made


def compare(data: ClusteredData, random: str, *, seed: int = 0) -> dict[str, float]:
    """CPU milliseconds per draw, and the largest difference of the log-weights, in nats.

    The two sides take turns; the times are medians.
    """
    model = MixedEffects(linear(data.n_features), random, bayesian_head=True).bind(data).eval()
    model.requires_grad_(False)
    source = model.compute(model.encode(data))
    guide, rows, start = choose_guide(model, source), source.all(), time.process_time()
    closed = closed_form(model, source)
    sums = time.process_time() - start
    assert isinstance(closed, ClosedForm)
    guide.refresh(model, source)
    torch.manual_seed(seed)
    with torch.no_grad(), pyro.validation_enabled(False):
        noise = gaussian_noise(guide, rows, DRAWS, model.reference())
        theta = noise.values["_theta"]
        sides: dict[str, Callable[[], torch.Tensor]] = {
            "rows": lambda: weigh(model, guide, rows, noise).total(),
            "sums": lambda: marginal_draws(model, guide, closed, theta).total,
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(TURNS):
            for name, side in sides.items():
                start = time.process_time()
                side()
                times[name].append((time.process_time() - start) * 1e3 / DRAWS)
        difference = float((sides["rows"]() - sides["sums"]()).abs().max())
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratio = medians["rows"] / medians["sums"]
    return {**medians, "ratio": ratio, "making the sums": 1e3 * sums, "difference": difference}


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Print and write the table; the command line is in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a twentieth of the rows")
    parser.add_argument("--out", type=Path, default=Path("results/closed_forms.csv"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = [
        {"shape": name, "rows of data": data.n_rows, **compare(data, random)}
        for name, (data, random) in shapes(0.05 if options.smoke else 1.0).items()
    ]
    table = pd.DataFrame(records)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    return table


if __name__ == "__main__":
    main()
