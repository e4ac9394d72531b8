"""Predictors of the family's parameters, checked and centred when a program is bound to data."""

from __future__ import annotations

from dataclasses import replace

from armed_pyro.families.distributional import parameter_named
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.plan import Plan
from armed_pyro.random_effects.design import InputBlock

__all__ = ["check_parameters", "with_parameter_centers"]


def with_parameter_centers(model: Plan, facts: Facts) -> Facts:
    """The facts, with a centre of 0 for predictors that have no constant, such as ``0 + x``.

    Other predictors are centred at the parameter's starting value, where the prior of their
    intercept stands.
    """
    center = list(facts.center)
    for name, design in model.designs.items():
        if isinstance(design, InputBlock) and not design.has_constant:
            center[facts.columns.index(name)] = 0.0
    return replace(facts, center=tuple(center))


def check_parameters(model: Plan) -> None:
    """Refuse a predictor of a parameter that standard errors or a prior fix."""
    unit = model.unit()
    for name in model.family.predicted:
        parameter = parameter_named(model.family.without_predictors, name)
        if parameter.known(model.priors, unit) is None:
            continue
        label, cause = parameter.alias or name, "the prior of the residual sd is Known"
        if model.data_facts().weights_kind == "se":
            cause = "the rows have known standard errors, which are their residual sds"
        raise ValueError(f"{label} has a predictor, but {cause}: leave out either of them")
