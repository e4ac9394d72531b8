"""Convolutional classifiers: the ARMED paper's network, at any size, and its program."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from armed_pyro import Adversary, MixedEffects, Slopes

__all__ = ["block_paths", "convolutional", "convolutional_program"]

# Filters of the paper's seven blocks.
WIDTHS = (32, 64, 128, 256, 256, 512, 512)


def convolutional(
    image: Sequence[int] = (1, 64, 64),
    n_outputs: int = 1,
    *,
    widths: Sequence[int] = WIDTHS,
    units: int = 512,
    dropout: float = 0.5,
) -> nn.Sequential:
    r"""f(x) = W h + b with h = PReLU(V flatten(B_L ... B_1(x)) + c).

    Each block B is a 3x3 convolution, batch normalisation, PReLU and 2x2 max pooling; an axis of
    one pixel is not pooled. Every second block ends in dropout. The blocks are the modules
    ``"block1"``, ``"block2"``, ..., paths for `Adversary` taps. The penultimate layer is
    ``"hidden"``, a path for `Slopes`.

    Parameters
    ----------
    image : sequence of int
        Channels, height and width of x.
    n_outputs : int
        Width of f(x): 1, or the number of classes.
    widths : sequence of int
        Number of filters of each block; the network has one block per entry.
    units : int
        Width of the dense layer.
    dropout : float
        Dropout probability in every second block.

    Raises
    ------
    ValueError
        If the image is not three positive sizes, or a width is not positive.

    Examples
    --------
    >>> net = convolutional((1, 16, 16), widths=(4, 8), units=6)
    >>> [name for name, _ in net.named_children()]
    ['block1', 'block2', 'flat', 'hidden', 'output']

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 4.3.
    """
    if len(image) != 3 or min(image) < 1:
        raise ValueError(f"`image` is (channels, height, width), not {tuple(image)}")
    if not widths or min(widths) < 1 or units < 1:
        raise ValueError(
            f"`widths` must be one or more positive numbers of filters and `units` positive, not "
            f"{tuple(widths)} and {units}"
        )
    channels, height, width = image
    net = nn.Sequential()
    for number, filters in enumerate(widths, 1):
        block = nn.Sequential(
            nn.Conv2d(channels, filters, 3, padding=1, bias=False),
            nn.BatchNorm2d(filters),
            nn.PReLU(filters),
        )
        pool = (min(2, height), min(2, width))
        if max(pool) > 1:
            block.append(nn.MaxPool2d(pool))
        if number % 2 == 0:
            block.append(nn.Dropout(dropout))
        net.add_module(f"block{number}", block)
        channels, height, width = filters, height // pool[0], width // pool[1]
    net.add_module("flat", nn.Flatten())
    net.add_module("hidden", nn.Sequential(nn.Linear(channels * height * width, units), nn.PReLU()))
    net.add_module("output", nn.Linear(units, n_outputs))
    return net


def block_paths(net: nn.Module) -> tuple[str, ...]:
    """Module paths of a convolutional network's blocks: taps for an adversary.

    Examples
    --------
    >>> block_paths(convolutional((1, 8, 8), widths=(2, 2)))
    ('block1', 'block2')
    """
    return tuple(name for name, _ in net.named_children() if name.startswith("block"))


def convolutional_program(
    factor: str,
    image: Sequence[int] = (1, 64, 64),
    n_outputs: int = 1,
    *,
    widths: Sequence[int] = WIDTHS,
    units: int = 512,
    dropout: float = 0.5,
    adversary_weight: float = 1.0,
    fixed_weight: float = 1.0,
) -> MixedEffects:
    r"""The paper's program: random intercept, random slopes on the penultimate layer, adversary.

    .. math:: \eta_i = f(x_i) + u_{0k} + h(x_i)^\top u_k, \quad k = g(i)

    The adversary taps every block's feature maps, averaged over space.

    Parameters
    ----------
    factor : str
        Grouping factor, such as ``"site"``.
    image, n_outputs, widths, units, dropout
        Sizes of the network; see `convolutional`.
    adversary_weight, fixed_weight : float
        lambda_A and lambda_F; lambda_A = 0 removes the adversary.

    Examples
    --------
    >>> program = convolutional_program("site", (1, 8, 8), widths=(2, 2), units=3)
    >>> [str(term) for term in program.terms]
    ['(1 | site)', "Slopes('site', on='hidden')"]
    """
    net = convolutional(image, n_outputs, widths=widths, units=units, dropout=dropout)
    adversary = Adversary(factor, block_paths(net), weight=adversary_weight)
    return MixedEffects(
        net,
        [f"(1 | {factor})", Slopes(factor, on="hidden")],
        "bernoulli" if n_outputs == 1 else "categorical",
        adversary if adversary_weight else (),
        fixed_weight=fixed_weight,
    )
