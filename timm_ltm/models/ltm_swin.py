"""Swin Transformer with Learnable Token Merging (LTM), a map merged by rows and by columns.

'Efficient Visual Transformer by Learnable Token Merging', Wang & Yang, TPAMI 2025, on timm's Swin Transformer.
"""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    checkpoint_filter_fn,
    window_partition,
    window_reverse,
)
from torch import Tensor

from timm_ltm.merging import MergeState, TokenMerger, initial_state, slots_of
from timm_ltm.merging.update import at_least_float32
from timm_ltm.models._common import fit_classes, mean_keys, plain_forward, resized, run_block, to_map
from timm_ltm.models._maps import LTMMapModel, LTMStage, adopt, map_settings, real_reduction

__all__ = ["LTMSwinBlock", "LTMSwinTransformer", "LTMWindowAttention"]


torch.fx.wrap("initial_state")  # they make tensors from shapes
torch.fx.wrap("to_map")


def fit_window(length: int, window: int) -> int:
    """The window for lines of ``length`` tokens: the one near ``window`` that pads them least, of several the nearest.

    Merging from 14 to 12 saves nothing where windows of 7 pad 12 to 14 again; windows of 6 do not.
    """
    if length <= window:
        return length
    best, least = window, length
    for w in range(window - window // 4, window + 2):
        padding = -length % w
        if padding < least or (padding == least and abs(w - window) < abs(best - window)):
            best, least = w, padding
    return best


def shift_mask(
    length: tuple[int, int], padded: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], x: Tensor
) -> Tensor:
    """(windows, area, area): 0 between tokens that lay side by side before the cyclic shift, -100 between others.

    timm's mask puts the seam of a map that is padded after the shift where the padded one would have it, and so lets
    opposite edges see each other; here it lies where it is, and padding is seen by no token.
    """
    rows = _regions(length[0], padded[0], shift[0], x).unsqueeze(1)
    region = 3 * rows + _regions(length[1], padded[1], shift[1], x)  # H W
    region = window_partition(region.view(1, padded[0], padded[1], 1), window).flatten(1)  # windows area
    return (region.unsqueeze(1) != region.unsqueeze(2)).to(x.dtype) * -100.0


def _regions(n: int, padded: int, shift: int, x: Tensor) -> Tensor:
    """(padded,) of a line of n tokens: 0 what stays, 1 what is shifted around, 2 padding."""
    line = torch.arange(padded, device=x.device)
    return (line >= n - shift).to(x.dtype) + (line >= n).to(x.dtype)


@register_notrace_module
class LTMWindowAttention(WindowAttention):
    """timm's window attention, that also takes maps of any size, in windows that fit them.

    Attributes:
        fits: Windows of other sizes than timm's may be taken.
        shifts: Windows are shifted, where there are several.
    """

    fits: bool = True
    shifts: bool = False
    plain_forward = plain_forward(WindowAttention)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """timm's forward of windows x (B windows, N, D); of a map x (B, H, W, D), in windows that fit it."""
        if x.ndim == 3:
            return self.plain_forward(x, mask)
        H, W = x.shape[1], x.shape[2]
        window = self.window_size
        if self.fits:
            window = fit_window(H, window[0]), fit_window(W, window[1])
        down = window[0] // 2 if self.shifts and (window[0] < H or not self.fits) else 0
        right = window[1] // 2 if self.shifts and (window[1] < W or not self.fits) else 0
        if down + right > 0:
            x = x.roll((-down, -right), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, -W % window[1], 0, -H % window[0]))
        H_, W_ = x.shape[1], x.shape[2]
        if down + right > 0:
            mask = shift_mask((H, W), (H_, W_), window, (down, right), x)
        windows = window_partition(x, window).flatten(1, 2)  # B H W D -> (B windows) N D
        windows = self._of_windows(windows, mask, window).reshape(-1, window[0], window[1], x.shape[3])
        x = window_reverse(windows, window, H_, W_)[:, :H, :W]
        return x.roll((down, right), dims=(1, 2)) if down + right > 0 else x

    def _of_windows(self, x: Tensor, mask: Tensor | None, window: tuple[int, int]) -> Tensor:
        """timm's forward with one more argument: its table of position biases is for one size of windows."""
        if window == self.window_size:
            return self.plain_forward(x, mask)
        qkv = self.qkv(x).reshape(-1, x.shape[1], 3, self.num_heads, self.qkv.out_features // (3 * self.num_heads))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # 3 (B windows) heads N K
        q, k, v = qkv.unbind(0)
        bias = self._bias_of(window)
        if mask is not None:  # (B windows) heads N K -> B windows heads N K
            q, k, v = q.unflatten(0, (-1, len(mask))), k.unflatten(0, (-1, len(mask))), v.unflatten(0, (-1, len(mask)))
            bias = bias + mask.unsqueeze(1)
        bias = bias.to(q.dtype)
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)
        else:
            y = self.attn_drop((q * self.scale @ k.transpose(-2, -1) + bias).softmax(dim=-1)) @ v
        y = y.flatten(0, 1) if mask is not None else y
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _bias_of(self, window: tuple[int, int]) -> Tensor:
        """The relative position bias (1, heads, N, N), resized as timm's ``resize_rel_pos_bias_table_simple`` does."""
        h, w = window
        H, W = self.window_size
        table = at_least_float32(self.relative_position_bias_table).t().unflatten(1, (2 * H - 1, 2 * W - 1))
        table = F.interpolate(table.unsqueeze(0), size=(2 * h - 1, 2 * w - 1), mode="bicubic", align_corners=False)
        down, right = torch.arange(h, device=table.device), torch.arange(w, device=table.device)
        down, right = down.unsqueeze(1) - down + h - 1, right.unsqueeze(1) - right + w - 1  # h h, w w: differences
        index = (down.view(h, 1, h, 1) * (2 * w - 1) + right.view(w, 1, w)).flatten()  # h w h w -> (h w h w)
        return table.flatten(2)[:, :, index].unflatten(2, (h * w, h * w))


class LTMSwinBlock(SwinTransformerBlock):
    """timm's block, with its map merged between attention and MLP where it has a ``merger``.

    Attributes:
        behind_merger: Maps may come merged: attention is given whole maps, and fits its windows to them.
    """

    merger: TokenMerger | None
    behind_merger: bool

    def forward(self, x: Tensor, state: MergeState | None = None, observe: bool = False) -> Any:
        """timm's forward without ``state``; with it, returns the merged map and its state.

        Args:
            x: (B, H, W, D).
            state: Of its tokens.
            observe: Merge nothing, only show the features to the clusters' refresh.
        """
        if state is None:
            return super().forward(x)
        h = self.norm1(x)
        attended = self.attn(h) if self.behind_merger and not observe else self._attn(h)
        z = (x + self.drop_path1(attended)).flatten(1, 2)  # B H W D -> B (H W) D
        if self.merger is not None:
            z, state = self.merger(
                z, state, 0, mean_keys(h.flatten(1, 2), self.attn.qkv, (3, self.attn.num_heads)), None, observe
            )
        z = z + self.drop_path2(self.mlp(self.norm2(z)))
        return to_map(z, state), state

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self.attn.fits = not self.always_partition


class LTMSwinStage(LTMStage, SwinTransformerStage):
    """timm's stage, that hands a state from block to block."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return super().forward(x)
        x = self.downsample(x)
        state = initial_state(x.flatten(1, 2), 0, (x.shape[1], x.shape[2]), self.cluster_grid, stays_map=True)
        for block in self.blocks:
            x, state = run_block(block, x, state, self.grad_checkpointing, self.observes)
        return x


class LTMSwinTransformer(LTMMapModel, SwinTransformer):
    """timm's Swin Transformer with Learnable Token Merging.

    A block's map is merged by rows and by columns, and stays a map; windows behind it are fitted to its size, with
    timm's relative position biases resized. With ``strict_img_size=False`` images of any size are taken: one that is
    not a multiple of the patches is padded, merging or not, where plain timm raises.

    Args:
        *args: As timm's.
        **kwargs: As timm's, and every field of :class:`timm_ltm.merging.MergeConfig`.

    Raises:
        ValueError: A setting is out of range, or a dense mask is asked for (the paper's preset has one).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ltm_kwargs, config, kwargs = map_settings(kwargs)
        if config.mask_form == "dense":
            raise ValueError(
                "mask_form: got 'dense', expected 'anchored'. Swin's maps are long (56 x 56 tokens): a dense mask "
                "costs more than it can save, so the paper's preset is not for Swin. Leave mask_form and preset out."
            )
        super().__init__(*args, **kwargs)
        if not self.patch_embed.strict_img_size:
            self.patch_embed.dynamic_img_pad = True
        self._finish_ltm(config, ltm_kwargs, kwargs)

    def _add_mergers(self, dd: dict[str, Any]) -> None:
        config = self.merge_config
        self.block_ratios = config.ratios_for([stage.depth for stage in self.layers])
        behind = False
        for i, (stage, blocks) in enumerate(zip(self.layers, self._plan(), strict=True)):
            if not behind and all(ratio == 1 for ratio, _ in blocks):
                continue
            self.layers[i] = stage = adopt(LTMSwinStage, stage, cluster_grid=config.cluster_grid)
            first = True
            for j, (ratio, grid) in enumerate(blocks):
                stage.blocks[j] = block = adopt(LTMSwinBlock, stage.blocks[j], merger=None, behind_merger=behind)
                fits, shifts = not block.always_partition, any(block.target_shift_size)
                block.attn = adopt(LTMWindowAttention, block.attn, fits=fits, shifts=shifts)
                if ratio < 1:
                    block.merger = TokenMerger(block.dim, grid, ratio, config, self.num_classes, first=first, **dd)
                    first, behind = False, behind or slots_of(grid, ratio) != grid

    def _plan(self) -> list[list[tuple[float, tuple[int, int]]]]:
        """For each block of each stage: its ratio and the (H, W) it sees at the model's input size.

        Tells ``feature_info`` of the maps that leave the stages.
        """
        size = self.patch_embed.img_size
        grid = self.patch_embed.dynamic_feat_size(size)
        ratios, plan = iter(self.block_ratios), []
        for i, (info, stage) in enumerate(zip(self.feature_info, self.layers, strict=False)):
            grid = tuple(-(-n // 2) for n in grid) if i else tuple(grid)
            plan.append([])
            for _ in stage.blocks:
                plan[-1].append((next(ratios), grid))
                grid = slots_of(grid, plan[-1][-1][0])
            info["reduction"] = real_reduction(size, grid)
        return plan

    def set_input_size(self, img_size: Any = None, patch_size: Any = None, **kwargs: Any) -> None:
        now = self.patch_embed.img_size, self.patch_embed.patch_size
        self._check_not_tied(now, resized(now, img_size, patch_size))
        super().set_input_size(img_size=img_size, patch_size=patch_size, **kwargs)
        self._plan()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's, of merged maps: their sizes are merged ones. ``output_fmt="NHWC"`` too, as of ``features_only``."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NHWC'. Use one of these.")
        result = super().forward_intermediates(x, indices, norm, stop_early, "NCHW", intermediates_only)
        if output_fmt == "NCHW":
            return result
        maps = [y.permute(0, 2, 3, 1) for y in (result if intermediates_only else result[1])]
        return maps if intermediates_only else (result[0], maps)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (6, 6),  # of the merged map
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


# The weights are the plain model's; the merging starts from them without training.
default_cfgs = generate_default_cfgs(
    {
        f"ltm_{name}.{tag}": _cfg(hf_hub_id=f"timm/{name}.{tag}")
        for name, tag in (
            ("swin_tiny_patch4_window7_224", "ms_in1k"),
            ("swin_tiny_patch4_window7_224", "ms_in22k_ft_in1k"),
            ("swin_small_patch4_window7_224", "ms_in22k_ft_in1k"),
            ("swin_small_patch4_window7_224", "ms_in1k"),
            ("swin_base_patch4_window7_224", "ms_in22k_ft_in1k"),
            ("swin_base_patch4_window7_224", "ms_in1k"),
        )
    }
)


def _filter(state_dict: dict[str, Any], model: LTMSwinTransformer) -> dict[str, Any]:
    return fit_classes(checkpoint_filter_fn(state_dict, model), model)


def _create_ltm_swin(variant: str, pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["depths"]))))
    return build_model_with_cfg(
        LTMSwinTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter", output_fmt="NHWC"),
        **kwargs,
    )


@register_model
def ltm_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    """LTM on Swin-T, at the budget of the paper's Table 1: 3.8 GFLOPs, 30.5 M parameters."""
    ltm_defaults = dict(compression_ratio=(1.0,) * 3 + (0.73,) + (1.0,) * 8)
    model_args = dict(
        patch_size=4,
        window_size=7,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_swin("ltm_swin_tiny_patch4_window7_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    """LTM on Swin-S."""
    ltm_defaults = dict(compression_ratio=(1.0,) * 3 + (0.73,) + (1.0,) * 20)
    model_args = dict(
        patch_size=4,
        window_size=7,
        embed_dim=96,
        depths=(2, 2, 18, 2),
        num_heads=(3, 6, 12, 24),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_swin("ltm_swin_small_patch4_window7_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    """LTM on Swin-B, at the budget of the paper's Table 1: 12.0 GFLOPs, 92 M parameters."""
    ltm_defaults = dict(compression_ratio=(1.0,) * 3 + (0.73,) + (1.0,) * 20)
    model_args = dict(
        patch_size=4,
        window_size=7,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        ltm_defaults=ltm_defaults,
    )
    return _create_ltm_swin("ltm_swin_base_patch4_window7_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_swin_tiny(pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    """Short for ``ltm_swin_tiny_patch4_window7_224``."""
    return ltm_swin_tiny_patch4_window7_224(pretrained, **kwargs)


@register_model
def ltm_swin_small(pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    """Short for ``ltm_swin_small_patch4_window7_224``."""
    return ltm_swin_small_patch4_window7_224(pretrained, **kwargs)


@register_model
def ltm_swin_base(pretrained: bool = False, **kwargs: Any) -> LTMSwinTransformer:
    """Short for ``ltm_swin_base_patch4_window7_224``."""
    return ltm_swin_base_patch4_window7_224(pretrained, **kwargs)
