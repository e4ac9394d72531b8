"""Families by name."""

from __future__ import annotations

import re
from dataclasses import fields

from armed_pyro.families.counts import NegativeBinomial, Poisson
from armed_pyro.families.family import Family
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.families.logistic import Bernoulli, Binomial, Categorical
from armed_pyro.families.ordinal import Ordinal

__all__ = ["FAMILIES", "family_named"]

_KINDS = (Gaussian, Bernoulli, Binomial, Categorical, Poisson, NegativeBinomial, Ordinal)
FAMILIES: dict[str, type[Family]] = {family.name: family for family in _KINDS}
# Names of families elsewhere, for the message that suggests ours.
OTHER_NAMES = {
    **dict.fromkeys(("normal", "Gaussian", "gauss", "linear"), "gaussian"),
    **dict.fromkeys(("binary", "logistic", "logit"), "bernoulli"),
    **dict.fromkeys(("multinomial", "softmax"), "categorical"),
    **dict.fromkeys(("nbinom", "nbinom2", "negbin", "negbinomial"), "negative_binomial"),
    "count": "poisson",
    **dict.fromkeys(("cumulative", "clmm", "polr", "ordered"), "ordinal"),
}


def family_named(name: str | Family) -> Family:
    """The family with this name and default settings; a `Family` is returned as it is.

    A link follows in parentheses, where a family has several: ``"ordinal(probit)"``.
    """
    if isinstance(name, Family):
        return name
    whole = re.fullmatch(r"(\w+)\((\w+)\)", name)
    if whole and whole[1] in FAMILIES:
        settings = [field.name for field in fields(FAMILIES[whole[1]])]
        if "link" not in settings:
            raise ValueError(f"family {whole[1]!r} has a single link: leave ({whole[2]}) out")
        return FAMILIES[whole[1]](link=whole[2])  # type: ignore[call-arg]
    if name not in FAMILIES:
        meant = f" (did you mean {OTHER_NAMES[name]!r}?)" if name in OTHER_NAMES else ""
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"unknown family {name!r}{meant}: choose one of {known}")
    return FAMILIES[name]()
