"""How fast it is: step times, time to a fit, how cost grows, a large crossed design, memory.

    python -m armed_pyro.analysis.benchmarks.benchmark OPTIONS

    no options           simulated data of the shape of sleepstudy and cbpp
    --data FOLDER        sleepstudy.csv and cbpp.csv themselves
    --short              small sizes, under five minutes (make bench)
    --device cuda --parts steps,growth

Every ratio is one of medians, and both sides take turns in one run on one machine. All parts but
the crossed design use one thread. Each part runs in its own process, whose peak memory is reported.
The results are written to `benchmark.csv` and `benchmark.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from armed_pyro.analysis.benchmarks import fit_times, growth, training_steps

__all__ = ["Figure", "main"]

OUT = Path("results/benchmark")


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes
    ----------
    part, what : str
        Where it belongs, and what it is.
    value : float
        The figure; a ratio where `unit` is "x".
    unit : str
        "x", "s", "ms", "MB", or "slope" of the logs.
    target : float or None
        The most that it should be.
    """

    part: str
    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.value <= self.target


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts, print the table, and write it with its JSON."""
    options = _parser().parse_args(argv)
    console, found = Console(width=120), list[Figure]()
    parts: Mapping[str, Callable[[Options], list[Figure]]] = {
        "steps": steps, "fits": fits, "growth": curves, "crossed": crossed
    }  # fmt: skip
    data = None if options.data is None else str(options.data)
    given = Options(options.short, data, options.device)
    for name in options.parts.split(","):
        if name not in parts:
            raise SystemExit(f"unknown part {name!r}: choose among {', '.join(parts)}")
        start = time.perf_counter()
        # A process each: one part's memory is not another's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found += pool.submit(_measured, parts[name], given).result()
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")
        write(found, options.out)
    table = pd.DataFrame([vars(one) | {"met": one.met} for one in found])
    console.print(
        table.to_string(index=False, float_format="{:.3g}".format, na_rep=""), markup=False
    )
    judged = [one.met for one in found if one.met is not None]
    console.print(f"\n{sum(judged)} of {len(judged)} targets are met. Tables are in {options.out}")


@dataclass(frozen=True)
class Options:
    """What the parts are told: to be short, the folder with data sets, where steps are taken."""

    short: bool
    data: str | None
    device: str = "cpu"


def write(figures: Sequence[Figure], out: Path) -> None:
    """The table, and a JSON file with the machine beside it."""
    out.mkdir(parents=True, exist_ok=True)
    records = [vars(one) | {"met": one.met} for one in figures]
    pd.DataFrame(records).to_csv(out / "benchmark.csv", index=False)
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    text = json.dumps({"machine": machine, "figures": records}, indent=1)
    (out / "benchmark.json").write_text(text, encoding="utf-8")


def steps(options: Options) -> list[Figure]:
    """Seconds a step, by batch and width, over three other ways to train the same network."""
    sizes = [(4, 32), (64, 512)] if options.short else [
        (width, batch) for width in (4, 64, 256) for batch in (32, 512, 4096)
    ]  # fmt: skip
    targets = {"torch loop with adversary": 1.0, "conventional torch loop": 1.6, "Pyro": 0.15}
    found = []
    for width, batch in sizes:
        task = training_steps.Task(width, batch, rows=max(1000, batch), device=options.device)
        start = time.perf_counter()
        ours = training_steps.compiled(task)
        label = f"width {width}, batch {batch}"
        found.append(Figure("steps", f"{label}: compiling", time.perf_counter() - start, "s", 20))
        times = training_steps.interleaved(
            {
                "ours": ours,
                "eager": training_steps.eager(task),
                "torch loop with adversary": training_steps.torch_loop(task, game=True),
                "conventional torch loop": training_steps.torch_loop(task, game=False),
                "Pyro": training_steps.stock(task),
            }
        )
        found.append(Figure("steps", f"{label}: a step", 1e3 * times["ours"], "ms"))
        found.append(Figure("steps", f"{label}: over eager", times["ours"] / times["eager"], "x"))
        for name, target in targets.items():
            ratio = times["ours"] / times[name]
            found.append(Figure("steps", f"{label}: over {name}", ratio, "x", target))
    return found


def fits(options: Options) -> list[Figure]:
    """Seconds to a converged fit, over stock Pyro and over NUTS to the same Monte Carlo error."""
    found = []
    for job in fit_times.jobs(options.data, short=options.short):
        times = fit_times.compare(job, short=options.short)
        found.append(Figure("fits", f"{job.name}: a fit", times.ours, "s"))
        found.append(Figure("fits", f"{job.name}: over Pyro", times.ours / times.stock, "x", 0.2))
        found.append(Figure("fits", f"{job.name}: over NUTS", times.ours / times.nuts, "x", 0.05))
    return found


def curves(options: Options) -> list[Figure]:
    """How a step grows with clusters, rows and terms, and predicting with draws."""
    found = []
    for curve in growth.curves(options.device, short=options.short):
        values = curve.measure()
        for size, value in values.items():
            found.append(
                Figure("growth", f"{curve.what}, {size:,} {curve.name}", 1e3 * value, "ms")
            )
        slope = np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0]
        found.append(Figure("growth", f"{curve.what} by {curve.name}", float(slope), "slope"))
        if curve.most is not None:
            ratio = values[curve.sizes[-1]] / values[curve.sizes[0]]
            label = f"{curve.what}, most over fewest {curve.name}"
            found.append(Figure("growth", label, ratio, "x", curve.most))
    seconds = growth.predicting(short=options.short)
    what = "1,000 draws of 10,000 rows of the spirals' program"
    return [*found, Figure("growth", what, seconds, "s", 2.0)]


def crossed(options: Options) -> list[Figure]:
    """A design of InstEval's size: seconds to variance components, beside REML's."""
    shrink = 10 if options.short else 1
    seconds, table = fit_times.insteval(shrink)
    found = [Figure("crossed", f"InstEval / {shrink}: a fit", seconds, "s", 30.0)]
    for name, row in table.iterrows():
        off = abs(row["median"] / row["reml"] - 1)
        found.append(Figure("crossed", f"sd of {name}, off REML's", float(off), "x", 0.03))
        off = abs(row["median"] - row["reml"]) / row["sd"]
        found.append(Figure("crossed", f"sd of {name}, off in posterior sds", float(off), "x"))
    return found


def _measured(part: Callable[[Options], list[Figure]], options: Options) -> list[Figure]:
    if part is not crossed:
        # As `fit` itself sets for small steps: threads that wait for each other cost more.
        torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = part(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*found, Figure(part.__name__, "peak memory", peak, "MB")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.benchmarks.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write to [{OUT}]")
    parser.add_argument("--data", type=Path, help="folder with sleepstudy.csv and cbpp.csv")
    parser.add_argument("--parts", default="steps,fits,growth,crossed", help="parts to run")
    parser.add_argument("--device", default="cpu", help="where single steps are taken [cpu]")
    parser.add_argument("--short", action="store_true", help="small sizes, under five minutes")
    return parser


if __name__ == "__main__":
    main()
