"""ToMe: 'Token Merging: Your ViT But Faster', Bolya et al., ICLR 2023, written from the paper.

Of tokens in alternation, those of the one half that resemble one of the other half most are averaged into it, weighted
by size (Section 3.2); attention behind is in proportion to sizes (Eq. 1 there). Prefix tokens are kept. Along the lines
of a map it merges the same number per row and per column, so that the map stays one, as CubistMerge does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from timm_ltm.reduction.lines import Line, LineReducer
from timm_ltm.reduction.masks import HardMask, hard_mask
from timm_ltm.reduction.matching import bipartite_order
from timm_ltm.reduction.reducer import register_method
from timm_ltm.reduction.settings import Config, check_whole, is_several, num_slots, spread

__all__ = ["ToMe", "ToMeConfig"]


@dataclasses.dataclass(frozen=True)
class ToMeConfig(Config):
    """The settings of ToMe, beside those that all methods share.

    Args:
        r: Tokens that every block merges away, one number or one per block, in place of ``compression_ratio``; for
            sequences of tokens. At most half of a block's tokens go, whatever it says.
    """

    r: int | Sequence[int] | None = None
    scheduled: ClassVar[tuple[str, ...]] = (*Config.scheduled, "r")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None:
            return
        several = is_several(self.r)
        checked = tuple(check_whole("r", r, 0) for r in (self.r if several else (self.r,)))
        self._set("r", checked if several else checked[0])

    def amounts(self, depths: Sequence[int], default: Sequence[float]) -> tuple[float, ...]:
        """As for all methods; of ``r``, minus the number of tokens that go."""
        if self.r is None:
            return super().amounts(depths, default)
        return tuple(-r or 1.0 for r in spread(self.r, depths, "r", "Use 0 for blocks that must not merge."))

    def setting_of(self, amounts: Sequence[float]) -> dict[str, Any]:
        if self.r is None:
            return super().setting_of(amounts)
        return {"r": [0 if amount == 1 else int(-amount) for amount in amounts]}


@register_method("tome")
class ToMe(LineReducer):
    """Bipartite soft matching on the mean attention keys."""

    Config = ToMeConfig

    @classmethod
    def weighs(cls, config: Config) -> bool:
        return True

    def num_slots(self, num_tokens: int) -> int:
        """At least half of the tokens stay."""
        if self.amount < 0:
            return num_tokens - min(-int(self.amount), num_tokens // 2)
        return num_slots(num_tokens, max(self.amount, 0.5))

    def side_slots(self, num_tokens: int) -> int:
        if self.amount < 0:
            raise ValueError(
                f"r: got {-int(self.amount)} for a model whose tokens are a map, expected a share of it. Use "
                "compression_ratio."
            )
        return num_slots(num_tokens, max(self.amount**0.5, 0.5))

    def choose(self, line: Line, num_slots: int) -> HardMask:
        order, slot = bipartite_order(line.unit, num_slots)  # keys have no gradient
        return hard_mask(order, slot, line.size, num_slots)
