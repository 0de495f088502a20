"""timm's EfficientViT (MIT), merging its map between attention and convolutions of a block.

One letter per axis: B batch, s scales, h heads, N tokens, K width of a head, D width, H W grid.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.efficientvit_mit import (
    EfficientVit,
    EfficientVitBlock,
    EfficientVitLarge,
    EfficientVitLargeStage,
    EfficientVitStage,
    LiteMLA,
)
from torch import Tensor, nn

from timm_ltm.cost import input_size_of
from timm_ltm.models.block import ReducedBlock
from timm_ltm.models.maps import MapModel, ReducedStage, map_tokens, put_back_map, to_map
from timm_ltm.reduction import Seen, Tokens
from timm_ltm.reduction.tokens import fixed, no_autocast, unflatten

__all__ = [
    "ReducedEfficientViT",
    "ReducedEfficientViTBlock",
    "ReducedEfficientViTLarge",
    "ReducedEfficientViTLargeStage",
    "ReducedEfficientViTStage",
]


class ReducedEfficientViTBlock(ReducedBlock, EfficientVitBlock):
    """timm's block; with tokens, its map is (B, N, D).

    Attention output and shortcut are added right away: merging is linear, and their sum is merged once.
    """

    first_of_rest = "local_module"

    def attend(self, x: Tensor, tokens: Tokens, bias: Tensor | None, wanted: frozenset[str]) -> tuple[Tensor, Seen]:
        x = to_map(x, tokens).permute(0, 3, 1, 2)
        if not wanted:
            return _to_tokens(self.context_module(x)), Seen()
        y, keys = _attend(self.context_module.main, self.context_module.pre_norm(x))
        if self.context_module.shortcut is not None:
            y = y + self.context_module.shortcut(x)
        return _to_tokens(y), Seen(keys)

    def rest(self, z: Tensor, tokens: Tokens) -> Tensor:
        return _to_tokens(self.local_module(to_map(z, tokens).permute(0, 3, 1, 2)))


def _to_tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H W, D)."""
    D, H, W = (fixed(n) for n in x.shape[1:])
    return x.reshape(-1, D, H * W).transpose(1, 2)


def _attend(attn: LiteMLA, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's linear attention of x (B, D, H, W), and the mean over heads of its keys (B, N, K), without gradient.

    timm's module does not tell its keys, and projecting twice costs. They are those of single tokens, not of the
    neighbourhoods that its other scales see.
    """
    H, W = fixed(x.shape[2]), fixed(x.shape[3])
    qkv = attn.qkv(x)
    keys = unflatten(qkv.detach(), 1, (-1, 3, attn.dim))[:, :, 1].mean(dim=1)  # B (h 3 K) H W -> B K H W
    scales = torch.cat([qkv, *[scale(qkv) for scale in attn.aggreg]], dim=1)
    heads = fixed(scales.shape[1]) // (3 * attn.dim)
    scales = scales.reshape(-1, heads, 3 * attn.dim, H * W).transpose(2, 3)  # B (s h 3 K) H W -> B (s h) N (3 K)
    q, k, v = scales.chunk(3, dim=-1)
    q, k, v = attn.kernel_func(q), attn.kernel_func(k), F.pad(v, (0, 1), value=1.0)
    with no_autocast(v):
        y = attn._attn(q, k, v)
    y = y.transpose(2, 3).reshape(-1, heads * attn.dim, H, W)  # B (s h) N K -> B (s h K) H W
    return attn.proj(y), _to_tokens(keys)


class _Stage(ReducedStage):
    """Both kinds of stages: a strided layer, then blocks that merge."""

    blocks: nn.Sequential

    def merged(self, x: Tensor, observe: bool) -> Tensor:
        tokens = None
        for block in self.blocks:
            if not isinstance(block, ReducedEfficientViTBlock):
                x = block(x)
                continue
            if tokens is None:
                grid = fixed(x.shape[2]), fixed(x.shape[3])
                x = _to_tokens(x)
                tokens = map_tokens(x, grid)
            x, tokens = block(x, tokens=tokens, observe=observe)
        assert tokens is not None, "a stage is adopted for its blocks"
        return put_back_map(x, tokens).permute(0, 3, 1, 2)


class ReducedEfficientViTStage(_Stage, EfficientVitStage):
    """timm's stage."""


class ReducedEfficientViTLargeStage(_Stage, EfficientVitLargeStage):
    """timm's stage."""


class _Model(MapModel):
    """Both kinds of models."""

    any_size = True
    out_indices = (0, 1, 2, 3)
    stage_class: type[_Stage]

    @classmethod
    def check(cls, model: nn.Module) -> None:
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, EfficientVitBlock)]
        if not found:
            raise ValueError("model: got stages without an EfficientVitBlock, expected one. Do not prune it before.")
        for name, block in found:
            if type(block) is not EfficientVitBlock or type(block.context_module.main) is not LiteMLA:
                raise ValueError(
                    f"{name}: got {type(block).__name__} with {type(block.context_module.main).__name__}, expected "
                    "timm's EfficientVitBlock and LiteMLA. Use another model."
                )

    def depths(self) -> list[int]:
        depths = (sum(isinstance(block, EfficientVitBlock) for block in stage.blocks) for stage in self.stages)
        return [depth for depth in depths if depth]

    def default_ratios(self) -> tuple[float, ...]:
        """In the first block of each stage. EfficientViT-B1 at the ratio that the paper has between it and timm's."""
        firsts = (0.51, 0.604) if self.num_features == 256 else (0.69, 0.69)
        depths = self.depths()
        return tuple(firsts[min(s, 1)] if i == 0 else 1.0 for s, depth in enumerate(depths) for i in range(depth))

    def adopt(self) -> None:
        for stage in self.stages:
            blocks = [block for block in stage.blocks if isinstance(block, EfficientVitBlock)]
            if blocks:
                stage.__class__ = self.stage_class
            for block in blocks:
                block.__class__ = ReducedEfficientViTBlock

    def plan(self, put: Callable[..., Any]) -> None:
        grid = tuple(math.ceil(n / self.stem.stride) for n in input_size_of(self)[1:])
        for stage, info in zip(self.stages, self.feature_info, strict=False):
            grid = left = tuple(math.ceil(n / 2) for n in grid)
            blocks = [block for block in stage.blocks if isinstance(block, EfficientVitBlock)]
            for i, block in enumerate(blocks):
                left = put(block, info["num_chs"], left, i == 0)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        if "in_features" in inspect.signature(self.head.reset).parameters:
            return super().prune_intermediate_layers(indices, *args, **kwargs)
        # before 1.0.31 timm asks its head to stop pooling, which it refuses
        taken = super().prune_intermediate_layers(indices, prune_head=False)
        self.reset_classifier(0)
        return taken


class ReducedEfficientViT(_Model, EfficientVit):
    """timm's EfficientViT."""

    stage_class = ReducedEfficientViTStage


class ReducedEfficientViTLarge(_Model, EfficientVitLarge):
    """timm's large EfficientViT."""

    stage_class = ReducedEfficientViTLargeStage
