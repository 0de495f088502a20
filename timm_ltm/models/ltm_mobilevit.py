"""MobileViT with Learnable Token Merging (LTM), a map of patches merged by rows and by columns.

'Efficient Visual Transformer by Learnable Token Merging', Wang & Yang, TPAMI 2025, on timm's MobileViT.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.byobnet import ByobNet
from timm.models.mobilevit import MobileVitBlock, model_cfgs
from torch import Tensor, nn

from timm_ltm.merging import TokenMerger, initial_state, merge, slots_of
from timm_ltm.merging.merge import Mask
from timm_ltm.models._common import fit_classes, plain_forward, run_block
from timm_ltm.models._maps import LTMMapModel, LTMStage, adopt, input_size_of, map_settings, real_reduction
from timm_ltm.models.ltm_vit import LTMAttention, LTMBlock, ScriptedAttention, ScriptedBlock

__all__ = ["LTMMobileVit", "LTMMobileVitBlock"]


@register_notrace_module
class LTMMobileVitBlock(LTMStage, MobileVitBlock):
    """timm's block, whose transformer merges patches: the map it returns has fewer of them, and is smaller.

    All pixels of a patch are merged alike, and so is the shortcut that is concatenated at the end.
    """

    plain_forward = plain_forward(MobileVitBlock)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.plain_forward(x)
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        height, width = x.shape[2], x.shape[3]
        h, w = self.patch_size
        H, W = math.ceil(height / h), math.ceil(width / w)
        grid, divisible = (H, W), (H * h, W * w) == (height, width)
        if not divisible:
            x = _resize(x, (H * h, W * w))
        x = self._unfold(x, grid)
        state = initial_state(x, 0, grid, self.cluster_grid, stays_map=True, parts=self.patch_area)
        masks: list[Mask] = []
        for block in self.transformer:
            if torch.jit.is_scripting():
                x, state = block.merged(x, state)
            else:
                x, state = run_block(block, x, state, observe=self.observes)
            mask = state.mask
            if block.merger is not None and mask is not None:
                masks.append(mask)
        after = state.grid
        assert after is not None
        x = self._fold(self.norm(x), after)
        if after != grid:
            shortcut = self._unfold(shortcut if divisible else _resize(shortcut, (H * h, W * w)), grid)
            for mask in masks:
                shortcut = merge(shortcut, mask, parts=self.patch_area)
            shortcut = self._fold(shortcut, after)
        elif not divisible:
            x = _resize(x, (height, width))
        x = self.conv_proj(x)
        return x if self.conv_fusion is None else self.conv_fusion(torch.cat((shortcut, x), dim=1))

    def __prepare_scriptable__(self) -> nn.Module:
        """With blocks and attention as TorchScript reads them."""
        blocks = [adopt(ScriptedBlock, block, attn=adopt(ScriptedAttention, block.attn)) for block in self.transformer]
        return adopt(type(self), self, transformer=nn.Sequential(*blocks), collecting=False)

    def _unfold(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, H h, W w) -> (B h w, H W, D)."""
        H, W = grid
        h, w = self.patch_size
        x = x.reshape(-1, x.shape[1], H, h, W, w).permute(0, 3, 5, 2, 4, 1)  # B D H h W w -> B h w H W D
        return x.reshape(-1, H * W, x.shape[5])

    def _fold(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B h w, H W, D) -> (B, D, H h, W w)."""
        H, W = grid
        h, w = self.patch_size
        x = x.reshape(-1, h, w, H, W, x.shape[2]).permute(0, 5, 3, 1, 4, 2)  # B h w H W D -> B D H h W w
        return x.reshape(-1, x.shape[1], H * h, W * w)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class LTMMobileVit(LTMMapModel, ByobNet):
    """timm's MobileViT with Learnable Token Merging.

    Args:
        *args: As timm's.
        img_size: (H, W) the images will have: the real ``reduction`` of features is told for it, and settings that are
            tied to a size (the paper's preset) to it.
        **kwargs: As timm's, and every field of :class:`timm_ltm.merging.MergeConfig`.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, *args: Any, img_size: int | tuple[int, int] = 256, **kwargs: Any) -> None:
        ltm_kwargs, config, kwargs = map_settings(kwargs)
        super().__init__(*args, img_size=img_size, **kwargs)
        self.planned_size = to_2tuple(img_size)
        self._finish_ltm(config, ltm_kwargs, kwargs)

    def _add_mergers(self, dd: dict[str, Any]) -> None:
        size = self.planned_size
        config, infos = self.merge_config, self.feature_info
        blocks = [m for stage in self.stages for m in stage if isinstance(m, MobileVitBlock)]
        self.block_ratios = config.ratios_for([len(block.transformer) for block in blocks])
        ratios, before, grid, reductions = iter(self.block_ratios), 1, size, []
        for i, stage in enumerate(self.stages):
            plain = next(info["reduction"] for info in infos if info["stage"] > i)
            grid = tuple(math.ceil(n * before / plain) for n in grid)
            before = plain
            for j, block in enumerate(stage):
                if isinstance(block, MobileVitBlock):
                    stage[j] = adopt(LTMMobileVitBlock, block, cluster_grid=config.cluster_grid)
                    grid = self._merge_in(stage[j], grid, [next(ratios) for _ in block.transformer], dd)
            reductions.append(real_reduction(size, grid))
        for info in infos:
            if info["stage"]:
                info["reduction"] = reductions[info["stage"] - 1]

    def _merge_in(
        self, block: LTMMobileVitBlock, grid: tuple[int, int], ratios: list[float], dd: dict[str, Any]
    ) -> tuple[int, int]:
        """Give one block its mergers. Returns the size of the map it makes of one of size ``grid``."""
        patches = start = tuple(math.ceil(n / p) for n, p in zip(grid, block.patch_size, strict=True))
        first = True
        for i, ratio in enumerate(ratios):
            weighs = self.merge_config.proportional_attention and not first
            layer = adopt(
                LTMBlock, block.transformer[i], merger=None, num_prefix_tokens=0, parts=block.patch_area, weighs=weighs
            )
            layer.attn = adopt(LTMAttention, layer.attn)
            block.transformer[i] = layer
            if ratio < 1:
                layer.merger = TokenMerger(
                    block.conv_1x1.out_channels, patches, ratio, self.merge_config, self.num_classes, first,
                    block.patch_area, **dd,
                )  # fmt: skip
                patches, first = slots_of(patches, ratio), False
        if patches == start:
            return grid
        return patches[0] * block.patch_size[0], patches[1] * block.patch_size[1]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "fixed_input_size": False,
        "license": "cvnets-license",
        **kwargs,
    }


# The weights are the plain model's; the merging starts from them without training.
default_cfgs = generate_default_cfgs(
    {
        f"ltm_{name}.cvnets_in1k": _cfg(hf_hub_id=f"timm/{name}.cvnets_in1k", pool_size=pool_size)  # of the merged map
        for name, pool_size in (("mobilevit_xxs", (6, 6)), ("mobilevit_xs", (4, 4)), ("mobilevit_s", (6, 6)))
    }
)


def _create_ltm_mobilevit(variant: str, pretrained: bool = False, **kwargs: Any) -> LTMMobileVit:
    return build_model_with_cfg(
        LTMMobileVit,
        variant,
        pretrained,
        model_cfg=model_cfgs[variant.removeprefix("ltm_")],
        pretrained_filter_fn=fit_classes,
        feature_cfg=dict(feature_cls="getter"),
        **dict({"img_size": input_size_of(variant, kwargs)}, **kwargs),
    )


@register_model
def ltm_mobilevit_xxs(pretrained: bool = False, **kwargs: Any) -> LTMMobileVit:
    """LTM on MobileViT-XXS. The second transformer block merges by default, from 16 x 16 to 12 x 12 patches.

    That is far better without training than merging in the first block, whose keys tell less; and 12 divides evenly
    in the stages that follow.
    """
    ltm_defaults = dict(compression_ratio=(1.0, 0.5625) + (1.0,) * 7, cluster_dim=16)
    return _create_ltm_mobilevit("ltm_mobilevit_xxs", pretrained, **dict(ltm_defaults=ltm_defaults, **kwargs))


@register_model
def ltm_mobilevit_xs(pretrained: bool = False, **kwargs: Any) -> LTMMobileVit:
    """LTM on MobileViT-XS, at the paper's ratio to the plain model. The second and third blocks merge by default."""
    ltm_defaults = dict(compression_ratio=(1.0, 0.39, 0.64) + (1.0,) * 6, cluster_dim=16)
    return _create_ltm_mobilevit("ltm_mobilevit_xs", pretrained, **dict(ltm_defaults=ltm_defaults, **kwargs))


@register_model
def ltm_mobilevit_s(pretrained: bool = False, **kwargs: Any) -> LTMMobileVit:
    """LTM on MobileViT-S, below the paper's ratio to the plain model. The second block merges by default."""
    ltm_defaults = dict(compression_ratio=(1.0, 0.5625) + (1.0,) * 7)
    return _create_ltm_mobilevit("ltm_mobilevit_s", pretrained, **dict(ltm_defaults=ltm_defaults, **kwargs))
