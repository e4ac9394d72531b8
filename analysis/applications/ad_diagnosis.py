"""Diagnosis of Alzheimer's disease from images of several sites, by the convolutional program.

Run with ``python -m armed_pyro.analysis.applications.ad_diagnosis``; ``--smoke`` takes seconds.
``--data scans.npz`` reads your images (arrays images, labels, sites). Without it, real digits stand
in for them: 12 sites to train on and 6 to predict, with known contrast, brightness, blur and share
of either class.
"""

from __future__ import annotations

from collections.abc import Sequence

from armed_pyro import MixedEffects, Schedule
from armed_pyro.analysis.applications.image_fits import Application, run
from armed_pyro.analysis.applications.image_sites import Study, digit_study
from armed_pyro.models.convolutional import WIDTHS, convolutional_program

__all__ = ["APPLICATION", "main", "program", "study"]

# Digits of class 1.
POSITIVE = (5, 6, 7, 8, 9)


def study(seed: int = 0, small: bool = False, size: int = 32, grain: float = 0.35) -> Study:
    """The stand-in's rows, and the effects of its sites."""
    effects = {"contrast": 0.3, "brightness": 0.15, "blur": 0.8, "shift": 1.0, "grain": grain}
    if small:
        return digit_study(POSITIVE, seen=4, unseen=2, rows=16, size=16, seed=seed, **effects)
    return digit_study(POSITIVE, size=size, seed=seed, **effects)


def program(data: Study, small: bool = False) -> MixedEffects:
    """The paper's network for a user's images, and a smaller network for the stand-in."""
    if data.effects is None:
        return convolutional_program(data.factor, data.image, widths=WIDTHS)
    widths, units = ((3, 4), 6) if small else ((8, 16, 32), 32)
    return convolutional_program(data.factor, data.image, widths=widths, units=units)


APPLICATION = Application(
    "ad_diagnosis",
    "Digits at 12 sites: effects of the sites on labels, known and recovered",
    "site",
    study,
    program,
    Schedule(steps=3000, batch_size=64, stages=2, net_learning_rate=0.003),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit the program, print the tables and write them with the figures."""
    run(APPLICATION, __doc__, argv)


if __name__ == "__main__":
    main()
