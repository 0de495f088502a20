"""Pictures of what was merged (Figure 5 of the paper). Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from timm_ltm.models import MergeMasks

__all__ = ["mask_figure"]


def _channels_last(image: Tensor) -> Tensor:
    """(C, H, W) with any range -> (H, W, 3) in [0, 1]."""
    image = image.float()
    image = (image - image.amin()) / (image.amax() - image.amin()).clamp_min(1e-6)
    return image.expand(3, -1, -1).permute(1, 2, 0) if image.shape[0] == 1 else image[:3].permute(1, 2, 0)


def mask_figure(images: Tensor, masks: MergeMasks, path: str | Path | None = None, layer: int = -1) -> Figure:
    """Images, what is left of them after merging, and the weights of their largest merged tokens.

    Args:
        images: (B, C, H, W) as the model takes them.
        masks: ``model.forward_masks(images)``.
        path: A PNG is written here, if given.
        layer: Which of the merging blocks; the last by default.

    Returns:
        A figure with a column per image and three rows: the image; every patch as the mean of its merged token; the
        weights of the merged token that gathers most (Figure 5).

    Raises:
        ValueError: The model merges in no block.
    """
    from matplotlib.figure import Figure

    if not masks.accumulated:
        raise ValueError("masks: got none, expected a model that merges. Give it a compression_ratio below 1.")
    weights = masks.accumulated[layer].detach().float().cpu()  # B (H W) P
    H, W = masks.grids[layer]
    B = len(images)
    patches = F.adaptive_avg_pool2d(images.detach().float().cpu(), (H, W)).flatten(2)  # B C (H W)
    merged = patches @ weights  # B C P
    back = weights / weights.sum(dim=2, keepdim=True).clamp_min(1e-12)
    rebuilt = (merged @ back.transpose(1, 2)).unflatten(2, (H, W))
    gathered = (weights > weights.amax(dim=1, keepdim=True) / 8).sum(dim=1)  # B P, patches that count in each token
    heat = weights[torch.arange(B), :, gathered.argmax(dim=1)].unflatten(1, (H, W))
    figure = Figure(figsize=(1.6 * B, 5.2), layout="constrained")
    axes = figure.subplots(3, B, squeeze=False)
    rows = (
        ("image", [_channels_last(image) for image in images.cpu()], {}),
        (f"{weights.shape[2]} merged tokens", [_channels_last(image) for image in rebuilt], {}),
        ("weights of one", list(heat), {"cmap": "inferno"}),
    )
    for axis_row, (title, pictures, style) in zip(axes, rows, strict=True):
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest", **style)
            axis.set_xticks([])
            axis.set_yticks([])
        axis_row[0].set_ylabel(title)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
