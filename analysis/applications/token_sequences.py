"""Sequences of different lengths, a small transformer, and an adversary on its masked mean.

Run with ``python -m armed_pyro.analysis.applications.token_sequences``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Schedule, fit

__all__ = ["Transformer", "collate", "main", "run"]

WORDS, CLINICS, EFFECT = 12, 10, 0.8  # sd of the clinics


def collate(items: list[Tensor]) -> dict[str, Tensor]:
    """Tokens padded by 0 to one length, and their mask."""
    tokens = nn.utils.rnn.pad_sequence(items, batch_first=True)
    return {"tokens": tokens, "attention_mask": tokens > 0}


class Transformer(nn.Module):
    """An encoder layer over embedded tokens, and the mean over those that are none of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS + 1, 16, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.encoder(self.embed(tokens), src_key_padding_mask=~attention_mask)
        kept = attention_mask[..., None].to(h.dtype)
        return self.head((kept * h).sum(1) / kept.sum(1))


def run(rows: int, schedule: Schedule, seed: int = 0) -> tuple[Fit, float]:
    """The fit of a score, the number of words 1 less that of words 2; and R2 of new notes."""
    rng = np.random.default_rng(seed)
    notes = [torch.from_numpy(rng.integers(1, WORDS + 1, rng.integers(3, 9))) for _ in range(rows)]
    signal = np.array([float((note == 1).sum() - (note == 2).sum()) for note in notes])
    clinic = rng.integers(CLINICS, size=rows)
    score = signal + EFFECT * rng.normal(size=CLINICS)[clinic] + 0.3 * rng.normal(size=rows)
    data = ClusteredData.from_dataset(
        notes, outcome=score, clusters={"clinic": clinic}, collate=collate
    )
    train, test = data.split_rows(0.25, seed=seed)
    torch.manual_seed(seed)
    game = Adversary("clinic", ["encoder"], weight=0.1, pool="masked")
    model = MixedEffects(Transformer(), "(1 | clinic)", adversary=game)
    result = fit(model, train, schedule=schedule, progress=False)
    y, mean = score[test.row_labels], result.predict(test).expected.mean(0)
    return result, float(1 - np.square(y - mean).mean() / np.var(y))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the variance components and R2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few notes and steps")
    smoke = parser.parse_args(arguments).smoke
    schedule = Schedule(steps=60 if smoke else 3000, folds=1, net_learning_rate=0.01)
    result, r2 = run(120 if smoke else 1200, schedule)
    print(result.variance_components().round(3).to_string())
    print(f"R2 of new notes: {r2:.3f}; true sd of the clinics {EFFECT}")


if __name__ == "__main__":
    main()
