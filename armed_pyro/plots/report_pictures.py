"""Pictures of a fit for its report: the main effects, the predictive check and the residuals."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from armed_pyro.effects.grid import make_grid
from armed_pyro.plots.fit_plots import WIDTH, Plots
from armed_pyro.report.content import Picture, Pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report_pictures"]

# Variables whose effects are drawn; a reader takes in no more at once.
MOST_EFFECTS = 6
# Inches of a picture beside others: on a screen of 390 pixels, its text then has 9 pixels.
SIZE = (4.2, 2.7)


def report_pictures(plots: Plots, *, prob: float) -> Pictures:
    """The pictures that can be drawn; notes name the others with the reason."""
    notes: dict[Literal["effects", "fit"], str] = {}
    effects, missing = _effects(plots, prob)
    if missing:
        notes["effects"] = missing
    made, failed = list[Picture](), list[str]()
    for draw, name, alt in (
        (lambda: plots.ppc(prob=prob), "predictive check", "Outcomes beside replicated outcomes"),
        (plots.residuals, "residuals", "Residuals against normal, fitted values and clusters"),
    ):
        figure, reason = _drawn(draw)
        if figure is None:
            failed.append(f"There is no picture of the {name}: {reason}.")
        else:
            figure.set_size_inches(SIZE[0], figure.get_figheight() * SIZE[0] / WIDTH)
            made.append(Picture(figure, alt))
    if failed:
        notes["fit"] = " ".join(failed)
    return Pictures(effects, tuple(made), notes)


def _effects(plots: Plots, prob: float) -> tuple[tuple[Picture, ...], str]:
    """Pictures of the first variables, and what is said of the others."""
    facts = plots.posterior.model.data_facts()
    try:
        make_grid(plots.posterior)
    except ValueError as error:
        return (), f"There are no pictures of single variables: {error}."
    names = list(facts.feature_names if facts.schema is None else facts.schema.columns)
    pictures, notes = list[Picture](), list[str]()
    for name in names[:MOST_EFFECTS]:
        figure, reason = _drawn(lambda name=name: plots.effects(name, prob=prob))  # type: ignore[misc]
        if figure is None:
            notes.append(f"The effect of {name} is not drawn: {reason}.")
            continue
        figure.set_size_inches(*SIZE)
        pictures.append(Picture(figure, f"Expected outcome over {name}"))
    if (more := len(names) - MOST_EFFECTS) > 0:
        notes.append(f"Fit.plot.effects draws the other {more} variables, each by its name.")
    return tuple(pictures), " ".join(notes)


def _drawn(draw: Callable[[], Figure]) -> tuple[Figure | None, str]:
    """A figure, or the reason why there is none."""
    try:
        return draw(), ""
    except ValueError as error:
        return None, str(error)
