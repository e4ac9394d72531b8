"""`Tuning`: scores of every combination of settings, and the combination that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro.program.model import MixedEffects
from armed_pyro.report.cells import cell
from armed_pyro.tuning.settings import Settings

__all__ = ["Criterion", "Scored", "Tuning", "choose", "score_table"]

Criterion = Literal["log_score", "rmse", "accuracy"]


@dataclass(frozen=True, eq=False)
class Scored:
    """Sums over the test rows of each cluster, and the number of these rows."""

    rows: Float[np.ndarray, " clusters"]
    log_score: Float[np.ndarray, "settings clusters"]  # NaN if a fit failed
    loss: Float[np.ndarray, "settings clusters"]


@dataclass(frozen=True, eq=False)
class Tuning:
    """Scores of held-out rows under every combination of settings.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per combination, with a column for each setting; log_score, the mean log predictive
        density of a held-out row; accuracy (classes) or rmse (other outcomes); difference, the
        criterion minus that of the best combination; standard errors of these over clusters, in
        columns that end in ``_se``; failed, the number of fits that diverged.
    settings : tuple of mapping
        The combinations, one per row of the table.
    best_row, chosen_row : int
        Rows of the table with the best value of the criterion, and with the settings chosen.
    model : MixedEffects
        The program with the chosen settings, not fitted.
    criterion : {"log_score", "rmse", "accuracy"}
        The column of the table by which the settings are compared.
    design : str
        The cross-validation in words.
    errors : tuple of str
        Messages of the fits that diverged.

    Examples
    --------
    ``tuning: Tuning = tune(model, data, over={"fixed_weight": [0, 1]})``, then
    ``fit(tuning.model, data)``
    """

    table: pd.DataFrame
    settings: tuple[Settings, ...]
    best_row: int
    chosen_row: int
    model: MixedEffects
    criterion: Criterion
    design: str
    errors: tuple[str, ...] = ()

    @property
    def best(self) -> Settings:
        """The settings with the best value of the criterion."""
        return self.settings[self.best_row]

    @property
    def chosen(self) -> Settings:
        """The settings that the rule of one standard error chooses; see `tune`."""
        return self.settings[self.chosen_row]

    def __str__(self) -> str:
        marks = [""] * len(self.table)
        marks[self.best_row], marks[self.chosen_row] = "best", "chosen"
        if self.best_row == self.chosen_row:
            marks[self.best_row] = "best, chosen"
        shown = self.table.map(_text).assign(**{"": marks}).to_string(index=False)
        lines = [self.design, shown, self._sentence()]
        if self.errors:
            fits = "1 fit" if len(self.errors) == 1 else f"{len(self.errors)} fits"
            lines.append(f"{fits} diverged, and their settings have no score: {self.errors[0]}")
        return "\n".join(lines)

    def _sentence(self) -> str:
        chosen, row = described(self.chosen), self.table.iloc[self.chosen_row]
        if self.best_row == self.chosen_row:
            return f"chosen: {chosen}. No settings nearer to the default are within one se of it."
        return (
            f"chosen: {chosen}. Of the settings within one se of the best, "
            f"{described(self.best)}, it is nearest to the default. Its {self.criterion} is worse "
            f"by {abs(row['difference']):.2g} (se {row['difference_se']:.2g})."
        )


def described(settings: Settings) -> str:
    """Settings as text: ``fixed_weight = 1, between = True``."""
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def score_table(
    grid: Sequence[Settings], scored: Scored, criterion: Criterion, *, classes: bool
) -> pd.DataFrame:
    r"""The table of `Tuning`, without its column of failures.

    With :math:`S_k` the sum of cluster k's scores and :math:`n_k` its rows, the mean is
    :math:`m = \sum_k S_k / \sum_k n_k`. A function g of it, such as the root of the mean squared
    error, has the variance :math:`\frac{K}{K-1} g'(m)^2 \sum_k (S_k - n_k m)^2 / (\sum_k n_k)^2`,
    so that rows of one cluster may depend on each other. The difference to the best has the
    variance of the clusters' differences.
    """
    names = list(dict.fromkeys(name for settings in grid for name in settings))
    columns: dict[str, Any] = {
        name: pd.Series([settings.get(name) for settings in grid], dtype=object) for name in names
    }
    metrics = {"log_score": _mean(scored.log_score, scored.rows)}
    loss, part = _mean(scored.loss, scored.rows)
    if classes:
        metrics["accuracy"] = 1 - loss, -part
    else:
        rmse = np.sqrt(loss)
        slope = 0.5 / np.where(rmse > 0, rmse, np.nan)
        metrics["rmse"] = rmse, slope[:, None] * part
    for name, (value, influence) in metrics.items():
        columns |= {name: value, f"{name}_se": _error(influence)}
    value, influence = metrics[criterion]
    best = int(np.nanargmax(_ascending(value, criterion)))
    columns["difference"] = value - value[best]
    columns["difference_se"] = _error(influence - influence[best])
    return pd.DataFrame(columns)


def choose(table: pd.DataFrame, distance: Sequence[int], criterion: Criterion) -> tuple[int, int]:
    """Rows of the best combination and of the chosen one."""
    gain = _ascending(table["difference"].to_numpy(), criterion)
    best = int(np.nanargmax(gain))
    near = gain + table["difference_se"].fillna(0.0).to_numpy() >= 0
    rows = np.flatnonzero(near | (table.index == best)).tolist()
    return best, min(rows, key=lambda row: (distance[row], -gain[row]))


def _ascending(value: np.ndarray, criterion: Criterion) -> np.ndarray:
    """The values, with the sign by which higher is better."""
    return -value if criterion == "rmse" else value


def _mean(
    sums: Float[np.ndarray, "settings clusters"], rows: Float[np.ndarray, " clusters"]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over rows, and the deviation of it that each cluster causes."""
    mean = sums.sum(1) / rows.sum()
    return mean, (sums - mean[:, None] * rows) / rows.sum()


def _error(influence: Float[np.ndarray, "settings clusters"]) -> Float[np.ndarray, " settings"]:
    """Standard error of a sum over clusters of these deviations."""
    clusters = influence.shape[1]
    return np.sqrt(clusters / max(1, clusters - 1) * (influence**2).sum(1))


def _text(value: Any) -> str:
    return cell(value) if isinstance(value, float) else str(value)
