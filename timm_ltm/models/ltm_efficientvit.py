"""EfficientViT (MIT) with Learnable Token Merging (LTM), a map merged by rows and by columns.

'Efficient Visual Transformer by Learnable Token Merging', Wang & Yang, TPAMI 2025, on timm's EfficientViT.
"""

import math
from typing import Any

import torch.fx
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.efficientvit_mit import EfficientVit, EfficientVitBlock, EfficientVitStage
from torch import Tensor

from timm_ltm.merging import MergeState, TokenMerger, initial_state, slots_of
from timm_ltm.models._common import fit_classes, mean_keys, to_map
from timm_ltm.models._maps import LTMMapModel, LTMStage, adopt, input_size_of, map_settings, real_reduction

__all__ = ["LTMEfficientVit", "LTMEfficientVitBlock"]


torch.fx.wrap("initial_state")  # they make tensors from shapes
torch.fx.wrap("to_map")


def _to_tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H W, D)."""
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)


class LTMEfficientVitBlock(EfficientVitBlock):
    """timm's block, with its map merged between attention and convolutions where it has a ``merger``.

    Attention output and shortcut are added right away, and merging is linear: their sum is merged once.
    """

    merger: TokenMerger | None

    def forward(self, x: Tensor, state: MergeState | None = None, observe: bool = False) -> Any:
        """timm's forward without ``state``; with it, returns the merged map and its state.

        Args:
            x: (B, D, H, W).
            state: Of its tokens.
            observe: Merge nothing, only show the features to the clusters' refresh.
        """
        if state is None or self.merger is None:
            x = super().forward(x)
            return x if state is None else (x, state)
        z, tokens = self.context_module(x), _to_tokens(x)
        keys = self._mean_keys(tokens) if self.merger.needs_keys else None
        merged, state = self.merger(_to_tokens(z), state, 0, keys, tokens, observe)
        return self.local_module(z if observe else to_map(merged, state).permute(0, 3, 1, 2)), state

    def _mean_keys(self, tokens: Tensor) -> Tensor:
        attn = self.context_module.main
        return mean_keys(tokens, attn.qkv.conv, (attn.qkv.conv.out_channels // (3 * attn.dim), 3))


class LTMEfficientVitStage(LTMStage, EfficientVitStage):
    """timm's stage, that hands a state from block to block."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        state = None
        for block in self.blocks:
            if not isinstance(block, LTMEfficientVitBlock):
                x = block(x)
                continue
            if state is None:
                grid = x.shape[2], x.shape[3]
                state = initial_state(_to_tokens(x), 0, grid, self.cluster_grid, stays_map=True)
            x, state = block(x, state, self.observes)
        return x


class LTMEfficientVit(LTMMapModel, EfficientVit):
    """timm's EfficientViT with Learnable Token Merging.

    Args:
        *args: As timm's.
        img_size: (H, W) the images will have: the real ``reduction`` of features is told for it, and settings that are
            tied to a size (the paper's preset) to it.
        **kwargs: As timm's, and every field of :class:`timm_ltm.merging.MergeConfig`.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, *args: Any, img_size: int | tuple[int, int] = 224, **kwargs: Any) -> None:
        ltm_kwargs, config, kwargs = map_settings(kwargs)
        super().__init__(*args, **kwargs)
        self.planned_size = to_2tuple(img_size)
        self._finish_ltm(config, ltm_kwargs, kwargs)

    def _add_mergers(self, dd: dict[str, Any]) -> None:
        size = self.planned_size
        config = self.merge_config
        depths = [sum(isinstance(block, EfficientVitBlock) for block in stage.blocks) for stage in self.stages]
        self.block_ratios = config.ratios_for([depth for depth in depths if depth])
        ratios, grid = iter(self.block_ratios), tuple(math.ceil(n / self.stem.stride) for n in size)
        for i, (stage, depth, info) in enumerate(zip(self.stages, depths, self.feature_info, strict=True)):
            grid, first = tuple(math.ceil(n / 2) for n in grid), True
            if depth:
                self.stages[i] = stage = adopt(LTMEfficientVitStage, stage, cluster_grid=config.cluster_grid)
            for j in range(len(stage.blocks) - depth, len(stage.blocks)):
                stage.blocks[j] = block = adopt(LTMEfficientVitBlock, stage.blocks[j], merger=None)
                ratio = next(ratios)
                if ratio < 1:
                    block.merger = TokenMerger(info["num_chs"], grid, ratio, config, self.num_classes, first, **dd)
                    grid, first = slots_of(grid, ratio), False
            info["reduction"] = real_reduction(size, grid)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.in_conv.conv",
        "classifier": "head.classifier.4",
        "crop_pct": 0.95,
        "license": "apache-2.0",
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        **kwargs,
    }


# pool_size is that of the merged map
_SIZES = {
    224: {"pool_size": (6, 6)},
    256: {"pool_size": (7, 7), "input_size": (3, 256, 256), "crop_pct": 1.0},
    288: {"pool_size": (8, 8), "input_size": (3, 288, 288), "crop_pct": 1.0},
}
_NAMES = [("b0", 224), *((name, size) for name in ("b1", "b2", "b3") for size in _SIZES)]
# The weights are the plain model's; the merging starts from them without training.
default_cfgs = generate_default_cfgs(
    {
        f"ltm_efficientvit_{name}.r{size}_in1k": _cfg(
            hf_hub_id=f"timm/efficientvit_{name}.r{size}_in1k", **_SIZES[size]
        )
        for name, size in _NAMES
    }
)
default_cfgs["ltm_efficientvit_b1"].cfgs["r288_in1k"].pool_size = (7, 7)  # it merges more


def _create_ltm_efficientvit(variant: str, pretrained: bool = False, **kwargs: Any) -> LTMEfficientVit:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        LTMEfficientVit,
        variant,
        pretrained,
        pretrained_filter_fn=fit_classes,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **dict({"img_size": input_size_of(variant, kwargs)}, **kwargs),
    )


@register_model
def ltm_efficientvit_b0(pretrained: bool = False, **kwargs: Any) -> LTMEfficientVit:
    """LTM on EfficientViT-B0."""
    ltm_defaults = dict(compression_ratio=(0.69, 1.0, 1.0, 1.0), cluster_dim=16)
    model_args = dict(
        widths=(8, 16, 32, 64, 128),
        depths=(1, 2, 2, 2, 2),
        head_dim=16,
        head_widths=(1024, 1280),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_efficientvit("ltm_efficientvit_b0", pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_efficientvit_b1(pretrained: bool = False, **kwargs: Any) -> LTMEfficientVit:
    """LTM on EfficientViT-B1, at the paper's ratios to the plain model at 224 and 288 pixels."""
    ltm_defaults = dict(compression_ratio=(0.604,) + (1.0,) * 6, cluster_dim=16)
    model_args = dict(
        widths=(16, 32, 64, 128, 256),
        depths=(1, 2, 3, 3, 4),
        head_dim=16,
        head_widths=(1536, 1600),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_efficientvit("ltm_efficientvit_b1", pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_efficientvit_b2(pretrained: bool = False, **kwargs: Any) -> LTMEfficientVit:
    """LTM on EfficientViT-B2."""
    ltm_defaults = dict(compression_ratio=(0.69,) + (1.0,) * 9)
    model_args = dict(
        widths=(24, 48, 96, 192, 384),
        depths=(1, 3, 4, 4, 6),
        head_dim=32,
        head_widths=(2304, 2560),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_efficientvit("ltm_efficientvit_b2", pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_efficientvit_b3(pretrained: bool = False, **kwargs: Any) -> LTMEfficientVit:
    """LTM on EfficientViT-B3."""
    ltm_defaults = dict(compression_ratio=(0.69,) + (1.0,) * 14)
    model_args = dict(
        widths=(32, 64, 128, 256, 512),
        depths=(1, 4, 6, 6, 9),
        head_dim=32,
        head_widths=(2304, 2560),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_efficientvit("ltm_efficientvit_b3", pretrained, **dict(model_args, **kwargs))
