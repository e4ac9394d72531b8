"""Speed of the library: steps, fits, growth of the cost, a large crossed design, memory.

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
    """A line of the table.

    Attributes
    ----------
    part, what : str
        Part of the benchmark, and the quantity that was measured.
    value : float
        The measured value; a ratio if `unit` is "x".
    unit : str
        "x", "s", "ms", "MB", or "slope" on log scales.
    target : float or None
        Upper limit that the value should keep.
    """

    part: str
    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is no target."""
        return None if self.target is None else self.value <= self.target


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts, print the table, and write it with its JSON."""
    options = _parser().parse_args(argv)
    console, figures = Console(width=120, markup=False, emoji=False), list[Figure]()
    parts: Mapping[str, Callable[[Options], list[Figure]]] = {
        "steps": steps, "fits": fits, "growth": curves, "crossed": crossed
    }  # fmt: skip
    data = None if options.data is None else str(options.data)
    settings = Options(options.short, data, options.device)
    for name in options.parts.split(","):
        if name not in parts:
            raise SystemExit(f"unknown part {name!r}: choose among {', '.join(parts)}")
        start = time.perf_counter()
        # Each part has its own process, so that peak memory is that of the part alone.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            figures += pool.submit(_measured, parts[name], settings).result()
        console.print(f"{name}: {time.perf_counter() - start:.0f} s")
        write(figures, options.out)
    table = pd.DataFrame([vars(figure) | {"met": figure.met} for figure in figures])
    console.print(
        table.to_string(index=False, float_format="{:.3g}".format, na_rep=""), markup=False
    )
    judged = [figure.met for figure in figures if figure.met is not None]
    console.print(f"\n{sum(judged)} of {len(judged)} targets are met. Tables are in {options.out}")


@dataclass(frozen=True)
class Options:
    """Options of all parts: small sizes, the folder with data sets, the device of the steps."""

    short: bool
    data: str | None
    device: str = "cpu"


def write(figures: Sequence[Figure], out: Path) -> None:
    """Write the table, and a JSON file that also describes the machine."""
    out.mkdir(parents=True, exist_ok=True)
    records = [vars(figure) | {"met": figure.met} for figure in figures]
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
    """Time of a step by width and batch, over three other ways to train the same network."""
    sizes = [(4, 32), (64, 512)] if options.short else [
        (width, batch) for width in (4, 64, 256) for batch in (32, 512, 4096)
    ]  # fmt: skip
    targets = {"torch loop with adversary": 1.0, "conventional torch loop": 1.6, "Pyro": 0.15}
    figures = []
    for width, batch in sizes:
        task = training_steps.Task(width, batch, rows=max(1000, batch), device=options.device)
        start = time.perf_counter()
        ours = training_steps.compiled(task)
        label = f"width {width}, batch {batch}"
        compiling = time.perf_counter() - start
        figures.append(Figure("steps", f"{label}: compiling", compiling, "s", 30))
        times = training_steps.interleaved(
            {
                "ours": ours,
                "eager": training_steps.eager(task),
                "torch loop with adversary": training_steps.torch_loop(task, game=True),
                "conventional torch loop": training_steps.torch_loop(task, game=False),
                "Pyro": training_steps.stock(task),
            }
        )
        figures.append(Figure("steps", f"{label}: a step", 1e3 * times["ours"], "ms"))
        figures.append(Figure("steps", f"{label}: over eager", times["ours"] / times["eager"], "x"))
        for name, target in targets.items():
            ratio = times["ours"] / times[name]
            figures.append(Figure("steps", f"{label}: over {name}", ratio, "x", target))
    return figures


def fits(options: Options) -> list[Figure]:
    """Seconds to a converged fit, over stock Pyro and over NUTS to the same Monte Carlo error."""
    figures = []
    for job in fit_times.jobs(options.data, short=options.short):
        times = fit_times.compare(job, short=options.short)
        figures.append(Figure("fits", f"{job.name}: a fit", times.ours, "s"))
        figures.append(Figure("fits", f"{job.name}: over Pyro", times.ours / times.stock, "x", 0.2))
        figures.append(Figure("fits", f"{job.name}: over NUTS", times.ours / times.nuts, "x", 0.05))
    return figures


def curves(options: Options) -> list[Figure]:
    """Growth of a step with clusters, rows and terms, and of predictions with draws."""
    figures = []
    for curve in growth.curves(options.device, short=options.short):
        values = curve.measure()
        for size, value in values.items():
            label = f"{curve.what}, {size:,} {curve.name}"
            figures.append(Figure("growth", label, 1e3 * value, "ms"))
        slope = np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0]
        figures.append(Figure("growth", f"{curve.what} by {curve.name}", float(slope), "slope"))
        if curve.most is not None:
            ratio = values[curve.sizes[-1]] / values[curve.sizes[0]]
            label = f"{curve.what}, most over fewest {curve.name}"
            figures.append(Figure("growth", label, ratio, "x", curve.most))
    seconds = growth.predicting(short=options.short)
    label = "1,000 draws of 10,000 rows of the spirals' program"
    return [*figures, Figure("growth", label, seconds, "s", 2.0)]


def crossed(options: Options) -> list[Figure]:
    """Time to fit a design of InstEval's size, and the distance of its sds to those of REML."""
    shrink = 10 if options.short else 1
    seconds, table = fit_times.insteval(shrink)
    figures = [Figure("crossed", f"InstEval / {shrink}: a fit", seconds, "s", 30.0)]
    for name, row in table.iterrows():
        off = abs(row["median"] / row["reml"] - 1)
        figures.append(Figure("crossed", f"sd of {name}, off REML's", float(off), "x", 0.03))
        off = abs(row["median"] - row["reml"]) / row["sd"]
        figures.append(Figure("crossed", f"sd of {name}, off in posterior sds", float(off), "x"))
    return figures


def _measured(part: Callable[[Options], list[Figure]], options: Options) -> list[Figure]:
    if part is not crossed:
        # `fit` does the same for small steps, where threads wait longer than they compute.
        torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figures = part(options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*figures, Figure(part.__name__, "peak memory", peak, "MB")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.benchmarks.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write to [{OUT}]")
    parser.add_argument("--data", type=Path, help="folder with sleepstudy.csv and cbpp.csv")
    parser.add_argument("--parts", default="steps,fits,growth,crossed", help="parts to run")
    parser.add_argument("--device", default="cpu", help="device of the steps [cpu]")
    parser.add_argument("--short", action="store_true", help="small sizes, under five minutes")
    return parser


if __name__ == "__main__":
    main()
