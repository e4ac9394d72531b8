"""`counted`: rows as often as their frequency weights say."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from armed_pyro.data.clustered import ClusteredData

__all__ = ["counted"]


def counted(
    data: ClusteredData, index: Int[np.ndarray, " rows"], most: int, seed: int
) -> Int[np.ndarray, " copies"]:
    """The rows, each repeated as often as its frequency; rows of frequency 0 are left out.

    A frequency that is not whole is rounded up or down at random. Frequencies that sum to more
    than `most` rows, and to more than there are rows, are scaled down together.

    Parameters
    ----------
    data : ClusteredData
        The data; weights of another kind do not count.
    index : Int[ndarray, "rows"]
        Positions of the rows in the data.
    most : int
        Number of copies that suffices.
    seed : int
        Seed of the rounding.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"y": [0.0, 1.0, 2.0], "w": [2.0, 0.0, 1.0]})
    >>> data = ClusteredData.from_frame(table, outcome="y", clusters=[], weights="w", features=[])
    >>> counted(data, np.arange(3), 100, seed=0).tolist()
    [0, 0, 2]
    """
    if data.weights is None or data.weights_kind != "frequency":
        return index
    weights = data.weights.double().numpy()[index]
    weights = weights * min(1.0, max(most, len(index)) / weights.sum())
    rounding = np.random.default_rng(seed).uniform(size=len(index))
    return np.repeat(index, np.floor(weights + rounding).astype(int))
