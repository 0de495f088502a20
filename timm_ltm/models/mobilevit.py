"""timm's MobileViT, merging patches.

One letter per axis: B batch, D width, h w pixels of a patch, H W grid of patches.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.byobnet import ByobNet
from timm.models.mobilevit import MobileVitBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from timm_ltm.cost import input_size_of
from timm_ltm.models.attention import has_keys
from timm_ltm.models.block import run_block
from timm_ltm.models.maps import MapModel, ReducedStage, map_tokens
from timm_ltm.models.vit import ReducedViTBlock
from timm_ltm.reduction import Seen
from timm_ltm.reduction.tokens import fixed

__all__ = ["ReducedMobileViT", "ReducedMobileViTBlock"]


class ReducedMobileViTBlock(ReducedStage, MobileVitBlock):
    """timm's block, whose transformer merges patches, all pixels of a patch alike, and puts them back at its end.

    Between convolutions that see whole maps patches need not stay on lines: they are a sequence.
    """

    def merged(self, x: Tensor, observe: bool) -> Tensor:
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        (h, w), size = self.patch_size, (fixed(x.shape[2]), fixed(x.shape[3]))
        grid = math.ceil(size[0] / h), math.ceil(size[1] / w)
        full = grid[0] * h, grid[1] * w
        if full != size:
            x = _resize(x, full)
        x = self._unfold(x, grid)
        tokens = map_tokens(x, grid, lines=False, parts=self.patch_area)
        for block in self.transformer:
            x, tokens = run_block(block, x, tokens, False, observe)
        x = self._fold(self.norm(tokens.put_back(x, 0, self.patch_area)), grid)
        if full != size:
            x = _resize(x, size)
        x = self.conv_proj(x)
        return x if self.conv_fusion is None else self.conv_fusion(torch.cat((shortcut, x), dim=1))

    def _unfold(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, H h, W w) -> (B h w, H W, D)."""
        (H, W), (h, w) = grid, self.patch_size
        x = x.reshape(-1, x.shape[1], H, h, W, w).permute(0, 3, 5, 2, 4, 1)  # B D H h W w -> B h w H W D
        return x.reshape(-1, H * W, x.shape[5])

    def _fold(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B h w, H W, D) -> (B, D, H h, W w)."""
        (H, W), (h, w) = grid, self.patch_size
        x = x.reshape(-1, h, w, H, W, x.shape[2]).permute(0, 5, 3, 1, 4, 2)  # B h w H W D -> B D H h W w
        return x.reshape(-1, x.shape[1], H * h, W * w)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)  # as timm's block does


class ReducedMobileViT(MapModel, ByobNet):
    """timm's MobileViT, a ByobNet with MobileViT's blocks."""

    lines = False
    weighs_sizes = True
    gives = frozenset(Seen._fields)
    any_size = True
    out_indices = (0, 1, 2, 3, 4)

    @classmethod
    def check(cls, model: nn.Module) -> None:
        kinds = {type(block).__name__ for stage in model.stages for block in stage}
        if not any(isinstance(m, MobileVitBlock) for m in model.modules()):
            reason = (
                "whose linear attention has one key for all heads, and no place to merge"
                if "MobileVitV2Block" in kinds
                else "without attention over all patches"
            )
            raise ValueError(
                f"model: got a ByobNet of {', '.join(sorted(kinds))}, {reason}, expected blocks of MobileVitBlock. Use "
                "mobilevit_xxs, _xs or _s."
            )
        if list(model.stage_ends[: len(model.stages)]) != list(range(1, len(model.stages) + 1)):
            raise ValueError(
                f"model: got a ByobNet that tells features of stages {list(model.stage_ends)}, expected those of every "
                "stage, and none of the stem. Use mobilevit_xxs, _xs or _s."
            )
        for name, module in model.named_modules():
            if not isinstance(module, MobileVitBlock):
                continue
            if type(module) is not MobileVitBlock or halves(module):
                raise ValueError(f"{name}: got {type(module).__name__}, expected timm's MobileVitBlock, not strided.")
            for i, block in enumerate(module.transformer):
                if type(block) is not Block or not has_keys(block.attn):
                    raise ValueError(
                        f"{name}.transformer.{i}: got {type(block).__name__} with {type(block.attn).__name__}, "
                        "expected timm's Block and Attention. Use another model."
                    )

    def merging_blocks(self) -> list[MobileVitBlock]:
        """The blocks with transformers, in order."""
        return [block for stage in self.stages for block in stage if isinstance(block, MobileVitBlock)]

    def depths(self) -> list[int]:
        return [len(block.transformer) for block in self.merging_blocks()]

    def default_ratios(self) -> tuple[float, ...]:
        """In the first block of each stage, in earlier ones more: R^s of the patches are left, of R = 0.5, 0.7, 0.8.

        Nearer to the plain model than merging in one stage alone, and than in every block. MobileViT-XS merges more, to
        be at the ratio that the paper has between it and timm's.
        """
        blocks = self.merging_blocks()
        strength = 4.5 if blocks[0].conv_1x1.out_channels == 96 else 2.0
        shares = (0.5, 0.7, 0.8)
        firsts = [round(shares[min(stage, 2)] ** strength, 2) for stage in range(len(blocks))]
        return tuple(
            ratio if i == 0 else 1.0 for ratio, depth in zip(firsts, self.depths(), strict=True) for i in range(depth)
        )

    def adopt(self) -> None:
        for block in self.merging_blocks():
            block.__class__ = ReducedMobileViTBlock
            for layer in block.transformer:
                layer.__class__ = ReducedViTBlock

    def plan(self, put: Callable[..., Any]) -> None:
        stem = self.feature_info[0]["reduction"] // (2 if halves(self.stages[0]) else 1)
        grid = tuple(math.ceil(n / stem) for n in input_size_of(self)[1:])
        for stage in self.stages:
            for block in stage:
                if not isinstance(block, MobileVitBlock):
                    grid = tuple(math.ceil(n / 2) for n in grid) if halves(block) else grid
                    continue
                patches = math.prod(math.ceil(n / p) for n, p in zip(grid, block.patch_size, strict=True))
                for i, layer in enumerate(block.transformer):
                    patches = put(layer, block.conv_1x1.out_channels, patches, i == 0, block.patch_area)


def halves(layer: nn.Module) -> bool:
    """Whether a layer of convolutions has stride 2."""
    return any(getattr(module, "stride", 1) in (2, (2, 2)) for module in layer.modules())
