"""One photograph and one mask as a picture of the photograph's size: arrays, no figures.

One letter per axis: H W pixels of the photograph, h w grid of patches, P merged tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.pictures.style import COLOURS, HEAT

__all__ = ["heat_over", "home_of", "rebuilt", "sources_over"]

_FINE = 400  # pixels of the shorter side for each of a line's width


def home_of(weights: Tensor) -> Tensor:
    """(h w,): the merged token in which each patch's weight (h w, P) is largest among its own."""
    return weights.argmax(dim=1)


def heat_over(photo: Tensor, heat: Tensor) -> Tensor:
    """A merged token's weights over the photograph: the higher, the brighter and the less of the photograph.

    Args:
        photo: (3, H, W) in [0, 1].
        heat: (h, w), not negative.

    Returns:
        (3, H, W).
    """
    from matplotlib import colormaps

    heat = heat / heat.amax().clamp_min(1e-12)
    heat = F.interpolate(heat[None, None], size=photo.shape[1:], mode="nearest-exact")[0, 0]
    colour = torch.from_numpy(colormaps[HEAT](heat.numpy())[..., :3]).float().permute(2, 0, 1)  # H W 3 -> 3 H W
    grey = photo.mean(dim=0, keepdim=True).expand(3, -1, -1)
    share = 0.4 + 0.35 * heat
    return (1 - share) * grey + share * colour


def rebuilt(photo: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """The photograph with every patch replaced by the mean patch of its merged token. Patches on their own stay sharp.

    Args:
        photo: (3, H, W) in [0, 1].
        weights: G (h w, P), columns sum to 1.
        grid: (h, w).

    Returns:
        (3, H', W'), whole patches of at least the photograph's size.
    """
    patches, size = _patches(photo, grid)
    back = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
    patches = back @ (weights.t() @ patches)
    return F.fold(patches.t().unsqueeze(0), size, _patch(size, grid), stride=_patch(size, grid))[0]


def sources_over(photo: Tensor, weights: Tensor, grid: tuple[int, int], coloured: int = len(COLOURS) - 1) -> Tensor:
    """Where every merged token comes from: lines around what went together, the largest groups in colours.

    Args:
        photo: (3, H, W) in [0, 1].
        weights: G (h w, P).
        grid: (h, w).
        coloured: Groups with a colour of their own, which tells parts apart that do not touch.

    Returns:
        (3, H', W'), whole patches of at least the photograph's size, and fine enough for thin lines.
    """
    _, size = _patches(photo, grid)
    finer = -(-_FINE // min(size))
    size = size[0] * finer, size[1] * finer
    picture = F.interpolate(photo.unsqueeze(0), size=size, mode="nearest-exact")[0]
    home = home_of(weights)
    counts = home.bincount(minlength=weights.shape[1])
    picture = 0.75 * picture + 0.25  # lighter, for the lines to be seen
    labels = F.interpolate(home.view(1, 1, *grid).float(), size=size, mode="nearest-exact")[0, 0].long()
    for colour, group in zip(COLOURS[:coloured], counts.argsort(descending=True, stable=True).tolist(), strict=False):
        if counts[group] < 2:
            break
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]).view(3, 1, 1)
        picture = torch.where(labels == group, 0.5 * picture + 0.5 * rgb, picture)
    edge = torch.zeros(size)
    edge[:, 1:] += labels[:, 1:] != labels[:, :-1]
    edge[1:] += labels[1:] != labels[:-1]
    width = max(1, min(size) // _FINE)
    wide = F.max_pool2d(edge.clamp_max(1)[None, None], 2 * width - 1, stride=1, padding=width - 1)[0, 0]
    return torch.where(wide > 0, torch.tensor(0.05), picture)


def _patch(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    return size[0] // grid[0], size[1] // grid[1]


def _patches(photo: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The photograph's patches (h w, 3 pixels), and the size (H', W') of them all."""
    size = tuple(-(-n // m) * m for n, m in zip(photo.shape[1:], grid, strict=True))
    if size != tuple(photo.shape[1:]):
        photo = F.interpolate(photo.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
    patch = _patch(size, grid)
    return F.unfold(photo.unsqueeze(0), patch, stride=patch)[0].t(), size  # (3 pixels) (h w) -> (h w) (3 pixels)
