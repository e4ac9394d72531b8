"""Cost of random effects and an adversary: a training step beside the conventional network's.

Run with ``python -m armed_pyro.analysis.benchmarks.step_time``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from armed_pyro import ClusteredData, MixedEffects, Schedule
from armed_pyro.analysis.benchmarks.training_steps import program_step
from armed_pyro.models.autoencoder import autoencoder_program
from armed_pyro.models.convolutional import convolutional_program

__all__ = ["main", "step_times"]

BATCH, CLUSTERS, WARM_UP = 32, 12, 3


def step_times(size: int = 64, *, steps: int = 30, seed: int = 0) -> pd.DataFrame:
    """Median duration of a training step of the paper's image programs and of their networks.

    Steps of the program and of its network alone alternate, so that other load on the machine slows
    both down.

    Parameters
    ----------
    size : int
        Height and width of the images; a multiple of 8.
    steps : int
        Number of steps of each.
    seed : int
        Seed of images and weights.

    Returns
    -------
    pandas.DataFrame
        Columns program, conventional and armed (milliseconds), ratio.
    """
    rng = np.random.default_rng(seed)
    site = np.arange(4 * BATCH) % CLUSTERS
    data = ClusteredData.from_arrays(
        rng.normal(size=(len(site), 1, size, size)).astype("float32"),
        rng.permutation([0.0, 1.0] * (len(site) // 2)),
        {"site": site},
    )
    torch.manual_seed(seed)
    image = (1, size, size)
    programs = {
        "convolutional": convolutional_program("site", image),
        "autoencoder": autoencoder_program("site", image),
    }
    records = []
    for name, program in programs.items():
        plain = MixedEffects(program.network, (), "bernoulli", others=program.others)
        median = _medians({"conventional": plain, "armed": program}, data, steps, seed)
        ratio = median["armed"] / median["conventional"]
        records.append({"program": name, **median, "ratio": ratio})
    return pd.DataFrame(records)


def _medians(
    models: Mapping[str, MixedEffects], data: ClusteredData, steps: int, seed: int
) -> dict[str, float]:
    kinds, seconds = {}, {name: list[float]() for name in models}
    schedule = Schedule(steps=1000, batch_size=BATCH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, model in models.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="there are fewer rows")
                kinds[name] = program_step(model, data, schedule, "never")
        for _ in range(WARM_UP + steps):
            for name, step in kinds.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(times[WARM_UP:])) for name, times in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the steps, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small images, few steps")
    parser.add_argument("--size", type=int, default=64, help="height and width (default: 64)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("results/step_time"), help="folder")
    options = parser.parse_args(argv)
    size, steps = (16, 3) if options.smoke else (options.size, options.steps)
    table = step_times(size, steps=steps)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "step_time.csv", index=False)
    threads = torch.get_num_threads()
    print(f"{size}x{size} images, batches of {BATCH}, {threads} thread(s), ms per step")
    print(table.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
