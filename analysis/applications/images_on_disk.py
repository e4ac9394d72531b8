"""Digits as PNG files of three scanners, read by workers while a residual network is trained.

Run with ``python -m armed_pyro.analysis.applications.images_on_disk``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Schedule, fit

__all__ = ["Pictures", "ResidualNet", "main", "run", "written"]


def written(folder: Path, rows: int, seed: int = 0) -> pd.DataFrame:
    """Threes and eights as files; each scanner has its brightness and its share of eights."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(np.isin(digits.target, (3, 8))))[:rows]
    scanner = rng.integers(3, size=len(chosen))
    for place, (number, bright) in enumerate(zip(chosen, 40 * scanner, strict=True)):
        pixels = np.clip(digits.images[number] * 9 + bright, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((16, 16)).save(folder / f"{place}.png")
    eight = digits.target[chosen] == 8
    kept = rng.random(len(chosen)) < np.where(eight, 0.4 + 0.3 * scanner, 1.0 - 0.3 * scanner)
    table = pd.DataFrame({"file": [f"{n}.png" for n in range(len(chosen))], "eight": eight})
    return table.assign(scanner=[f"scanner {k}" for k in scanner])[kept].reset_index(drop=True)


class Pictures(torch.utils.data.Dataset[Tensor]):
    """The files of a table, as images between 0 and 1."""

    def __init__(self, folder: Path, table: pd.DataFrame) -> None:
        self.files = [folder / name for name in table["file"]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(np.array(Image.open(self.files[number])) / 255).float()[None]


class ResidualNet(nn.Module):
    """Two residual blocks of 8 filters, and their mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.pool, self.head = nn.Flatten(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        for block in self.blocks:
            h = h + torch.relu(block(h))
        return self.head(self.pool(h.mean((2, 3))))


def run(folder: Path, rows: int, schedule: Schedule) -> tuple[Fit, float]:
    """The fit, and the area under the curve of the fixed effects for its rows."""
    table = written(folder, rows)
    data = ClusteredData.from_dataset(
        Pictures(folder, table),
        table=table,
        outcome="eight",
        clusters=["scanner"],
        workers=1,
        augment=lambda image: image.roll(int(torch.randint(-1, 2, ())), -1),
    )
    torch.manual_seed(0)
    game = Adversary("scanner", ["pool"], weight=0.5)
    model = MixedEffects(ResidualNet(), "(1 | scanner)", "bernoulli", adversary=game)
    result = fit(model, data, schedule=schedule, progress=False)
    scores = result.network(data.inputs.load()) if data.inputs is not None else torch.zeros(0)
    truth = table["eight"].to_numpy()
    above = scores.numpy()[truth][:, None] > scores.numpy()[~truth][None]
    return result, float(above.mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the variance components and the area under the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few images and steps")
    smoke = parser.parse_args(arguments).smoke
    schedule = Schedule(steps=60 if smoke else 1500, folds=1, net_learning_rate=0.01)
    with tempfile.TemporaryDirectory() as folder:
        result, area = run(Path(folder), 80 if smoke else 350, schedule)
    print(result.variance_components().round(3).to_string())
    print(f"area under the curve of the fixed effects, training rows: {area:.3f}")


if __name__ == "__main__":
    main()
