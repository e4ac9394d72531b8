"""Checks of a network with training rows: outputs that a family would transform twice, and taps."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.networks.modes import evaluated
from armed_pyro.networks.tap import Tap, chosen_tensor, module_at
from armed_pyro.networks.taps import as_type, call
from armed_pyro.program.plan import Plan
from armed_pyro.random_effects.terms import Slopes
from armed_pyro.rows.inputs import LazyInputs, mapped

__all__ = ["check_network"]

# Rows that run through the network.
ROWS = 64
# Relative spread over rows below which an activation says nothing of them.
CONSTANT = 1e-6
# Steps of the gradient that change an output's shape alone.
RESHAPING = ("View", "Reshape", "Squeeze", "Unsqueeze", "Alias", "Unsafe", "ToCopy", "Select")


def check_network(model: Plan, data: ClusteredData) -> None:
    """Check the network with some training rows.

    Warnings tell of a sigmoid or softmax at its end, where the family has one already, and of two
    outputs that are taken for logits.

    Raises
    ------
    ValueError
        If a tapped module runs several times and no call is named, or its output is the same in
        all rows.
    """
    rows = data.take(slice(0, ROWS))
    like = model.network_reference()
    x = model.data_facts().encode(rows, model.reference()).all().network_inputs
    loaded = x.load() if isinstance(x, LazyInputs) else x
    inputs = mapped(lambda values: as_type(like, values), loaded)
    calls: Counter[str] = Counter()
    with evaluated(model.network), ExitStack() as hooks:
        for path in dict.fromkeys(Tap.of(text).path for text in _taps(model)):
            module = module_at(model.network, path)
            handle = module.register_forward_hook(lambda *_, path=path: calls.update([path]))
            hooks.callback(handle.remove)
        differentiable = mapped(_leaf, inputs)
        with torch.enable_grad():
            output = chosen_tensor(call(model.network, differentiable), model.output)
    _check_calls(model, calls)
    if not model.bayesian_head:
        _tell_of_output(model, output)
    _check_taps(model, rows)


def _taps(model: Plan) -> Iterator[str]:
    """Yield the texts of the taps of terms and adversaries."""
    for term in model.terms:
        yield from term.layers()
    for adversary in model.adversaries:
        yield from adversary.taps


def _leaf(values: Tensor) -> Tensor:
    """A copy that gradients flow into, of floating types."""
    return values.detach().requires_grad_(True) if values.is_floating_point() else values


def _check_calls(model: Plan, calls: Counter[str]) -> None:
    """Raise ValueError for a tap of a module that runs several times, without a call."""
    for text in _taps(model):
        tap = Tap.of(text)
        if tap.call is None and calls[tap.path] > 1:
            raise ValueError(
                f"the network runs its module {tap.path!r} {calls[tap.path]} times: name the call, "
                f"from '{tap.path}#1' to '{tap.path}#{calls[tap.path]}', or tap another module"
            )


def _check_taps(model: Plan, data: ClusteredData) -> None:
    """Raise ValueError for an activation that is the same in all rows."""
    texts = [text for term in model.terms if isinstance(term, Slopes) for text in term.layers()]
    texts += [text for adversary in model.adversaries for text in adversary.taps]
    if not texts or data.n_rows < 2:
        return
    source = model.data_facts().encode(data, model.reference())
    with evaluated(model.network), torch.no_grad():
        _, record = model.run_network(source.all())
    for text in dict.fromkeys(texts):
        values = record[text].double()
        if bool((values.std(0) <= CONSTANT * (1 + values.abs().amax(0))).all()):
            raise ValueError(
                f"the tapped activation {text!r}, of {values.shape[1]} units, is the same in "
                f"{len(values)} training rows, so that it says nothing of them: tap another "
                "module, or pool tokens or space otherwise (pool='first', 'last', 'max')"
            )


def _tell_of_output(model: Plan, output: Tensor) -> None:
    """Warn of a network that applies the family's link itself, and of two logits."""
    family, facts = model.family, model.data_facts()
    probabilities = family.is_probability or family.has_class_probabilities
    last = _last_operation(output)
    if probabilities and last in ("Sigmoid", "Softmax"):
        warnings.warn(
            f"the network ends in a {last.lower()}, but family {family.name!r} takes its output as "
            "the linear predictor and applies its own link: remove the last step, as probabilities "
            "taken for logits can only predict chances near the mean",
            UserWarning,
            stacklevel=4,
        )
    width = output.reshape(len(output), -1).shape[1]
    if family.is_probability and len(facts.columns) == 1 and width == 2:
        warnings.warn(
            f"the network has two outputs for the outcome {facts.outcome_name!r} of two values: "
            "they are taken as logits, and their difference, second minus first, is the predictor",
            UserWarning,
            stacklevel=4,
        )


def _last_operation(output: Tensor) -> str:
    """Name of the operation that made a tensor, apart from changes of its shape."""
    step = output.grad_fn
    while step is not None:
        name = step.name().removesuffix("0").removesuffix("Backward")
        if not name.startswith(RESHAPING):
            return name
        step = step.next_functions[0][0] if step.next_functions else None
    return ""
