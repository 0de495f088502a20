"""Vision Transformer with Learnable Token Merging (LTM).

'Efficient Visual Transformer by Learnable Token Merging', Wang & Yang, TPAMI 2025, on timm's Vision Transformer.
"""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import Attention, PatchDropout, maybe_add_mask
from timm.layers.patch_dropout import patch_dropout_forward
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.jit import Final

from timm_ltm.merging import MergeConfig, MergeState, TokenMerger, initial_state, slots_of, unmerge
from timm_ltm.models._common import (
    LTMModel,
    fit_classes,
    mean_keys,
    plain_forward,
    resized,
    run_block,
    split_ltm_kwargs,
)

__all__ = ["LTMAttention", "LTMBlock", "LTMVisionTransformer", "LTMVisionTransformerDistilled"]


torch.fx.wrap("initial_state")  # makes tensors from shapes


@torch.fx.wrap  # FX's placeholders are not masks
def _no_attention_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError(
            "attn_mask or is_causal: got one with merging on, expected neither: a mask over N tokens does not fit "
            "merged ones. Call model.set_merging(False) first."
        )


@torch.fx.wrap  # counts patches
def _drop_patches(
    x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool, training: bool
) -> tuple[Tensor, Tensor | None]:
    return patch_dropout_forward(x, prob, num_prefix_tokens, ordered, training)


class LTMAttention(Attention):
    """timm's attention, that can return its keys: a forward of its own, because no hook of timm's gives them."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, return_keys: bool = False
    ) -> Any:
        """timm's forward; with ``return_keys`` also the mean over heads of the keys (B, N, K), without gradient."""
        if return_keys:
            return self.with_keys(x, attn_mask)
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

    def with_keys(self, x: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output (B, N, D) and the mean over heads of the keys (B, N, K), without gradient."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # 3 B heads N K
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, self.attn_drop.p if self.training else 0.0)
        else:
            y = self.attn_drop(maybe_add_mask(q * self.scale @ k.transpose(-2, -1), attn_mask).softmax(dim=-1)) @ v
        y = self.norm(y.transpose(1, 2).reshape(B, N, self.attn_dim))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y)), k.detach().mean(dim=1)


class LTMBlock(Block):
    """timm's block, with tokens merged between attention and MLP where it has a ``merger``.

    Attributes:
        weighs: Attention is proportional to the sizes of tokens, which blocks before have merged.
        parts: As the merger's.
    """

    weighs: Final[bool]
    plain_forward = plain_forward(Block)

    def __init__(self, *args: Any, attn_layer: Any = Attention, **kwargs: Any) -> None:
        attn_layer = LTMAttention if attn_layer in (Attention, "", "attn") else attn_layer
        super().__init__(*args, attn_layer=attn_layer, **kwargs)
        self.merger: TokenMerger | None = None
        self.num_prefix_tokens, self.parts, self.weighs = 0, 1, False

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        state: MergeState | None = None,
        observe: bool = False,
    ) -> Any:
        """timm's forward without ``state``; with it, returns the merged tokens and their state.

        Args:
            x: (B, prefix + N, D).
            state: Of these tokens.
            observe: Merge nothing, only show the features to the clusters' refresh.
        """
        if state is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.merged(x, state, observe)

    def merged(self, x: Tensor, state: MergeState, observe: bool = False) -> tuple[Tensor, MergeState]:
        """:meth:`forward` with a state."""
        merger = self.merger
        mask: Tensor | None = None
        if self.weighs and not observe:
            mask = self._log_sizes(x, state)
        if merger is None:
            return self.plain_forward(x, mask, False), state
        h = self.norm1(x)
        keys: Tensor | None = None
        if torch.jit.is_scripting():
            attended, keys = self.attn.with_keys(h, mask)
        elif not merger.needs_keys:
            attended = self.attn(h, attn_mask=mask)
        elif isinstance(self.attn, LTMAttention):
            attended, keys = self.attn(h, attn_mask=mask, return_keys=True)
        else:
            attended, keys = self.attn(h, attn_mask=mask), self._mean_keys(h)
        z = x + self.drop_path1(self.ls1(attended))
        z, state = merger(z, state, self.num_prefix_tokens, keys, x, observe)
        return z + self.drop_path2(self.ls2(self.mlp(self.norm2(z)))), state

    def _log_sizes(self, x: Tensor, state: MergeState) -> Tensor:
        """(B, 1, 1, prefix + N): a token of size s attracts attention like s equal ones (Bolya et al., ICLR 2023).

        Without gradient: fused kernels have none for a mask, and a size may come near zero.
        """
        mask = F.pad(state.size.detach().clamp_min(1e-6).log(), (self.num_prefix_tokens, 0)).to(x.dtype)
        return mask.repeat_interleave(self.parts, dim=0).unsqueeze(1).unsqueeze(1)

    def _mean_keys(self, h: Tensor) -> Tensor:
        """For attention of another kind: keys averaged over heads (B, N, K) by one product with the mean weights."""
        if not hasattr(self.attn, "qkv"):
            raise ValueError(
                f"attn_layer: got {type(self.attn).__name__}, expected one with a fused qkv projection, whose keys "
                "anchors are compared by. Use timm's Attention, or a first mask that needs no keys."
            )
        return mean_keys(h, self.attn.qkv, (3, self.attn.qkv.out_features // (3 * self.attn.head_dim)))


class ScriptedAttention(LTMAttention):
    """As TorchScript reads it: its methods have one return type, and no super()."""

    forward = Attention.forward


class ScriptedBlock(LTMBlock):
    """As TorchScript reads it: its methods have one return type, and no super()."""

    forward = Block.forward


class LTMVisionTransformer(LTMModel, VisionTransformer):
    """timm's Vision Transformer with Learnable Token Merging.

    Args:
        *args: As timm's.
        **kwargs: As timm's, and every field of :class:`timm_ltm.merging.MergeConfig`; ``preset="paper"`` is the paper's
            own form.

    Raises:
        ValueError: A setting is out of range, or timm's ``block_fn`` is not the one LTM merges in.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ltm_kwargs, kwargs = split_ltm_kwargs(kwargs)
        config = MergeConfig.from_kwargs(**ltm_kwargs)
        block_fn = kwargs.pop("block_fn", LTMBlock)
        if block_fn is Block:
            block_fn = LTMBlock
        if not issubclass(block_fn, LTMBlock):
            raise ValueError(
                f"block_fn: got {block_fn.__name__}, expected timm's Block or a subclass of LTMBlock. LTM merges "
                "between attention and MLP; leave block_fn out, or subclass LTMBlock."
            )
        super().__init__(*args, block_fn=block_fn, **kwargs)
        self._finish_ltm(config, ltm_kwargs, kwargs)

    def _add_mergers(self, dd: dict[str, Any]) -> None:
        tokens, first = self.patch_embed.num_patches, True
        self.block_ratios = self.merge_config.ratios_for([len(self.blocks)])
        for block, ratio in zip(self.blocks, self.block_ratios, strict=True):
            block.num_prefix_tokens = self.num_prefix_tokens
            block.weighs = self.merge_config.proportional_attention and not first
            if ratio < 1:
                block.merger = TokenMerger(
                    self.embed_dim, tokens, ratio, self.merge_config, self.num_classes, first=first, **dd
                )
                first = False
            tokens = slots_of(tokens, ratio)

    def _input_grid(self, x: Tensor) -> tuple[int, int]:
        return self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))

    def _embed(self, x: Tensor) -> tuple[Tensor, MergeState, tuple[int, int]]:
        """timm's steps in front of the blocks, the tokens' state, and the grid (H, W) of patches."""
        grid = self._input_grid(x)
        x, kept = self._pos_embed(self.patch_embed(x)), None
        if isinstance(self.patch_drop, PatchDropout):  # its function tells which patches are left
            drop = self.patch_drop
            x, kept = _drop_patches(x, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)
        state = initial_state(x, self.num_prefix_tokens, grid, self.merge_config.cluster_grid, kept)
        return self.norm_pre(x), state, grid

    def _observes(self, attn_mask: Tensor | None, is_causal: bool) -> bool:
        return not self.merging and self.collecting and self.training and attn_mask is None and not is_causal

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's, with tokens merged: (B, prefix + P, D). Merging off, it is timm's."""
        observe = self._observes(attn_mask, is_causal)
        if not self.merging and not observe:
            x = super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
            return self._keep_parameters_in_graph(x)
        _no_attention_mask(attn_mask, is_causal)
        x, state, _ = self._embed(x)
        for block in self.blocks:
            x, state = run_block(block, x, state, self.grad_checkpointing, observe)
        x = self.norm(x)
        return self._keep_parameters_in_graph(x) if observe else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's, on the input's patch grid: merged tokens are put back where they came from.

        The final features are merged ones, as those of :meth:`forward_features`.
        """
        observe = self._observes(attn_mask, is_causal)
        if not self.merging:
            x = self._keep_parameters_in_graph(x)
        if not self.merging and not observe:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict,
                attn_mask, is_causal,
            )  # fmt: skip
        _no_attention_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NLC'. Use one of these.")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x, state, grid = self._embed(x)
        back = None
        maps, prefixes = [], []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x, state = run_block(block, x, state, self.grad_checkpointing, observe, keep_mask=True)
            if block.merger is not None and state.mask is not None:
                to = state.mask.destinations()
                back = to if back is None else back @ to  # B (H W) P
            if i in take_indices:
                y = self.norm(x) if norm else x
                prefixes.append(y[:, : self.num_prefix_tokens])
                y = y[:, self.num_prefix_tokens :]
                y = y if back is None else unmerge(y, back)
                maps.append(y if output_fmt == "NLC" else y.transpose(1, 2).unflatten(2, grid).contiguous())
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and self.num_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens and self.num_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (self.norm(x), maps)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        now = self.patch_embed.img_size, self.patch_embed.patch_size
        self._check_not_tied(now, resized(now, img_size, patch_size))
        super().set_input_size(img_size=img_size, patch_size=patch_size)


class LTMVisionTransformerDistilled(LTMVisionTransformer, VisionTransformerDistilled):
    """timm's distilled Vision Transformer (DeiT) with Learnable Token Merging: two prefix tokens, two heads."""


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


# The weights are the plain model's; the merging starts from them without training.
default_cfgs = generate_default_cfgs(
    {
        "ltm_vit_tiny_patch16_224.augreg_in21k_ft_in1k": _cfg(
            hf_hub_id="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
        ),
        "ltm_vit_small_patch16_224.augreg_in21k_ft_in1k": _cfg(
            hf_hub_id="timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
        ),
        "ltm_vit_base_patch16_224.augreg2_in21k_ft_in1k": _cfg(
            hf_hub_id="timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
        ),
        "ltm_vit_base_patch16_224.augreg_in21k_ft_in1k": _cfg(
            hf_hub_id="timm/vit_base_patch16_224.augreg_in21k_ft_in1k"
        ),
        "ltm_vit_test.r160_in1k": _cfg(hf_hub_id="timm/test_vit.r160_in1k", input_size=(3, 160, 160), crop_pct=0.95),
    }
)


def _filter(state_dict: dict[str, Any], model: LTMVisionTransformer) -> dict[str, Any]:
    return fit_classes(checkpoint_filter_fn(state_dict, model), model)


def _create_ltm_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> LTMVisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        LTMVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def ltm_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LTMVisionTransformer:
    """LTM on ViT-Tiny (Vit-Ti/16). Every third block merges by default."""
    ltm_defaults = dict(compression_ratio=(0.905, 1.0, 1.0) * 4, cluster_dim=16)
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, ltm_defaults=ltm_defaults)
    return _create_ltm_vit("ltm_vit_tiny_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LTMVisionTransformer:
    """LTM on ViT-Small (ViT-S/16), at the budget of the paper's Table 1: 3.7 GFLOPs, 23.0 M parameters.

    Every third block merges by default: at equal GMACs that is faster than merging a little in each.
    """
    ltm_defaults = dict(compression_ratio=(0.905, 1.0, 1.0) * 4)
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, ltm_defaults=ltm_defaults)
    return _create_ltm_vit("ltm_vit_small_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LTMVisionTransformer:
    """LTM on ViT-Base (ViT-B/16), at the larger budget of the paper's Table 2: 12.85 GFLOPs, 90.4 M parameters.

    Every third block merges by default. ``compression_ratio=(0.7, 1.0, 1.0) * 4`` is the smaller budget: 8.30 GFLOPs,
    90.0 M parameters.
    """
    ltm_defaults = dict(compression_ratio=(0.87, 1.0, 1.0) * 4)
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, ltm_defaults=ltm_defaults)
    return _create_ltm_vit("ltm_vit_base_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def ltm_vit_test(pretrained: bool = False, **kwargs: Any) -> LTMVisionTransformer:
    """LTM on timm's ``test_vit``: tiny, for tests."""
    ltm_defaults = dict(cluster_dim=16)
    model_args = dict(
        patch_size=16, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3, dynamic_img_size=True, ltm_defaults=ltm_defaults
    )
    return _create_ltm_vit("ltm_vit_test", pretrained=pretrained, **dict(model_args, **kwargs))
