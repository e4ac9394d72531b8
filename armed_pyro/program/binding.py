"""Checks, when a program is bound to data, that network, terms, adversaries and names fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from armed_pyro.networks.modes import evaluated
from armed_pyro.networks.taps import modulated, run
from armed_pyro.program.plan import Plan
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.inputs import Structure

__all__ = [
    "activation_widths",
    "check_intercept",
    "check_row_effects",
    "needs_fixed_run",
    "unreached",
    "warn_if_far",
    "warn_if_small",
]

# Standard deviations of a feature between its mean and zero.
FAR = 10.0


def activation_widths(model: Plan) -> dict[str, int]:
    """Widths of the layers that terms and adversaries tap, by module path, after checks.

    They come from one pass of the network over two rows of zeros.
    """
    record = _probe(model)
    _check_shapes(model, record)
    paths = dict.fromkeys(path for term in model.terms for path in term.layers())
    paths |= dict.fromkeys(path for adversary in model.adversaries for path in adversary.taps)
    return {path: record[path].shape[-1] for path in paths}


def _run(
    model: Plan, x: Structure, effects: Sequence[tuple[str, Tensor]] = (), head: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Activations in one pass in evaluation mode, and the output as ""."""
    net, like = model.net, model.network_reference()
    # Taps record a layer's output after the effects on it.
    with evaluated(net), torch.no_grad(), modulated(net, effects):
        element, paths = model.output, model.layers()
        return run(net, x, paths, head, element=element, like=like, whole=True)[1]


def _probe(model: Plan) -> dict[str, Tensor]:
    """The network's output for two rows of zeros, and the activations that were recorded."""
    facts, like = model.data_facts(), model.reference()
    x = facts.example(2, like)
    head = [model.head_path()] if model.bayesian_head else []
    try:
        record = _run(model, x, head=head)
        if head:
            _check_head(model, head[0], record.get(f"<{head[0]}"))
        return record
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the network cannot take the {_described(model)}: {error}") from error


def _described(model: Plan) -> str:
    """The inputs of the network in words."""
    facts = model.data_facts()
    if facts.inputs is not None:
        return f"inputs {facts.inputs.content}"
    shape = ", ".join(map(str, facts.feature_shape))
    return f"features, of shape (rows, {shape}) ({', '.join(facts.feature_names) or 'unnamed'})"


def _check_shapes(model: Plan, record: Mapping[str, Tensor]) -> None:
    """Check the shapes of the output and of the recorded activations for two rows."""
    facts, output = model.data_facts(), record[""].reshape(2, -1)
    columns = model.family.contrasts(output).shape[-1]
    if columns != len(facts.columns):
        raise ValueError(
            f"the network has {output.shape[-1]} output(s), but the outcome "
            f"{facts.outcome_name!r} of family {model.family.name!r} needs "
            f"{output.shape[-1] - columns + len(facts.columns)}"
        )
    missing = [path for path in model.layers() if path not in record]
    if missing:
        raise ValueError(f"the network never runs its module {missing[0]!r}: nothing to tap")
    for other in model.others:
        if record[other.tap].shape[1:] != facts.feature_shape:
            raise ValueError(
                f"{other.name!r} is the features rebuilt, of shape (rows, "
                f"{', '.join(map(str, facts.feature_shape))}), but the module {other.at!r} gives "
                f"{tuple(record[other.tap].shape)} for two rows: name the layer whose output has "
                "the features' shape, or change the network"
            )


def unreached(model: Plan) -> frozenset[str]:
    """Tapped layers, and "" for the output, that no effect inside the network can change.

    Their activations for random features are equal with and without random effects.
    """
    paths = ["", *model.layers()]
    if not modulates(model):
        return frozenset(paths)
    facts, like = model.data_facts(), model.reference()
    noise = torch.Generator().manual_seed(0)
    x = facts.example(2, like, partial(torch.randn, generator=noise))
    blocks = [
        (block.path, torch.randn(2, len(block.names), generator=noise).to(like))
        for factor in model.factors
        for block in factor.filters
    ]
    without, within = _run(model, x), _run(model, x, blocks)
    return frozenset(path for path in paths if torch.equal(without[path], within[path]))


def needs_fixed_run(model: Plan) -> bool:
    """Whether training needs a pass of the network without effects inside, besides those with."""
    wanted = {path for adversary in model.adversaries for path in adversary.taps}
    if model.fixed_weight:
        wanted |= {"", *(other.tap for other in model.others)}
    return not wanted <= model.unreached


def _check_head(model: Plan, path: str, hidden: Tensor | None) -> None:
    """Check that the network returns the head's output unchanged, by replacing that output."""
    noise = torch.Generator().manual_seed(0)
    replaced: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        replaced.append(torch.linspace(-3, 3, output.numel()).to(output).view_as(output))
        return replaced[-1]

    hook = model.net.get_submodule(path).register_forward_hook(replace)
    try:
        fill = partial(torch.randn, generator=noise)
        output = _run(model, model.data_facts().example(2, model.reference(), fill))[""]
    finally:
        hook.remove()
    vectors = hidden is not None and hidden.dim() == 2 and len(replaced) == 1
    if not vectors or not torch.equal(replaced[0].reshape(-1), output.reshape(-1)):
        raise ValueError(
            f"a Bayesian head needs the last linear layer ({path or 'the network'}) to give the "
            "network's output, but something follows it: move it to the end, or leave "
            "bayesian_head off"
        )


def check_intercept(model: Plan) -> None:
    """Check that fixed effects without an intercept belong to a network that can be without one."""
    net = model.network
    if model.data_facts().intercept or model.linear:
        return
    if not isinstance(net, nn.Linear) or net.bias is not None:
        raise ValueError(
            "the features are without an intercept ('0 +'), which has a meaning for linear fixed "
            "effects only: take nn.Linear(..., bias=False) or bayesian_head=True (command line: "
            "--net linear), or leave '0 +' out, as a network has biases of its own"
        )


def check_row_effects(model: Plan) -> None:
    """Refuse, or warn of, effects of single rows that the family's own variance hides.

    An unknown residual variance hides them altogether; other families tell them apart poorly.
    """
    family, known = model.family, model.known()
    unknown_parameters = [p.name for p in family.parameters if p.name not in known]
    if not family.no_row_effects or (family.parameters and not unknown_parameters):
        return
    for factor in model.factors:
        if int(model.data_facts().counts[factor.name].max()) > 1 or factor.chained:
            continue
        problem = (
            f"every cluster of {factor.name!r} has one row, so its effects cannot be told from "
            f"{family.no_row_effects} of family {family.name!r}"
        )
        if family.is_quadratic:
            raise ValueError(f"{problem}: choose a factor whose clusters have several rows")
        warnings.warn(f"{problem}: its sd rests on its prior", UserWarning, stacklevel=4)


def warn_if_small(model: Plan) -> None:
    """Warn if there are fewer rows than trained weights and random-effect terms."""
    count = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
    count += sum(len(factor.terms) for factor in model.factors)
    rows = model.data_facts().n_rows
    if rows < count:
        warnings.warn(
            f"there are fewer rows ({rows}) than parameters ({count}): expect overfitting where "
            "no rows are held out; a smaller network may predict better",
            UserWarning,
            stacklevel=4,
        )


def warn_if_far(model: Plan) -> None:
    """Warn of a prior of correlated terms at x = 0 if that is far from the rows."""
    for factor in model.factors:
        for block in factor.linear:
            matrix = block.from_zero()
            if matrix is None or block.covariance.diagonal or block.names[0] in factor.at_means:
                continue
            far = [n for n, s in zip(block.names, matrix[0].tolist(), strict=True) if abs(s) > FAR]
            if far:
                warnings.warn(
                    f"the prior of {factor.sd_site}[{block.names[0]}] holds at {far[0]} = 0, more "
                    f"than {FAR:g} sds of {far[0]} from its mean: there, intercept and slope must "
                    "have a correlation near 1 or -1, to which the prior gives little weight; "
                    f"centre {far[0]}, or leave out the scale of the intercept",
                    UserWarning,
                    stacklevel=4,
                )
