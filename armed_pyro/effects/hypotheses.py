"""Hypotheses on the parameters of a program."""

from __future__ import annotations

from armed_pyro.effects.result import Hypothesis
from armed_pyro.inference.posterior import Posterior
from armed_pyro.summaries.parameters import parameters

__all__ = ["hypothesis"]


def hypothesis(
    posterior: Posterior,
    text: str,
    *,
    draws: int = 4000,
    prob: float = 0.9,
    seed: int | None = None,
) -> Hypothesis:
    """Posterior probability of a relation between parameters, or draws of an expression of them.

    Parameters
    ----------
    text : str
        Such as ``"x - 2 * z > 0"``, ``"site_sd[Intercept] / residual_sd < 1"``, ``"exp(dose)"``;
        see `armed_pyro.effects.expression.evaluate`. Names with spaces are in backticks.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the interval of left minus right side.

    Raises
    ------
    ValueError
        If the text cannot be read, or names an unknown parameter.

    Examples
    --------
    ``fit.hypothesis("Days > 5").probability``
    """
    return Hypothesis.of(text, parameters(posterior, draws, seed), prob)
