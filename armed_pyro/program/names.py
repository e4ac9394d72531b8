"""Names of a program's sites and plates, and of its quantities in labelled data: all distinct.

A name that is taken is followed by ``_``, as often as needed. The names of ArviZ's schema and of
the program come first, then the grouping factors in the order of the terms, then what is made of
them (``<factor>_term``, ``<factor>_effect``, ...).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

from armed_pyro._messages import unknown
from armed_pyro.data.training_checks import CENSORING
from armed_pyro.data.xarray_names import FactorNames, factor_names, free_name, unique_names
from armed_pyro.program.plan import Plan

__all__ = [
    "check_names",
    "cluster_columns",
    "name_plates",
    "site_labels",
    "tree_names",
    "warn_of_renamed",
]


def _of_program(model: Plan) -> Iterator[str]:
    """Names of the sites that no grouping factor has."""
    yield model.data_facts().outcome_name
    yield from ["fixed_effect"] * model.has_fixed_effects
    yield from (parameter.name for parameter in model.family.parameters)
    yield from (name for other in model.others for name in (other.name, other.sd_site))


def site_labels(model: Plan, factors: Iterable[str]) -> dict[str, str]:
    """By factor, the start of its sites' names: ``fixed_`` for ``fixed`` beside "fixed_effect"."""
    taken, labels = list(_of_program(model)), dict[str, str]()
    for factor in factors:
        label = factor
        while any(name.startswith(f"{label}_{kind}") for kind in ("sd", "effect", "cor")
                  for name in taken):  # fmt: skip
            label += "_"
        labels[factor] = label
        taken += [f"{label}_{kind}" for kind in ("sd", "effect", "cor")]
    return labels


def name_plates(model: Plan) -> None:
    """Give every factor's plate a name of its own, by default that of the factor."""
    taken = {"row", "draws", *_of_program(model)}
    taken |= {site for factor in model.factors for site in factor.sites()}
    for factor in model.factors:
        factor.plate_name = free_name(factor.name, taken)
        taken.add(factor.plate_name)


def tree_names(model: Plan) -> dict[str, FactorNames]:
    """By factor, the names of its dimensions and variables in `Fit.to_datatree`."""
    outcome, labels = model.data_facts().outcome_name, {f.name: f.label for f in model.factors}
    taken = {*_of_program(model), "fixed_effect", "fixed_term", "unseen", f"{outcome}_expected"}
    quantities = {
        group.site(quantity)
        for factor in model.factors
        for group, kind in factor.groups
        for quantity in kind.sites(group)
    }
    taken |= {"class"} if model.family.has_class_probabilities else set()
    taken |= {*CENSORING} if model.family.is_censored else set()
    return factor_names(labels, taken | quantities)


def cluster_columns(model: Plan, groupings: Iterable[str]) -> dict[str, str]:
    """Names of the rows' clusters in ``constant_data``, by column; a factor's are its dimension."""
    factors = {name: names.cluster for name, names in tree_names(model).items()}
    columns = [name for name in groupings if name not in factors]
    taken = [*_of_program(model), *factors.values(), *CENSORING * model.family.is_censored]
    return factors | unique_names(columns, taken)


def warn_of_renamed(model: Plan) -> None:
    """Warn of factors that have another name in files and labelled data."""
    names = tree_names(model)
    renamed: Mapping[str, str] = {
        name: f"{new.cluster!r}"
        for name, new in names.items()
        if new.cluster != name.replace("/", "_")
    }
    if renamed:
        warnings.warn(
            "names that are taken are followed by '_': in labelled data and posterior.nc, "
            + ", ".join(f"the grouping factor {old!r} is {new}" for old, new in renamed.items()),
            UserWarning,
            stacklevel=4,
        )


def check_names(model: Plan) -> None:
    """Check that sites have different names, and that priors name existing factors."""
    outcome, priors = model.data_facts().outcome_name, model.priors.sd
    factors = [factor.name for factor in model.factors]
    if isinstance(priors, Mapping):
        for name in priors:
            if name not in factors:
                raise unknown("grouping factor with random effects for the prior", name, factors)
    names = ["row", "draws", *_of_program(model)]
    names += [name for f in model.factors for name in (f.plate_name, *f.sites())]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise ValueError(
            f"two quantities of the program would be called {twice[0]!r}: give the column of the "
            f"outcome ({outcome!r}) or of the grouping factor ({', '.join(factors)}) another name"
        )
