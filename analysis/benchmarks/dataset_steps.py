"""Seconds of a training step whose images a dataset loads, beside a plain torch loop.

Run with ``python -m armed_pyro.analysis.benchmarks.dataset_steps``. Network, images and workers are
the same; the program adds random effects, an adversary and the guide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit

__all__ = ["Images", "ResNet", "main", "plain", "program"]

SITES = 20


class Images(torch.utils.data.Dataset[Tensor]):
    """Images made on the fly, as if they were decoded from files."""

    def __init__(self, n: int, side: int) -> None:
        self.n, self.side = n, side

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> Tensor:
        pixels = np.random.default_rng(number).integers(0, 255, (3, self.side, self.side))
        return torch.from_numpy((pixels / 255).astype(np.float32))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.beside = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.beside(x))


class ResNet(nn.Module):
    """The 18 layers of ResNet-18 (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        blocks = [b for i, o, s in widths for b in (Block(i, o, s), Block(o, o, 1))]
        self.body, self.pool = nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1)
        self.flat, self.head = nn.Flatten(), nn.Linear(512, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.pool(self.body(self.stem(x)))))


def plain(n: int, side: int, batch: int, steps: int, workers: int) -> float:
    """Median seconds of a step of a torch loop."""
    net, images = ResNet(), Images(n, side)
    y = torch.randn(n)
    numbers: Any = range(n)
    loader: Any = DataLoader(numbers, batch, True, num_workers=workers, collate_fn=_Batch(images))
    optimizer, seconds = torch.optim.AdamW(net.parameters(), 1e-3), list[float]()
    while len(seconds) < steps:
        start = time.perf_counter()
        for places, x in loader:
            loss = (net(x)[:, 0] - y[places]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return float(np.median(seconds[1:steps]))


class _Batch:
    """Places and images of a batch."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __call__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        return torch.tensor(places), torch.stack([self.images[place] for place in places])


def program(n: int, side: int, batch: int, steps: int, workers: int) -> float:
    """Median seconds of a step of the program, loading included."""
    rng = np.random.default_rng(0)
    data = ClusteredData.from_dataset(
        Images(n, side),
        outcome=rng.normal(size=n),
        clusters={"site": rng.integers(SITES, size=n)},
        workers=workers,
    )
    marks: list[float] = []

    def mark(module: nn.Module, _: object) -> None:
        if module.training:  # steps, but not looks at all rows
            marks.append(time.perf_counter())

    net = ResNet()
    net.register_forward_pre_hook(mark)
    game = Adversary("site", ["flat"], weight=0.1)
    model = MixedEffects(net, "(1 | site)", adversary=game)
    schedule = Schedule(steps=steps, batch_size=batch, stages=0, window=steps)
    settings: Any = {"compile": "never", "refine": False, "progress": False}
    fit(model, data, validation=None, schedule=schedule, **settings)
    return float(np.median(np.diff(marks)[1:]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print seconds of a step, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rows and steps")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--workers", type=int, default=1)
    options = vars(parser.parse_args(arguments))
    options |= {"rows": 64, "batch": 8, "steps": 4} if options.pop("smoke") else {}
    sizes = [options[name] for name in ("rows", "side", "batch", "steps", "workers")]
    loop, ours = plain(*sizes), program(*sizes)
    print(f"torch loop {loop:.3f} s, program {ours:.3f} s a step: throughput {loop / ours:.2f}")


if __name__ == "__main__":
    main()
