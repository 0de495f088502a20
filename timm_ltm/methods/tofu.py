"""ToFu: 'Token Fusion: Bridging the Gap between Token Pruning and Token Merging', Kim et al., WACV 2024.

Written from the paper. Which tokens go, and where, is ToMe's matching. What becomes of them changes with depth: early
blocks are far from linear, and a mean of two tokens is nothing that they know. There a token that goes is
dropped, and the one it goes to stays what it is (pruned merging); later their slot is their mean, made as long as the
longest of them (MLERP). Sizes are kept up to date by both, and attention is in proportion to them, as in ToMe.

One letter per axis: B batch, N tokens, P slots, M = N - P tokens that go, D width.
"""

from __future__ import annotations

import dataclasses

import torch

from timm_ltm.methods.tome import ToMe, ToMeConfig
from timm_ltm.reduction.lines import Line
from timm_ltm.reduction.masks import LengthMask, Mask
from timm_ltm.reduction.reducer import register_method
from timm_ltm.reduction.settings import check_whole

__all__ = ["ToFu", "ToFuConfig"]


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
        return LengthMask(mask, longest=True)
