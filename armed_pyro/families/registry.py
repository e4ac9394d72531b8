"""Families by name."""

from __future__ import annotations

from armed_pyro.families.counts import NegativeBinomial, Poisson
from armed_pyro.families.family import Family
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.families.logistic import Bernoulli, Binomial, Categorical

__all__ = ["FAMILIES", "family_named"]

_KINDS = (Gaussian, Bernoulli, Binomial, Categorical, Poisson, NegativeBinomial)
FAMILIES: dict[str, type[Family]] = {family.name: family for family in _KINDS}
# Names of families elsewhere, for the message that suggests ours.
OTHER_NAMES = {
    **dict.fromkeys(("normal", "Gaussian", "gauss", "linear"), "gaussian"),
    **dict.fromkeys(("binary", "logistic", "logit"), "bernoulli"),
    **dict.fromkeys(("multinomial", "softmax"), "categorical"),
    **dict.fromkeys(("nbinom", "nbinom2", "negbin", "negbinomial"), "negative_binomial"),
    "count": "poisson",
}


def family_named(name: str | Family) -> Family:
    """The family with this name and default settings; a `Family` is returned as it is."""
    if isinstance(name, Family):
        return name
    if name not in FAMILIES:
        meant = f" (did you mean {OTHER_NAMES[name]!r}?)" if name in OTHER_NAMES else ""
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"unknown family {name!r}{meant}: choose one of {known}")
    return FAMILIES[name]()
