"""Melanoma cells in several batches, labelled and rebuilt by the autoencoder-classifier.

Run with ``python -m armed_pyro.analysis.applications.melanoma``; ``--smoke`` takes seconds.
``--data cells.npz`` reads your images (arrays images, labels, batches). Without it, real digits
stand in for them, in batches that differ in illumination by known amounts: gain, offset, and light
from one side. Light from one side shows a limit of the model: scales and biases of filters are the
same everywhere in an image.
"""

from __future__ import annotations

from collections.abc import Sequence

from armed_pyro import MixedEffects, Schedule
from armed_pyro.analysis.applications.image_fits import Application, run
from armed_pyro.analysis.applications.image_sites import Study, digit_study
from armed_pyro.models.autoencoder import autoencoder_program

__all__ = ["APPLICATION", "main", "program", "study"]

# Digits of class 1.
POSITIVE = (0, 2, 4, 6, 8)


def study(seed: int = 0, small: bool = False, size: int = 32, grain: float = 0.25) -> Study:
    """The stand-in's rows, and the illumination of its batches."""
    effects = {"contrast": 0.3, "brightness": 0.15, "light": 0.3, "shift": 1.0, "grain": grain}
    sizes = {"seen": 4, "unseen": 2, "rows": 16, "size": 16} if small else {"size": size}
    return digit_study(POSITIVE, factor="batch", seed=seed, **sizes, **effects)


def program(data: Study, small: bool = False) -> MixedEffects:
    """The paper's network for a user's images, and a smaller network for the stand-in."""
    if data.effects is None:
        return autoencoder_program(data.factor, data.image)
    widths, latents = ((3, 4), 4) if small else ((8, 16, 32), 16)
    return autoencoder_program(data.factor, data.image, widths=widths, latents=latents, units=16)


APPLICATION = Application(
    "melanoma",
    "Digits in 12 batches: effects of the batches on labels and images, known and recovered",
    "batch",
    study,
    program,
    Schedule(steps=800, batch_size=64, stages=0, net_learning_rate=0.005),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the program, print the tables and write them with the figures."""
    run(APPLICATION, __doc__, argv)


if __name__ == "__main__":
    main()
