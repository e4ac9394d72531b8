"""Colours and settings of the library's plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INK, ACCENT, FAINT = "#1f2933", "#2b6cb0", "#a0aec0"
# Settings of matplotlib. Names in the data are shown as they are: "$x$" is no formula.
PLAIN: Mapping[str, Any] = {"font.size": 9, "text.parse_math": False}


def tidy(axes: Any) -> None:
    """Remove the top and right spines, and mute the ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=FAINT, labelcolor=INK)
