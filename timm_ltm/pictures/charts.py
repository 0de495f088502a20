"""Charts: the information bottleneck by layer, training curves, accuracy against cost (the paper's Figures 3, 4, 2)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ltm.pictures.style import finish_axes, line_style, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from timm_ltm.information import Information

__all__ = ["curves_figure", "information_figure", "read_summary", "read_table", "tradeoff_figure"]

Rows = Sequence[Mapping[str, Any]]


def information_figure(models: Mapping[str, Sequence[Information]], path: str | Path | None = None) -> Figure:
    """IBB(G) and IB(G) by transformer block, a line per model (Figure 3).

    Args:
        models: Name to what :func:`timm_ltm.information.information` found.
        path: A picture is written here, if given.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bound, loss = figure.subplots(1, 2)
    for i, (name, found) in enumerate(models.items()):
        blocks = [f for f in found if f.layer is not None]
        layers = [f.layer for f in blocks]
        bound.plot(layers, [f.bound for f in blocks], label=name, **line_style(i))
        loss.plot(layers, [f.loss for f in blocks], label=name, **line_style(i))
    finish_axes(bound, "transformer block", "IB bound, IBB(G) (nats)")
    finish_axes(loss, "transformer block", "IB loss, IB(G) (nats)")
    for axis in (bound, loss):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    bound.legend(fontsize=8)
    return save(figure, path)


_CURVES = (  # columns of timm's summary.csv, and what they are called
    ("train_loss", "training loss"),
    ("eval_loss", "test loss"),
    ("eval_top1", "test top-1 (%)"),
)


def curves_figure(runs: Mapping[str, Rows], path: str | Path | None = None) -> Figure:
    """Training and test curves, a line per run (Figure 4).

    Args:
        runs: Name to rows of timm's ``summary.csv``, see :func:`read_summary`. Columns that no run has are left out.
        path: A picture is written here, if given.

    Raises:
        ValueError: There is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = [(key, title) for key, title in _CURVES if any(key in row for rows in runs.values() for row in rows)]
    if not curves:
        raise ValueError(f"runs: got none with {[key for key, _ in _CURVES]}, expected timm's summary.csv with rows.")
    figure = Figure(figsize=(4.2 * len(curves), 3.4), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (key, title) in zip(axes, curves, strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            style = {**line_style(i), "markevery": max(1, len(points) // 10)}
            if points:
                axis.plot(*zip(*points, strict=True), label=name, **style)
        finish_axes(axis, "epoch", title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    return save(figure, path)


def tradeoff_figure(rows: Rows, path: str | Path | None = None) -> Figure:
    """Top-1 against GMACs, a line per method (Figure 2).

    Args:
        rows: With ``method``, ``gmacs``, ``top1`` in percent, and perhaps ``top1_low`` and ``top1_high``, the ends of
            an interval. Methods of one row are points. With ``training``, of which ``none`` is without, a panel for
            each.
        path: A picture is written here, if given.

    Raises:
        ValueError: A column is missing, or there are no rows.
    """
    from matplotlib.figure import Figure

    missing = [key for key in ("method", "gmacs", "top1") if not rows or key not in rows[0]]
    if missing:
        raise ValueError(f"rows: got none with {missing}, expected columns method, gmacs and top1. Add them.")
    panels = list(dict.fromkeys(row.get("training") for row in rows))
    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, training in zip(axes, panels, strict=True):
        of_panel = [row for row in rows if row.get("training") == training]
        for i, method in enumerate(methods):
            _tradeoff_line(axis, [row for row in of_panel if row["method"] == method], method, line_style(i))
        finish_axes(axis, "GMACs per image", "top-1 (%)")
        if training:
            axis.set_title("without training" if training == "none" else training, fontsize=10)
    axes[0].legend(fontsize=8)
    return save(figure, path)


def _tradeoff_line(axis: Any, rows: Rows, method: str, style: dict[str, Any]) -> None:
    points = sorted(rows, key=lambda row: float(row["gmacs"]))
    if not points:
        return
    x, y = ([float(row[key]) for row in points] for key in ("gmacs", "top1"))
    if all(row.get("top1_low") not in (None, "") and row.get("top1_high") not in (None, "") for row in points):
        low = [max(0.0, t - float(row["top1_low"])) for t, row in zip(y, points, strict=True)]
        high = [max(0.0, float(row["top1_high"]) - t) for t, row in zip(y, points, strict=True)]
        axis.errorbar(x, y, yerr=[low, high], label=method, capsize=2.5, elinewidth=0.9, **style)
    else:
        axis.plot(x, y, label=method, **style)


def read_table(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        ValueError: There is no such file, or no row in it.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"file: got {str(path)!r}, expected a CSV file that can be read ({error.strerror}).") from None
    if not rows:
        raise ValueError(f"file: got {str(path)!r} without a row, expected some. Let the run write it first.")
    return rows


def read_summary(path: str | Path) -> list[dict[str, float]]:
    """The epochs of timm's ``summary.csv``, or of the folder of a run that holds it.

    A resumed run repeats its header, and perhaps epochs: the later ones count.

    Raises:
        ValueError: There is no such file, or it holds no epochs.
    """
    path = Path(path)
    path = path / "summary.csv" if path.is_dir() else path
    epochs: dict[float, dict[str, float]] = {}
    for row in read_table(path):
        numbers = {key: number for key, value in row.items() if (number := _number(value)) is not None}
        if "epoch" in numbers:
            epochs[numbers["epoch"]] = numbers
    if not epochs:
        raise ValueError(
            f"file: got {str(path)!r} without a column 'epoch', expected timm's summary.csv. Give another."
        )
    return [epochs[epoch] for epoch in sorted(epochs)]


def _number(value: str | None) -> float | None:
    try:
        return float(value) if value else None
    except (TypeError, ValueError):
        return None
