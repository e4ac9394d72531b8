"""Families by name."""

from __future__ import annotations

import re
from dataclasses import fields

from armed_pyro.families.counts import NegativeBinomial, NegativeBinomial1, Poisson
from armed_pyro.families.family import Family
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.families.inflated import Hurdle, ZeroInflated
from armed_pyro.families.logistic import Bernoulli, Binomial, Categorical
from armed_pyro.families.ordinal import Ordinal
from armed_pyro.families.piecewise import PiecewiseExponential
from armed_pyro.families.positive import Gamma, LogNormal
from armed_pyro.families.proportions import Beta, BetaBinomial, ZeroOneInflatedBeta
from armed_pyro.families.student import Student
from armed_pyro.families.times import Exponential, LogLogistic, Weibull

__all__ = ["FAMILIES", "family_named"]

_KINDS = (
    Gaussian,
    Bernoulli,
    Binomial,
    Categorical,
    Poisson,
    NegativeBinomial,
    Ordinal,
    Student,
    LogNormal,
    Gamma,
    Beta,
    ZeroOneInflatedBeta,
    NegativeBinomial1,
    BetaBinomial,
    ZeroInflated,
    Hurdle,
    Exponential,
    Weibull,
    LogLogistic,
    PiecewiseExponential,
)
FAMILIES: dict[str, type[Family]] = {family.name: family for family in _KINDS}
# Names of families elsewhere, for the message that suggests ours.
OTHER_NAMES = {
    **dict.fromkeys(("normal", "Gaussian", "gauss", "linear"), "gaussian"),
    **dict.fromkeys(("binary", "logistic", "logit"), "bernoulli"),
    **dict.fromkeys(("multinomial", "softmax"), "categorical"),
    **dict.fromkeys(("nbinom", "nbinom2", "negbin", "negbinomial"), "negative_binomial"),
    **dict.fromkeys(("t", "studentt", "student_t", "t_family"), "student"),
    **dict.fromkeys(("Gamma", "gamma_log"), "gamma"),
    **dict.fromkeys(("log_normal", "lnorm"), "lognormal"),
    **dict.fromkeys(("betabinomial", "betabinom"), "beta_binomial"),
    **dict.fromkeys(("zip", "zero_inflated_poisson", "ziP"), "zero_inflated(poisson)"),
    **dict.fromkeys(("zinb", "zero_inflated_negbinomial"), "zero_inflated(negative_binomial)"),
    **dict.fromkeys(("hurdle_poisson", "truncated_poisson"), "hurdle(poisson)"),
    "hurdle_gamma": "hurdle(gamma)",
    "ziGamma": "hurdle(gamma)",
    "hurdle_lognormal": "hurdle(lognormal)",
    "probit": "bernoulli(probit)",
    "nbinom1": "negative_binomial1",
    "beta_family": "beta",
    "zoib": "zero_one_inflated_beta",
    "count": "poisson",
    **dict.fromkeys(("survival", "aft", "Weibull"), "weibull"),
    **dict.fromkeys(("cox", "coxph", "coxme", "piecewise"), "piecewise_exponential"),
    **dict.fromkeys(("llogis", "log_logistic"), "loglogistic"),
    "tobit": "gaussian",
    **dict.fromkeys(("cumulative", "clmm", "polr", "ordered"), "ordinal"),
}


def family_named(name: str | Family) -> Family:
    """The family with this name and default settings; a `Family` is returned as it is.

    A link follows in parentheses, ``"bernoulli(probit)"``. ``"zero_inflated(poisson)"`` and
    ``"hurdle(gamma)"`` name the family inside, whose link may follow:
    ``"hurdle(gamma(identity))"``.

    Raises
    ------
    ValueError
        If the family, the link or the family inside is unknown.

    Examples
    --------
    >>> str(family_named("zero_inflated(poisson)"))
    'zero_inflated(poisson)'
    """
    if isinstance(name, Family):
        return name
    whole = re.fullmatch(r"(\w+)(?:\s*\((.*)\))?", name.strip())
    if whole is None or whole[1] not in FAMILIES:
        meant = f" (did you mean {OTHER_NAMES[name]!r}?)" if name in OTHER_NAMES else ""
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"unknown family {name!r}{meant}: choose one of {known}")
    kind, inside = FAMILIES[whole[1]], (whole[2] or "").strip()
    settings = {field.name for field in fields(kind)}
    if not inside:
        return kind()
    if "of" in settings:
        parts = re.fullmatch(r"(\w+)(?:\s*\(\s*(\w+)\s*\))?", inside)
        if parts is None:
            raise ValueError(f"unknown family {inside!r} inside {whole[1]!r}: give a name")
        return kind(of=parts[1], link=parts[2] or "")  # type: ignore[call-arg]
    if "pieces" in settings:
        if not inside.isdecimal():
            raise ValueError(f"family {whole[1]!r} takes a number of pieces, found {inside!r}")
        return kind(pieces=int(inside))  # type: ignore[call-arg]
    if "link" not in settings:
        raise ValueError(f"family {whole[1]!r} has a single link: leave ({inside}) out")
    return kind(link=inside)  # type: ignore[call-arg]
