"""The error of a training run that has run away."""

from __future__ import annotations

from armed_pyro.fitted import Fit

__all__ = ["DivergenceError"]


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer finite, or has run away.

    Attributes
    ----------
    fit : Fit
        The fit at the start of the window of steps with the lowest mean loss.

    Examples
    --------
    >>> def fitted_or_last_good_state(model, data):
    ...     try:
    ...         return fit(model, data)
    ...     except DivergenceError as error:
    ...         return error.fit
    """

    def __init__(self, message: str, fit: Fit) -> None:
        super().__init__(message)
        self.fit = fit
