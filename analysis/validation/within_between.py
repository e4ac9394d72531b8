"""How often the check of clusters' means, and ``between="auto"``, find slopes that differ.

The panel is that of `armed_pyro.data.simulate.wages`: 150 people observed in 7 years. With a
conflict, log wages grow by 0.10 per year of experience within a person and by 0.01 between people;
without one, by 0.05 for both. A linear program with a random intercept is fitted. The check has
found a conflict if it warns or fails, and "auto" if it adds means of clusters to a network.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed

from armed_pyro import MixedEffects, fit
from armed_pyro.data.simulate import wages
from armed_pyro.models.linear import linear

__all__ = ["found", "main"]


PEOPLE = 150
CHECK = "cluster means"


def _run(seed: int, within: float, between: float) -> dict[str, object]:
    torch.set_num_threads(1)
    data, _ = wages(PEOPLE, within=within, between=between, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = MixedEffects(linear(data.n_features, 1), "(1 | id)", bayesian_head=True)
        checks = fit(program, data, seed=seed, progress=False).diagnostics().to_frame()
        # A program whose fixed effects are not latent, so that it counts as a network.
        network = MixedEffects(linear(data.n_features, 1), "(1 | id)", between="auto")
        names = network.bind(data).data_facts().between_names
    check = checks[checks.name == CHECK].iloc[0]
    reported = checks[(checks.part == "model") & checks.verdict.isin(["warn", "fail"])]
    return {
        "seed": seed,
        "check": check.verdict in ("warn", "fail"),
        "auto": bool(names),
        "effect": check.effect,
        "p": check.p,
        "reason": check.reason,
        "also": ", ".join(name for name in reported.name if name != CHECK),
    }


def found(
    tables: int, *, within: float = 0.10, between: float = 0.01, workers: int = 1
) -> pd.DataFrame:
    """One row per simulated table: whether the check and "auto" found a conflict."""
    jobs = [delayed(_run)(seed, within, between) for seed in range(tables)]
    return pd.DataFrame(Parallel(n_jobs=workers)(jobs))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line: print shares, and write one CSV file for each kind of table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conflict", type=int, default=100, help="tables with a conflict")
    parser.add_argument("--without", type=int, default=200, help="tables without one")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/within_between"))
    parser.add_argument("--smoke", action="store_true", help="one table of each kind")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.smoke:
        options.conflict = options.without = 1
    kinds = {
        "conflict": (options.conflict, 0.10, 0.01),
        "no conflict": (options.without, 0.05, 0.05),
    }
    for kind, (tables, within, between) in kinds.items():
        table = found(tables, within=within, between=between, workers=options.workers)
        table.to_csv(options.out / f"{kind.replace(' ', '_')}.csv", index=False)
        shares = table[["check", "auto"]].mean()
        print(f"{kind}: found in {shares.check:.1%} (check), {shares.auto:.1%} (auto)")
        also = table["also"][table["also"] != ""].value_counts()
        print(f"{table.reason.iloc[0]}\nreported besides: {also.to_dict()}")


if __name__ == "__main__":
    main()
