"""Colours that colour-blind readers tell apart, with markers and dashes that black-and-white prints do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "HEAT", "finish_axes", "line_style", "save"]

# Okabe and Ito, "Color Universal Design", 2008, without its yellow, which white swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HEAT = "inferno"  # rises in lightness alone
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", "-.", ":")


def line_style(index: int) -> dict[str, object]:
    """Keyword arguments of matplotlib's ``plot`` for the index-th line."""
    n = len(COLOURS)
    return {
        "color": COLOURS[index % n],
        "marker": _MARKERS[index % n],
        "linestyle": _DASHES[(index + index // n) % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def finish_axes(axis: Axes, x: str, y: str) -> None:
    """Labels with their units, a light grid, no box."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | Path | None, dpi: float = 150) -> Figure:
    """Write it as what the path ends with, if there is one."""
    if path is not None:
        figure.savefig(path, dpi=dpi)
    return figure
