"""ToFu: 'Token Fusion: Bridging the Gap between Token Pruning and Token Merging', Kim et al., WACV 2024.

Written from the paper. Which tokens go, and where, is ToMe's matching. What becomes of them changes with depth: early
blocks are far from linear, and a mean of two tokens is nothing that they know. There a token that goes is
dropped, and the one it goes to stays what it is (pruned merging); later their slot is their mean, made as long as the
longest of them (MLERP). Sizes are kept up to date by both, and attention is in proportion to them, as in ToMe.

One letter per axis: B batch, N tokens, P slots, M = N - P tokens that go, D width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ltm.methods.tome import ToMe, ToMeConfig
from timm_ltm.reduction.lines import Line
from timm_ltm.reduction.masks import HardMask, Mask
from timm_ltm.reduction.reducer import register_method
from timm_ltm.reduction.settings import check_whole
from timm_ltm.reduction.tokens import at_least_float32, fixed, one_hot, unflatten

__all__ = ["MLERPMask", "ToFu", "ToFuConfig"]

_CANCELLED = 1e-6  # a mean that is shorter than its tokens by this has no direction that rounding leaves


@dataclasses.dataclass(frozen=True)
class ToFuConfig(ToMeConfig):
    """The settings of ToFu, beside those of ToMe.

    Args:
        prune_blocks: How many of the model's first transformer blocks drop the tokens that go, if they merge; those
            that follow merge by MLERP. None: half of the model's blocks. 0: MLERP in all.
    """

    prune_blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_blocks is not None:
            self._set("prune_blocks", check_whole("prune_blocks", self.prune_blocks, 0))


class MLERPMask(NamedTuple):
    """The mask that ToMe would have, merging by MLERP: the direction of its mean, the largest norm of what it merged.

    Of the tokens z_i of a slot, with weights g_i that sum to 1 and m = sum_i g_i z_i,

        y = m / |m| max_i |z_i|.

    The norms are those of token vectors (of every pixel's, where pixels are merged alike). Where tokens cancel, so that
    m has no direction, y = m. Of a map, rows are merged so and then columns: each slot is as long as the longest token
    of its rectangle.

    Attributes:
        hard: What goes where, and the weights g.
    """

    hard: HardMask
    linear = False
    keeps_own = True

    @property
    def size(self) -> Tensor:
        """(B, P) how many input tokens each slot stands for."""
        return self.hard.size

    def merge(self, x: Tensor, num_prefix: int = 0, parts: int = 1) -> Tensor:
        """(B parts, num_prefix + N, D) -> (B parts, num_prefix + P, D), the prefix passed through."""
        mean = self.hard.merge(x, num_prefix, parts)
        P = fixed(mean.shape[1]) - num_prefix
        if fixed(x.shape[1]) == num_prefix + P:
            return mean
        norm, length = (torch.linalg.vector_norm(at_least_float32(t[:, num_prefix:]), dim=2) for t in (x, mean))
        norm = unflatten(norm, 0, (-1, parts))  # (B parts) N -> B parts N
        norm = norm.gather(2, self.hard.order.unsqueeze(1).expand(-1, parts, -1)).unsqueeze(3)
        others = norm[:, :, P:] * one_hot(self.hard.slot, P, norm.dtype).unsqueeze(1)  # B parts M P
        longest = torch.maximum(norm[:, :, :P, 0], others.amax(dim=2)).reshape(-1, P)  # B parts P -> (B parts) P
        directed = length > _CANCELLED * longest
        scale = torch.where(directed, longest / torch.where(directed, length, 1.0), 1.0)
        if num_prefix:
            scale = F.pad(scale, (num_prefix, 0), value=1.0)
        return mean * scale.unsqueeze(2).to(x.dtype)

    def unmerge(self, x: Tensor) -> Tensor:
        """Slots put back where their tokens came from: (B, P, D) -> (B, N, D), a lookup."""
        return self.hard.unmerge(x)

    def anchors(self) -> Tensor:
        """(B, P) token indices."""
        return self.hard.anchors()

    def dense(self) -> Tensor:
        """(B, N, P): the weights g of the mean, columns sum to 1. What merging does is not their product."""
        return self.hard.dense()

    def destinations(self) -> Tensor:
        """(B, N, P): the share of each token that goes to each slot, rows sum to 1."""
        return self.hard.destinations()


@register_method("tofu")
class ToFu(ToMe):
    """ToMe's matching, by pruned merging in the first half of the blocks and by MLERP in the second."""

    Config = ToFuConfig

    @property
    def prunes(self) -> bool:
        """Whether the tokens that go are dropped here."""
        blocks = self.config.prune_blocks
        return self.site.index < (self.site.depth // 2 if blocks is None else blocks)

    def choose(self, line: Line, num_slots: int) -> Mask:
        mask = super().choose(line, num_slots)
        if self.prunes:
            return mask._replace(own=torch.ones_like(mask.own), rest=None)
        return MLERPMask(mask)
