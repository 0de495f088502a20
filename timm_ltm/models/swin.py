"""timm's Swin Transformer, merging: a map is merged by rows and by columns, and windows behind fit what is left.

One letter per axis: B batch, w windows of an image, N tokens of a window, h heads, K their width, D width, H W grid.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from timm_ltm.models.block import ReducedBlock, run_block
from timm_ltm.models.maps import MapModel, ReducedStage, map_tokens, put_back_map, to_map
from timm_ltm.reduction import Seen, Tokens
from timm_ltm.reduction.tokens import at_least_float32, fixed

__all__ = ["ReducedSwin", "ReducedSwinBlock", "ReducedSwinStage", "fit_window"]


def _sides(x: Tensor) -> tuple[int, int]:
    """H and W of maps (B, H, W, D), as constants of compiled graphs and of traces."""
    return operator.index(x.shape[1]), operator.index(x.shape[2])


def fit_window(length: int, window: int) -> int:
    """The window for lines of ``length`` tokens: the one near ``window`` that pads them least, of several the nearest.

    Merging from 14 to 12 saves nothing where windows of 7 pad 12 to 14 again; windows of 6 do not.
    """
    if length <= window:
        return length
    return min(range(window - window // 4, window + 2), key=lambda w: (-length % w, abs(w - window)))


def shift_mask(
    grid: tuple[int, int], padded: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], x: Tensor
) -> Tensor:
    """(w, N, N): 0 between tokens that lay side by side before the cyclic shift, -100 between others.

    timm's mask puts the seam of a map that is padded after the shift where the padded one would have it, and so lets
    opposite edges see each other; here it lies where it is, and padding is seen by no token.
    """
    rows = _regions(grid[0], padded[0], shift[0], x).unsqueeze(1)
    region = 3 * rows + _regions(grid[1], padded[1], shift[1], x)  # H W
    region = window_partition(region.view(1, padded[0], padded[1], 1), window).flatten(1)  # 1 H W 1 -> w N
    return (region.unsqueeze(1) != region.unsqueeze(2)).to(x.dtype) * -100.0


def _regions(n: int, padded: int, shift: int, x: Tensor) -> Tensor:
    """(padded,) of a line of n tokens: 0 what stays, 1 what is shifted around, 2 padding."""
    line = torch.arange(padded, device=x.device)
    return (line >= n - shift).to(x.dtype) + (line >= n).to(x.dtype)


def _position_bias(attn: WindowAttention, window: tuple[int, int]) -> Tensor:
    """The relative position bias (1, h, N, N), resized as timm's ``resize_rel_pos_bias_table_simple`` does."""
    if window == tuple(attn.window_size):
        return attn._get_rel_pos_bias()
    (h, w), (H, W) = window, attn.window_size
    table = at_least_float32(attn.relative_position_bias_table).t().unflatten(1, (2 * H - 1, 2 * W - 1))
    table = F.interpolate(table.unsqueeze(0), size=(2 * h - 1, 2 * w - 1), mode="bicubic", align_corners=False)
    down, right = torch.arange(h, device=table.device), torch.arange(w, device=table.device)
    down, right = down.unsqueeze(1) - down + h - 1, right.unsqueeze(1) - right + w - 1  # h h, w w: differences
    index = (down.view(h, 1, h, 1) * (2 * w - 1) + right.view(w, 1, w)).flatten()  # h w h w -> (h w h w)
    return table.flatten(2)[:, :, index].unflatten(2, (h * w, h * w))


def _attend(attn: WindowAttention, x: Tensor, window: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """timm's attention in windows x (B w, N, D) of any size, and the mean over heads of its keys (B w, N, K)."""
    qkv, N = attn.qkv(x), fixed(x.shape[1])
    width = fixed(qkv.shape[2]) // (3 * attn.num_heads)
    q, k, v = qkv.reshape(-1, N, 3, attn.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)  # each (B w) h N K
    bias = _position_bias(attn, window)
    if mask is not None:
        bias = bias + mask.unsqueeze(1)  # w h N N
    bias, windows = bias.to(q.dtype), fixed(bias.shape[0])
    if attn.fused_attn:
        bias = bias.repeat(x.shape[0] // windows, 1, 1, 1) if windows > 1 else bias
        drop = attn.attn_drop.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=attn.scale)
    else:
        logits = (q * attn.scale @ k.transpose(2, 3)).reshape(-1, windows, attn.num_heads, N, N) + bias  # B w h N N
        y = attn.attn_drop(attn.softmax(logits.reshape(-1, attn.num_heads, N, N))) @ v
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))  # (B w) h N K -> (B w) N (h K)
    return y, k.detach().mean(dim=1)


class ReducedSwinBlock(ReducedBlock, SwinTransformerBlock):
    """timm's block: its map (B, H, W, D) is merged between attention and MLP."""

    def reduced(self, x: Tensor, tokens: Tokens, observe: bool, **kwargs: Any) -> tuple[Tensor, Tokens]:
        fitted = self.behind and not observe
        if self.reducer is None and not fitted:
            return SwinTransformerBlock.forward(self, x), tokens
        z, tokens = super().reduced(x, tokens, observe, fitted=fitted)
        return to_map(z, tokens), tokens

    def attend(
        self, x: Tensor, tokens: Tokens, bias: Tensor | None, wanted: frozenset[str], fitted: bool = False
    ) -> tuple[Tensor, Seen]:
        h, seen = self.norm1(x), Seen()
        if wanted or fitted:
            y, keys = self.attend_map(h, fitted)
            seen = Seen(keys.flatten(1, 2))  # B H W K -> B (H W) K
        else:
            y = self._attn(h)
        return (x + self.drop_path1(y)).flatten(1, 2), seen  # B H W D -> B (H W) D

    def rest(self, z: Tensor, tokens: Tokens) -> Tensor:
        return z + self.drop_path2(self.mlp(self.norm2(z)))

    def as_tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)  # B H W D -> B (H W) D

    def attend_map(self, x: Tensor, fitted: bool) -> tuple[Tensor, Tensor]:
        """Window attention of a map (B, H, W, D) of any size, and its keys (B, H, W, K), the mean over heads.

        Args:
            x: Normalised.
            fitted: In windows that fit it, rather than in timm's.
        """
        H, W = _sides(x)
        window, shift = self.windows_of((H, W)) if fitted else (self.window_size, self.shift_size)
        (h, w), (down, right) = window, shift
        if any(shift):
            x = x.roll((-down, -right), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
        H_, W_ = _sides(x)
        mask = None
        if any(shift) and fitted:
            mask = shift_mask((H, W), (H_, W_), window, shift, x)
        elif any(shift):
            mask = self.get_attn_mask(x) if getattr(self, "dynamic_mask", False) else self.attn_mask
        maps = _attend(self.attn, window_partition(x, window).flatten(1, 2), window, mask)  # B H W D -> (B w) N D
        maps = (m.reshape(-1, h, w, fixed(m.shape[2])) for m in maps)  # (B w) N D -> (B w) h w D
        y, keys = (window_reverse(m, window, H_, W_)[:, :H, :W] for m in maps)
        if any(shift):
            y, keys = (m.roll((down, right), dims=(1, 2)) for m in (y, keys))
        return y, keys

    def windows_of(self, grid: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Windows that fit a merged map, and their shift: none along a side that is one window, as timm's."""
        if self.always_partition:
            return self.window_size, self.shift_size
        window = tuple(fit_window(n, w) for n, w in zip(grid, self.window_size, strict=True))
        shifts = any(self.target_shift_size)
        return window, tuple(w // 2 if shifts and w < n else 0 for n, w in zip(grid, window, strict=True))


class ReducedSwinStage(ReducedStage, SwinTransformerStage):
    """timm's stage."""

    def merged(self, x: Tensor, observe: bool) -> Tensor:
        x = self.downsample(x)
        tokens = map_tokens(x.flatten(1, 2), _sides(x))  # B H W D -> B (H W) D
        for block in self.blocks:
            x, tokens = run_block(block, x, tokens, self.grad_checkpointing, observe)
        return put_back_map(x.flatten(1, 2), tokens)  # B H' W' D -> B (H' W') D


class ReducedSwin(MapModel, SwinTransformer):
    """timm's Swin Transformer.

    With ``strict_img_size=False`` images of any size are taken: one that is not a multiple of the patches is padded,
    merging or not, where plain timm raises.
    """

    windows = True
    channels_last = True

    @classmethod
    def check(cls, model: nn.Module) -> None:
        for i, stage in enumerate(model.layers):
            for j, block in enumerate(stage.blocks):
                for name, got, expected in (
                    ("", block, SwinTransformerBlock),
                    (".attn", getattr(block, "attn", None), WindowAttention),
                ):
                    if type(got) is not expected:
                        raise ValueError(
                            f"layers.{i}.blocks.{j}{name}: got {type(got).__name__}, expected timm's "
                            f"{expected.__name__}, whose windows can be fitted to merged maps. Use another model."
                        )

    @classmethod
    def feature_settings(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        stages = tuple(range(len(arguments.get("depths", (2, 2, 6, 2)))))
        if "feature_cls" in arguments:  # timm's "getter" gives NCHW, what timm takes by itself NHWC
            return {"out_indices": stages}
        return {"out_indices": stages, "output_fmt": "NHWC"}

    def depths(self) -> list[int]:
        return [len(stage.blocks) for stage in self.layers]

    def default_ratios(self) -> tuple[float, ...]:
        """In the first block of every stage but the last, to sides that windows fit without padding.

        In windows of 7 to 6/7 of the sides and windows of 6, in windows of 12 to 10/12 and windows of 10.
        """
        ratios: list[float] = []
        for i, stage in enumerate(self.layers):
            window = max(stage.blocks[0].window_size)
            ratio = math.floor(100 * (6 * window // 7 / window) ** 2) / 100 if window > 1 else 1.0
            merges = i + 1 < len(self.layers) or i == 0
            ratios += [ratio if merges and j == 0 else 1.0 for j in range(len(stage.blocks))]
        return tuple(ratios)

    def adopt(self) -> None:
        for stage in self.layers:
            stage.__class__ = ReducedSwinStage
            for block in stage.blocks:
                block.__class__ = ReducedSwinBlock
        if not self.patch_embed.strict_img_size:
            self.patch_embed.dynamic_img_pad = True

    def plan(self, put: Callable[..., Any]) -> None:
        grid = tuple(self.patch_embed.dynamic_feat_size(self.patch_embed.img_size))
        for stage in self.layers:
            grid = grid if isinstance(stage.downsample, nn.Identity) else tuple(-(-n // 2) for n in grid)
            left = grid
            for j, block in enumerate(stage.blocks):
                left = put(block, block.dim, left, j == 0)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        stages = len(self.layers)
        taken = super().prune_intermediate_layers(*args, **kwargs)
        if len(self.layers) < stages:
            self.norm = nn.Identity()  # made for the last stage; timm leaves it before 1.0.31
        return taken
