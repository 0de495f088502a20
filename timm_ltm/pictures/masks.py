"""Figures of what was merged (Figure 5 of the paper).

One letter per axis: B images, H W pixels, h w grid of patches, P merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from timm_ltm.pictures.overlays import heat_over, home_of, rebuilt, sources_over
from timm_ltm.pictures.photos import shown
from timm_ltm.pictures.style import HEAT, save
from timm_ltm.reduction.settings import setting_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from timm_ltm.models import MergeMasks

__all__ = ["blocks_figure", "mask_figure"]

_INCHES = 2.4  # of a picture's longer side


def mask_figure(
    images: Sequence[Tensor] | Tensor,
    masks: MergeMasks,
    path: str | Path | None = None,
    layer: int = -1,
    tokens: Sequence[int] | Tensor | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """A column per photograph: itself, one merged token over it, where all of them come from, and what is left of it.

    Args:
        images: B photographs (3, H, W) in [0, 1] of any sizes, or model inputs (B, C, H, W) of any range.
        masks: Of these images, ``model.forward_masks(x)``.
        path: A picture is written here, if given.
        layer: Which of the merging blocks; the last by default.
        tokens: Which merged token of each image is shown, :func:`timm_ltm.models.record.representative_tokens` for
            example; those that gather most patches if not given.
        labels: Below the columns.

    Raises:
        ValueError: The model merges in no block, there is no such one, or images and masks are not as many.
    """
    _check(images, masks)
    if not -len(masks.accumulated) <= layer < len(masks.accumulated):
        raise setting_error("layer", layer, f"one of the {len(masks.accumulated)} blocks that merge", "Count from 0.")
    weights, grid = masks.accumulated[layer].detach().float().cpu(), masks.grids[layer]  # B (h w) P
    if tokens is None:
        tokens = [home_of(w).bincount(minlength=w.shape[1]).argmax() for w in weights]
    photos = [shown(image) for image in images]
    pictures = [
        (
            photo,
            heat_over(photo, w[:, int(token)].unflatten(0, grid)),
            sources_over(photo, w, grid),
            rebuilt(photo, w, grid),
        )
        for photo, w, token in zip(photos, weights, tokens, strict=True)
    ]
    block = masks.blocks[layer] + 1
    titles = (
        "image",
        f"weights of one\nmerged token, block {block}",
        "what goes together,\nthe largest in colour",
    )
    titles = (*titles, f"means of the\n{weights.shape[2]} merged tokens")
    figure, axes = _grid(photos, 4, len(photos))
    for row, title in enumerate(titles):
        for column, of_image in enumerate(pictures):
            _show(axes[row][column], of_image[row])
        axes[row][0].set_ylabel(title, fontsize=9)
    for axis, label in zip(axes[-1], labels or (), strict=False):
        axis.set_xlabel(label, fontsize=9)
    _heat_bar(figure, axes[1])
    return save(figure, path, _dpi(photos))


def blocks_figure(
    images: Sequence[Tensor] | Tensor,
    masks: MergeMasks,
    path: str | Path | None = None,
    labels: Sequence[str] | None = None,
) -> Figure:
    """A row per photograph: every patch replaced by its merged token's mean, block by block.

    Args:
        images: As of :func:`mask_figure`.
        masks: As of :func:`mask_figure`.
        path: A picture is written here, if given.
        labels: On the left of the rows.

    Raises:
        ValueError: The model merges in no block, or images and masks are not as many.
    """
    _check(images, masks)
    photos = [shown(image) for image in images]
    figure, axes = _grid(photos, len(photos), 1 + len(masks.accumulated))
    for i, photo in enumerate(photos):
        _show(axes[i][0], photo)
        for axis, weights, grid in zip(axes[i][1:], masks.accumulated, masks.grids, strict=True):
            _show(axis, rebuilt(photo, weights[i].detach().float().cpu(), grid))
        if labels is not None:
            axes[i][0].set_ylabel(labels[i], fontsize=9)
    axes[0][0].set_title("image", fontsize=9)
    for axis, block, weights in zip(axes[0][1:], masks.blocks, masks.accumulated, strict=True):
        axis.set_title(f"block {block + 1}, {weights.shape[2]} tokens", fontsize=9)
    return save(figure, path, _dpi(photos))


def _check(images: Sequence[Tensor] | Tensor, masks: MergeMasks) -> None:
    if not masks.accumulated:
        raise ValueError("masks: got none, expected a model that merges. Give it a compression_ratio below 1.")
    if len(images) != len(masks.accumulated[0]) or not len(images):
        raise setting_error("images", len(images), f"{len(masks.accumulated[0])}, as many as masks", "Give the same.")


def _grid(photos: list[Tensor], rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    ratio = max(photo.shape[1] / photo.shape[2] for photo in photos)
    width, height = (_INCHES, _INCHES * ratio) if ratio <= 1 else (_INCHES / ratio, _INCHES)
    figure = Figure(figsize=(width * columns + 0.9, height * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _dpi(photos: list[Tensor]) -> float:
    """At which the largest photograph is drawn pixel by pixel, within reason."""
    return min(max(*(max(photo.shape[1:]) / _INCHES for photo in photos), 150.0), 600.0)


def _show(axis: Axes, picture: Tensor) -> None:
    axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")  # 3 H W -> H W 3
    axis.set_xticks([])
    axis.set_yticks([])


def _heat_bar(figure: Figure, axes: Any) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=HEAT), ax=list(axes), fraction=0.04, pad=0.02)
    bar.set_label("weight, of the largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
