"""A reference of ToMe on timm's Vision Transformer, the yardstick of the other benchmarks.

'Token Merging: Your ViT But Faster', Bolya et al., ICLR 2023, written from the paper. The tokens and their order are
those of the authors' code; gathers and sums run on flat rows, several times faster than per channel on a CPU.

One letter per axis: B batch, H heads, N tokens, P = N - r tokens left, K = ceil(N / 2) - r even ones of them, D width.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

__all__ = ["ToMeAttention", "ToMeBlock", "ToMeBlocks", "match", "merge", "tome_vit"]


@torch.no_grad()
def match(keys: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: the r even tokens most similar to an odd one, and that one. Token 0 never goes.

    Args:
        keys: (B, N, head width) attention keys, averaged over heads.
        r: At most (N - 1) // 2 go.

    Returns:
        Indices (B, K) of the even tokens that stay, in token order; (B, r) of those that go; (B, r) of where they go.
        The first two count even tokens, the last odd ones.
    """
    r = min(r, (keys.shape[1] - 1) // 2)
    unit = F.normalize(keys, dim=2)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # B N/2 N/2
    similarity[:, 0] = -math.inf  # the class token
    best, partner = similarity.max(dim=2)
    ranked = best.argsort(dim=1, descending=True)
    gone, kept = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    return kept, gone, partner.gather(1, gone)


def merge(x: Tensor, size: Tensor, kept: Tensor, gone: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Averages weighted by size, for the indices of :func:`match`.

    Args:
        x: (B, N, D).
        size: (B, N) how many input tokens each token stands for.

    Returns:
        The even tokens that stay, then all odd ones (B, P, D), and their sizes (B, P).
    """
    B, N, D = x.shape
    slot = target + kept.shape[1]  # B r -> index among the P left
    old_size = torch.cat((size.gather(1, 2 * kept), size[:, 1::2]), dim=1)
    gone_size = size.gather(1, 2 * gone)
    new_size = old_size.scatter_reduce(1, slot, gone_size, reduce="sum")

    image = torch.arange(B, device=x.device).unsqueeze(1)
    rows = x.reshape(B * N, D)
    left = torch.cat((F.embedding(2 * kept + image * N, rows), x[:, 1::2]), dim=1)
    left = left * (old_size / new_size).unsqueeze(2).to(x.dtype)
    going = F.embedding(2 * gone + image * N, rows) * (gone_size / new_size.gather(1, slot)).unsqueeze(2).to(x.dtype)
    P = left.shape[1]
    index = (slot + image * P).reshape(-1, 1).expand(-1, D)
    merged = left.view(B * P, D).scatter_reduce(0, index, going.view(-1, D), reduce="sum")
    return merged.view(B, P, D), new_size


class ToMeAttention(Attention):
    """timm's attention, weighted by the tokens' sizes, that also returns its keys."""

    def forward(self, x: Tensor, log_size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention output (B, N, D) and keys (B, H, N, D / H).

        Args:
            x: (B, N, D).
            log_size: (B, N), added to the logits: a token of size s attracts attention like s equal tokens.
        """
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        # one row for all heads and queries: the fused kernel broadcasts it
        mask = log_size.to(q.dtype).view(B, 1, 1, N) if log_size is not None else None
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(x)), k


class ToMeBlock(Block):
    """timm's block with r tokens merged away between attention and MLP."""

    r: int = 0
    prop_attn: bool = True

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) and sizes (B, N), ``None`` before the first merge -> (B, P, D) and (B, P)."""
        log_size = size.log() if self.prop_attn and size is not None else None
        y, keys = self.attn(self.norm1(x), log_size)
        x = x + self.drop_path1(self.ls1(y))
        if self.r:
            if size is None:
                size = torch.ones(x.shape[:2], device=x.device)
            x, size = merge(x, size, *match(keys.mean(dim=1), self.r))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), size


class ToMeBlocks(nn.Sequential):
    """Hands the sizes from block to block."""

    def forward(self, x: Tensor) -> Tensor:
        size = None
        for block in self:
            x, size = block(x, size)
        return x


def tome_vit(name: str, r: int, prop_attn: bool = True, **kwargs: Any) -> VisionTransformer:
    """The model of a timm ViT entrypoint with ToMe. Its ``forward`` and state-dict names are timm's.

    Args:
        name: Of a model with a class token and no registers.
        r: Tokens that every block merges away.
        prop_attn: Weight attention by the tokens' sizes, for weights trained without ToMe.
        **kwargs: To ``timm.create_model``.

    Raises:
        ValueError: The entrypoint is not such a model.
    """
    model = timm.create_model(name, block_fn=ToMeBlock, attn_layer=ToMeAttention, **kwargs)
    if not isinstance(model, VisionTransformer) or not model.has_class_token or model.num_prefix_tokens != 1:
        raise ValueError(f"name: got {name!r}, expected a timm ViT with a class token and no registers.")
    model.blocks = ToMeBlocks(*model.blocks)
    for block in model.blocks:
        block.r, block.prop_attn = r, prop_attn
    return model
