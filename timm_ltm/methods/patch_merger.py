"""PatchMerger: 'Learning to Merge Tokens in Vision Transformers', Renggli et al., arXiv:2202.12015.

Behind a block, its N tokens X become M new ones (Section 3 of the paper),

    Y = softmax(W^T LN(X)^T) X,

the softmax over the N tokens: each row of W^T (D x M, learned) asks for one of the M. Prefix tokens (class, registers)
are kept apart. Any number of tokens becomes the same M, and attention behind does not weigh them by size.

It has to be trained, from scratch or from plain weights: by the initial W every slot is nearly the mean of all tokens.

One letter per axis: B batch, N tokens, M slots, P = min(M, N), D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from timm_ltm.reduction.masks import DenseMask
from timm_ltm.reduction.reducer import Reducer, Seen, Site, register_method
from timm_ltm.reduction.settings import Config, check_whole, is_several, num_slots, spread
from timm_ltm.reduction.tokens import Tokens, at_least_float32, fixed, no_autocast

__all__ = ["PatchMerger", "PatchMergerConfig"]

NUM_SLOTS = 8  # M of the paper's experiments
_APART = 0.06  # of a budget: slots behind the last block that fits are then a share of the tokens that is worth having


@dataclasses.dataclass(frozen=True)
class PatchMergerConfig(Config):
    """The settings of PatchMerger, beside those that all methods share.

    Args:
        num_slots: M: one number, for the block in the middle (behind block L/2 of L), or one per block, 0 for blocks
            that do not merge. In place of ``compression_ratio``, by which M is a share of the tokens that a block has
            at the model's own input size. None: 8. With ``gmacs``, the block is found too: the later, the larger the
            share.
    """

    num_slots: int | Sequence[int] | None = None
    scheduled: ClassVar[tuple[str, ...]] = (*Config.scheduled, "num_slots")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_slots is None:
            return
        several = is_several(self.num_slots)
        checked = tuple(
            check_whole("num_slots", m, 0 if several else 1) for m in (self.num_slots if several else (self.num_slots,))
        )
        self._set("num_slots", checked if several else checked[0])

    def amounts(self, depths: Sequence[int], default: Sequence[float]) -> tuple[float, ...]:
        """As for all methods; of ``num_slots``, minus the number of slots."""
        if self.compression_ratio is not None:
            return super().amounts(depths, default)
        slots = NUM_SLOTS if self.num_slots is None else self.num_slots
        if not isinstance(slots, tuple):
            return _only(max(sum(depths) // 2, 1), sum(depths), -float(slots))
        return tuple(
            -float(m) or 1.0 for m in spread(slots, depths, "num_slots", "Use 0 for blocks that do not merge.")
        )

    def patterns(self, share: float, depths: Sequence[int], lines: bool) -> Iterable[tuple[float, ...]]:
        """One block that merges, the last behind which the budget leaves some tokens; then earlier ones."""
        blocks = sum(depths)
        last = min(max(int(blocks * (share - _APART)), 1), max(blocks - 1, 1))
        return (_only(count, blocks, 0.5) for count in range(last, 0, -1))

    def setting_of(self, amounts: Sequence[float]) -> dict[str, Any]:
        if self.compression_ratio is not None or self.gmacs is not None:
            return super().setting_of(amounts)
        return {"num_slots": [0 if amount == 1 else int(-amount) for amount in amounts]}


def _only(count: int, blocks: int, amount: float) -> tuple[float, ...]:
    """An amount behind the first ``count`` of the blocks, and no other merge."""
    return tuple(amount if i == count - 1 else 1.0 for i in range(blocks))


@register_method("patch_merger")
class PatchMerger(Reducer):
    """Slots are means of all tokens, weighed by a learned query each.

    Put back, a token is the mean of the slots by its own weights in them, scaled to sum to 1; a slot's size is what it
    gets of all tokens so. Of no more tokens than slots there is nothing to merge: they stay as they are.

    Attributes:
        norm: LN.
        queries: W^T. A bias would cancel in the softmax.
    """

    Config = PatchMergerConfig
    where = "behind"
    anchored = False

    def __init__(
        self, site: Site, amount: float, config: PatchMergerConfig, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(site, amount, config, device, dtype)
        assert isinstance(site.tokens, int), "a map would not stay one"
        M = int(-amount) if amount < 0 else num_slots(site.tokens, amount)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6, device=device, dtype=dtype)  # as timm's
        self._new_queries(M, device, dtype)

    def _new_queries(self, M: int, device: Any, dtype: torch.dtype | None) -> None:
        self.queries = nn.Linear(self.site.dim, M, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: timm's for ViT's linear layers."""
        nn.init.trunc_normal_(self.queries.weight, std=0.02)
        self.norm.reset_parameters()

    def num_slots(self, num_tokens: int) -> int:
        """M, at any input size, or N if there are no more."""
        return min(self.queries.out_features, num_tokens)

    def mask(self, z: Tensor, tokens: Tokens, seen: Seen) -> DenseMask:
        N, M = fixed(z.shape[1]), self.queries.out_features
        with no_autocast(z):
            scores = at_least_float32(self.queries(self.norm(z.to(self.norm.weight.dtype))))  # B N M
            if N > M:
                weights = scores.softmax(dim=1)
            else:  # by 0: the parameters still get gradients, which DistributedDataParallel waits for
                weights = torch.eye(N, dtype=scores.dtype, device=z.device) + 0.0 * scores[:, :, :N]
            shares = weights + 1e-12  # a token that no slot asks for goes to all
            to = shares / shares.sum(dim=2, keepdim=True)
            size = (to * tokens.size.unsqueeze(2)).sum(dim=1)
        return DenseMask(weights, to, weights.argmax(dim=1), size)  # the place of the token that weighs most

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved, own = state_dict.get(f"{prefix}queries.weight"), self.queries.weight
        if saved is not None and saved.ndim == 2 and len(saved) != len(own):  # learned at another input size
            self._new_queries(len(saved), own.device, own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
