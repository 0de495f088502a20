"""timm's EVA, merging: also DINOv3, RoPE-ViT and PE, whose rotary positions are looked up where the anchors lie."""

from typing import Any

import torch.fx
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from timm_ltm.models.attention import attend
from timm_ltm.models.block import ScaledBlock
from timm_ltm.models.sequence import SequenceModel
from timm_ltm.reduction import Seen, Tokens, initial_tokens

__all__ = ["ReducedEva", "ReducedEvaBlock"]

torch.fx.wrap("initial_tokens")  # makes tensors from shapes


class ReducedEvaBlock(ScaledBlock, EvaBlock):
    """timm's block."""

    def attend(
        self, x: Tensor, tokens: Tokens, bias: Tensor | None, wanted: frozenset[str], rope: Tensor | None = None
    ) -> tuple[Tensor, Seen]:
        h, seen, prefix = self.norm1(x), Seen(), self.num_prefix_tokens
        if rope is not None and self.behind:
            rope = _rope_at(rope, tokens.anchor)
        if wanted:
            y, seen = attend(self.attn, h, bias, rope, prefix, wanted, tokens)
        else:
            y = self.attn(h, rope=rope, attn_mask=bias)
        y = y if self.gamma_1 is None else self.gamma_1 * y
        return x + self.drop_path1(y), seen


def _rope_at(rope: Tensor, anchor: Tensor) -> Tensor:
    """Rotary positions of anchors (B, P): (N, d) -> (B, 1, P, d); of mixed frequencies (h, N, d) -> (B, h, P, d).

    They are looked up, never averaged: an average of rotations is not a rotation.
    """
    if rope.ndim == 2:
        return rope[anchor].unsqueeze(1)
    return rope[:, anchor].transpose(0, 1)


class ReducedEva(SequenceModel, Eva):
    """timm's EVA."""

    block_class, plain_block = ReducedEvaBlock, EvaBlock
    rotates = True

    @classmethod
    def check(cls, model: nn.Module) -> None:
        super().check(model)
        if model.patch_drop is not None:
            raise ValueError(
                f"patch_drop_rate: got {model.patch_drop.prob}, expected 0: timm's EVA does not tell which patches are "
                "left, and where merged tokens lie. Leave it out."
            )

    def embed(self, x: Tensor) -> tuple[Tensor, Tokens, list[Any]]:
        grid = self.grid_of(x)
        x, rope = self._pos_embed(self.patch_embed(x))
        tokens = initial_tokens(x, self.num_prefix_tokens, grid)
        ropes = rope if self.rope_mixed and rope is not None else [rope] * len(self.blocks)
        return self.norm_pre(x), tokens, [{"rope": ropes[i]} for i in range(len(self.blocks))]
