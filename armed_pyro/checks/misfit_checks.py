"""`misfit_checks`: all checks of a model by its residuals, made from one set of residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from armed_pyro._messages import cause
from armed_pyro.checks.check import BROKEN, Check, checked, failed
from armed_pyro.checks.findings import unchecked
from armed_pyro.checks.order_checks import order_checks
from armed_pyro.checks.outlier_checks import outlier_checks
from armed_pyro.checks.pivotal_checks import residual_check
from armed_pyro.checks.predictor_checks import predictor_checks
from armed_pyro.checks.quantile_residuals import QuantileResiduals
from armed_pyro.checks.spread_checks import dispersion_checks, shape_checks, spread_checks
from armed_pyro.checks.threshold_checks import threshold_checks
from armed_pyro.inference.posterior import Posterior

__all__ = ["misfit_checks"]


FEWEST_ROWS = 20
# Each stage takes the residuals without the misfits of the stages before, and hands them on.
Stage = Callable[[QuantileResiduals], tuple[list[Check], QuantileResiduals]]


def misfit_checks(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    """Checks of the residuals' law, predictor, spread, order, thresholds, outliers, influence.

    Parameters
    ----------
    posterior : Posterior
        The fitted program; the influence of clusters is checked if it has importance weights.
    latents : mapping of str to Tensor
        Posterior draws, as returned by `Fit.draws`; the first 40 or fewer are used.
    """
    residuals = QuantileResiduals.of(posterior, latents, seed=posterior.seed)
    yield residual_check(posterior.model.family, residuals)
    if len(residuals.index) < FEWEST_ROWS:
        yield unchecked("misfit", f"{len(residuals.index)} rows are too few for score tests")
        return
    stages: dict[str, Stage] = {
        "dispersion": lambda left: dispersion_checks(posterior, left),
        "predictor": lambda left: predictor_checks(posterior, latents, left),
        "order": lambda left: order_checks(posterior, left),
        "spread": lambda left: spread_checks(posterior, left),
    }
    for name, stage in stages.items():
        try:
            checks, residuals = stage(residuals)
            yield from checks
        except BROKEN as error:
            yield failed("model", name, cause(error))
    left = residuals
    yield from checked(
        "model", "proportional odds", lambda: threshold_checks(posterior, latents, left)
    )
    yield from checked("model", "shape", lambda: shape_checks(left, posterior.model.family))
    yield from checked("model", "outliers", lambda: outlier_checks(posterior, latents, left))
