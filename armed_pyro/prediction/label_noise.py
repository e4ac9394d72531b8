"""Noise of new clusters that depends on their labels alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.label_matching import label_text

__all__ = ["generator", "label_noise"]

# Bytes of noise that are kept for later blocks of rows.
MOST_KEPT = 2**28


def label_noise(
    seed: int,
    factor: str,
    labels: Sequence[object] | pd.Index,
    like: Float[Tensor, "draws clusters terms"],
    kept: dict[tuple[str, str], np.ndarray] | None = None,
) -> Float[Tensor, "draws new terms"]:
    """Standard normal noise of clusters, a function of seed, factor and label alone.

    All rows of a cluster therefore share it, whatever their order and blocks. The noise has the
    draws, terms, precision and device of `like`, the seen clusters' effects. `kept` holds the noise
    of earlier calls; new noise is added up to `MOST_KEPT` bytes.

    >>> like = torch.zeros(2, 1, 1)
    >>> both = label_noise(0, "site", ["a", "b"], like)
    >>> bool((both[:, 1:] == label_noise(0, "site", ["b"], like)).all())
    True
    """
    draws, terms = like.shape[0], like.shape[-1]
    kept = {} if kept is None else kept
    pieces = []
    for label in labels:
        key = (factor, label_text(label))
        noise = kept.get(key)
        if noise is None:
            noise = generator(seed, *key).standard_normal((draws, terms), dtype=np.float32)
            if len(kept) * noise.nbytes < MOST_KEPT:
                kept[key] = noise
        pieces.append(noise)
    stacked = np.stack(pieces) if pieces else np.zeros((0, draws, terms), np.float32)
    return torch.from_numpy(stacked).to(like).transpose(0, 1)


def generator(seed: int, *names: str) -> np.random.Generator:
    """A random number generator for this seed and these names, independent of all others."""
    text = "\0".join([str(seed), *names]).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
