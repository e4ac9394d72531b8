"""What a fit is and found, in sentences: the question, the variance components, the methods."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from armed_pyro._messages import count_rows
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.report.cells import cell
from armed_pyro.report.results import Results

__all__ = [
    *("formula", "methods", "question", "references", "spread_sentences", "versions"),
    "explained_sentences",
]

# Names that a sentence can hold.
MOST_NAMES = 8
PACKAGES = ("armed_pyro", "pyro-ppl", "torch", "arviz", "numpy")

REFERENCES = {
    "ARMED": "Nguyen KP, Treacher AH, Montillo AA (2023). Adversarially-regularized mixed effects "
    "deep learning (ARMED) models improve interpretability, performance, and generalization on "
    "clustered (non-iid) data. IEEE Transactions on Pattern Analysis and Machine Intelligence "
    "45(7), 8081-8093.",
    "Pyro": "Bingham E, Chen JP, Jankowiak M, et al. (2019). Pyro: deep universal probabilistic "
    "programming. Journal of Machine Learning Research 20(28), 1-6.",
    "SVI": "Hoffman MD, Blei DM, Wang C, Paisley J (2013). Stochastic variational inference. "
    "Journal of Machine Learning Research 14, 1303-1347.",
    "LKJ": "Lewandowski D, Kurowicka D, Joe H (2009). Generating random correlation matrices based "
    "on vines and extended onion method. Journal of Multivariate Analysis 100(9), 1989-2001.",
    "PSIS": "Vehtari A, Simpson D, Gelman A, Yao Y, Gabry J (2024). Pareto smoothed importance "
    "sampling. Journal of Machine Learning Research 25(72), 1-58.",
    "LOO": "Vehtari A, Gelman A, Gabry J (2017). Practical Bayesian model evaluation using "
    "leave-one-out cross-validation and WAIC. Statistics and Computing 27, 1413-1432.",
    "NUTS": "Hoffman MD, Gelman A (2014). The No-U-Turn sampler: adaptively setting path lengths "
    "in Hamiltonian Monte Carlo. Journal of Machine Learning Research 15, 1593-1623.",
    "residuals": "Dunn PK, Smyth GK (1996). Randomized quantile residuals. Journal of "
    "Computational and Graphical Statistics 5(3), 236-244.",
    "predictive": "Gelman A, Meng X-L, Stern H (1996). Posterior predictive assessment of model "
    "fitness via realized discrepancies. Statistica Sinica 6(4), 733-760.",
    "R2": "Nakagawa S, Johnson PCD, Schielzeth H (2017). The coefficient of determination R2 and "
    "intra-class correlation coefficient from generalized linear mixed-effects models revisited "
    "and expanded. Journal of the Royal Society Interface 14, 20170213.",
    "slopes": "Johnson PCD (2014). Extension of Nakagawa & Schielzeth's R2GLMM to random slopes "
    "models. Methods in Ecology and Evolution 5(9), 944-946.",
    "reversal": "Ganin Y, Ustinova E, Ajakan H, et al. (2016). Domain-adversarial training of "
    "neural networks. Journal of Machine Learning Research 17(59), 1-35.",
}


def joined(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """Names as a sentence has them.

    >>> joined(["a", "b", "c"]), joined(list("abcdef"), most=3)
    ('a, b and c', 'a, b, c and 3 more')
    """
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def formula(model: MixedEffects) -> str:
    """The program's formula, as far as it is one."""
    facts = model.data_facts()
    terms = [":".join(term) for term in facts.schema.terms] if facts.schema else []
    features = terms or list(facts.feature_names)
    more = len(features) - MOST_NAMES
    shown = [*features[:MOST_NAMES], *([f"... ({more} more)"] if more > 0 else [])]
    fixed = ([] if facts.intercept else ["0"]) + shown or ["1"]
    if not model.linear:
        fixed = [f"{type(model.network).__name__}({', '.join(shown)})"]
    return f"{facts.outcome_name} ~ {' + '.join([*fixed, *map(str, model.outcome_terms)])}"


def question(results: Results) -> tuple[str, ...]:
    """The question that the fit answers, its program, and its random effects, as paragraphs."""
    model, facts = results.posterior.model, results.posterior.model.data_facts()
    names = list(facts.schema.columns if facts.schema else facts.feature_names)
    event = "" if model.event is None else f" = {model.event!r}"
    asked = f"How does {facts.outcome_name}{event} depend on {joined(names)}?"
    if not names:
        asked = f"How does {facts.outcome_name}{event} vary?"
    sizes = [f"{len(level):,} clusters of {name}" for name, level in facts.levels.items()]
    come = f" from {joined(sizes)}" if sizes else ""
    rows = f"The data are {count_rows(facts.n_rows)}{come}."
    return f"{asked} {rows}", " ".join([_predictor(model), *map(_effects, model.factors)])


def _predictor(model: MixedEffects) -> str:
    """Family and fixed effects in a sentence."""
    if model.linear:
        fixed = "a linear function of the features, whose coefficients have posteriors"
    else:
        weights = sum(weight.numel() for weight in model.net.parameters())
        fixed = f"a network of {weights:,} weights"
        if model.data_facts().linear_names:
            fixed += " with linear effects, which have posteriors, beside it"
    return f"The family of the outcome is {model.family}. The fixed effects are {fixed}."


def _effects(factor: Factor) -> str:
    """The random effects of a factor in a sentence."""
    if factor.smooth:
        curves = joined(factor.sd_names)
        return (
            f"The smooth term {curves} lets the expected outcome depart from a straight line by a "
            "penalised spline."
        )
    names = joined(["the intercept" if name == "Intercept" else name for name in factor.terms])
    text = f"Every cluster of {factor.name} has its own effect on {names}"
    if len(factor.terms) == 1:
        return f"{text}."
    correlated = {place for group, _ in factor.groups for place in group.places}
    part = "in part " if 0 < len(correlated) < len(factor.terms) else ""
    return f"{text}; these effects are {part}{'correlated' if correlated else 'independent'}."


def spread_sentences(results: Results) -> Iterator[str]:
    """One sentence per grouping factor: the sds of its effects."""
    table = results.variance_components
    for factor in results.posterior.model.factors:
        rows = table[(table["factor"] == factor.name) & (table["statistic"] == "sd")]
        listed = [
            f"{_value(row, results.prob)} for {_term(row.term)}"
            for row in rows.head(MOST_NAMES).itertuples()
        ]
        if factor.smooth:
            listed = [f"{_value(row, results.prob)} ({row.term})" for row in rows.itertuples()]
            yield f"Curves depart from their straight lines with an sd of {joined(listed)}."
            continue
        more = len(rows) - MOST_NAMES
        listed += [f"and {more} more in the table below"] if more > 0 else []
        yield (
            f"Between clusters of {factor.name}, the standard deviation of the effects is "
            f"{joined(listed)}."
        )


def explained_sentences(results: Results) -> Iterator[str]:
    """ICC and R2 in sentences; none if the predictor has several columns."""
    table = results.variance_components
    shares = table[table["statistic"].isin(["icc", "r2_marginal", "r2_conditional"])]
    if shares["term"].ne("").any() or shares.empty:
        return
    where = "" if results.posterior.model.family.has_residual_variance else ON_PREDICTOR
    for row in shares[shares["statistic"] == "icc"].itertuples():
        yield (
            f"Of the variance that the fixed effects leave{where}, clusters of {row.factor} "
            f"account for {_percent(row, results.prob)} (intraclass correlation)."
        )
    by_name = {row.statistic: row for row in shares.itertuples()}
    yield (
        f"The fixed effects explain {_percent(by_name['r2_marginal'], results.prob)} of the "
        f"variance{where} (marginal R2); together with the random effects they explain "
        f"{_percent(by_name['r2_conditional'], results.prob)} (conditional R2)."
    )


ON_PREDICTOR = ", on the scale of the linear predictor"


def _term(name: str) -> str:
    return "the intercept" if name == "Intercept" else name


def _value(row: Any, prob: float) -> str:
    """Median and interval, with two digits of the sd; very small and large numbers as they are."""
    decimals = 1 - math.floor(math.log10(row.sd)) if 1e-4 < row.sd < 100 else -1
    numbers = [
        cell(value, row.sd) if decimals < 0 else f"{value:,.{decimals}f}"
        for value in (row.median, row.lower, row.upper)
    ]
    return f"{numbers[0]} ({prob:.0%} interval {numbers[1]} to {numbers[2]})"


def _percent(row: Any, prob: float) -> str:
    return f"{row.median:.0%} ({prob:.0%} interval {row.lower:.0%} to {row.upper:.0%})"


def methods(results: Results) -> tuple[str, ...]:
    """Paragraphs for the methods section of a paper."""
    posterior, prob = results.posterior, results.prob
    model, facts = posterior.model, posterior.model.data_facts()
    names = list(facts.schema.columns if facts.schema else facts.feature_names)
    fixed = "a linear predictor" if model.linear else "a neural network"
    sizes = [f"{name} ({len(level):,} clusters)" for name, level in facts.levels.items()]
    of = f" of {joined(names)}" if names else ""
    random = f", and random effects of {joined(sizes)}" if sizes else ""
    program = (
        f"We modelled {facts.outcome_name} in {count_rows(facts.n_rows)} with a mixed-effects "
        f"model of family {model.family}, with {fixed}{of} for the fixed effects{random}: "
        f"{formula(model)}."
    )
    if model.adversaries:
        hidden = joined([adversary.factor for adversary in model.adversaries])
        program += (
            f" An adversary with a reversed gradient (Ganin et al. 2016) kept {hidden} out of the "
            "network's features, as in ARMED (Nguyen et al. 2023)."
        )
    return program, " ".join(_inference(posterior, prob)), " ".join(_judged(results))


def _inference(posterior: Posterior, prob: float) -> Iterator[str]:
    """How the posterior was computed."""
    priors = "Priors were weakly informative and scaled to the data; they are listed above"
    correlated = any(factor.groups for factor in posterior.model.factors)
    yield f"{priors}{' (correlations: LKJ, Lewandowski et al. 2009)' * correlated}."
    yield (
        "The posterior was approximated by stochastic variational inference (Hoffman et al. 2013) "
        "in Pyro (Bingham et al. 2019), with a structured guide that couples variance components, "
        "fixed effects and random effects."
    )
    if posterior.refined is not None and posterior.refined.method == "nuts":
        yield (
            "Its draws were then replaced by those of the No-U-Turn sampler (Hoffman and Gelman "
            "2014)."
        )
    elif posterior.refined is not None:
        yield "Draws were weighted by Pareto smoothed importance sampling (Vehtari et al. 2024)."
    if not posterior.model.linear:
        yield (
            "The weights of the network are point estimates, on which all intervals are "
            "conditional."
        )
    yield f"Intervals are equal-tailed and have the probability {prob:.0%}."


def _judged(results: Results) -> Iterator[str]:
    """How the fit was judged, and how shares of the variance are defined."""
    yield (
        "Intraclass correlations and R2 follow Johnson (2014) and Nakagawa et al. (2017). "
        "The accuracy of the draws was judged by importance sampling diagnostics (Vehtari et al. "
        "2017, 2024)."
    )
    yield (
        "The fit was judged by randomized quantile residuals (Dunn and Smyth 1996) and by "
        "posterior predictive checks (Gelman et al. 1996), whose results are listed above."
    )
    yield f"Random numbers had the seed {results.posterior.seed}."


def references(posterior: Posterior) -> tuple[str, ...]:
    """References of the methods text, in alphabetical order."""
    used = ["SVI", "Pyro", "PSIS", "LOO", "residuals", "predictive", "R2", "slopes"]
    model = posterior.model
    used += ["ARMED", "reversal"] if model.adversaries else []
    used += ["LKJ"] if any(factor.groups for factor in model.factors) else []
    used += ["NUTS"] if posterior.refined is not None and posterior.refined.method == "nuts" else []
    return tuple(sorted(REFERENCES[name] for name in used))


def versions() -> str:
    """Versions of the software that wrote the report."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
