"""Maps made smaller whatever they show: the baseline of merging along lines, as a method ``resized``.

    python benchmarks/fidelity.py PHOTOS --model swin_tiny_patch4_window7_224 --merge tome --merge ltm --merge resized

n columns become P, each the mean over the n / P columns that it covers, parts of columns by their share; then the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_ltm.reduction import DenseMask
from timm_ltm.reduction.lines import Line, LineReducer
from timm_ltm.reduction.reducer import register_method


def shares(n: int, num_slots: int, like: Tensor) -> Tensor:
    """(n, P): the share of each of n tokens in a row that each of P equal parts of the row covers, rows sum to 1."""
    start = torch.arange(n, dtype=like.dtype, device=like.device).unsqueeze(1) * num_slots / n
    slot = torch.arange(num_slots, dtype=like.dtype, device=like.device)
    covered = (torch.minimum(start + num_slots / n, slot + 1) - torch.maximum(start, slot)).clamp_min(0.0)
    return covered / covered.sum(dim=1, keepdim=True)


class Resized(LineReducer):
    """Means of equal parts of each side of a map."""

    def choose(self, line: Line, num_slots: int) -> DenseMask:
        if not line.straight:
            raise ValueError(
                "method: got 'resized' for tokens that are no lines of a map, expected Swin or EfficientViT."
            )
        to = shares(line.size.shape[1], num_slots, line.size).expand(len(line.size), -1, -1)  # B n P
        size = (line.size.unsqueeze(1) @ to).squeeze(1)
        weights = line.size.unsqueeze(2) * to / size.unsqueeze(1)
        return DenseMask(weights, to, to.argmax(dim=1), size)


def register() -> None:
    """Make it a method, by name."""
    register_method("resized")(Resized)
