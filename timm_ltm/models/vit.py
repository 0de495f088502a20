"""timm's Vision Transformer and DeiT, merging."""

from typing import Any

import torch
import torch.fx
from timm.layers import PatchDropout
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from timm_ltm.models.attention import attend
from timm_ltm.models.block import ReducedBlock
from timm_ltm.models.sequence import SequenceModel
from timm_ltm.reduction import Seen, Tokens, initial_tokens

__all__ = ["ReducedViT", "ReducedViTBlock", "ReducedViTDistilled"]

torch.fx.wrap("initial_tokens")  # makes tensors from shapes


@torch.fx.wrap  # counts patches
def _drop_patches(
    x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool, training: bool
) -> tuple[Tensor, Tensor | None]:
    return patch_dropout_forward(x, prob, num_prefix_tokens, ordered, training)


class ReducedViTBlock(ReducedBlock, Block):
    """timm's block."""

    def attend(self, x: Tensor, tokens: Tokens, bias: Tensor | None, wanted: frozenset[str]) -> tuple[Tensor, Seen]:
        h, seen, prefix = self.norm1(x), Seen(), self.num_prefix_tokens
        if wanted:
            y, seen = attend(self.attn, h, bias, None, prefix, wanted, tokens)
        else:
            y = self.attn(h, attn_mask=bias)
        return x + self.drop_path1(self.ls1(y)), seen

    def rest(self, z: Tensor, tokens: Tokens) -> Tensor:
        return z + self.drop_path2(self.ls2(self.mlp(self.norm2(z))))


class ReducedViT(SequenceModel, VisionTransformer):
    """timm's Vision Transformer."""

    block_class, plain_block = ReducedViTBlock, Block

    @property
    def default(self) -> tuple[float, float]:
        # ViT-B at the larger budget of the paper's Table 2, 12.85 GFLOPs
        return (0.73, 0.56) if self.embed_dim == 768 else SequenceModel.default

    def embed(self, x: Tensor) -> tuple[Tensor, Tokens, list[Any]]:
        grid = self.grid_of(x)
        x, kept = self._pos_embed(self.patch_embed(x)), None
        if isinstance(self.patch_drop, PatchDropout):  # its function tells which patches are left
            drop = self.patch_drop
            x, kept = _drop_patches(x, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)
        return self.norm_pre(x), initial_tokens(x, self.num_prefix_tokens, grid, kept), [{}] * len(self.blocks)


class ReducedViTDistilled(ReducedViT, VisionTransformerDistilled):
    """timm's distilled Vision Transformer (DeiT): two prefix tokens, two heads."""
