"""EVA, DINOv3, RoPE-ViT: rotary positions are looked up where the anchors lie."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.eva import Eva
from torch.testing import assert_close

import timm_ltm

from .contract import ModelContract

TINY = {"img_size": 64, "num_classes": 10, "embed_dim": 48, "depth": 3, "num_heads": 2}
ROPE = {"use_rot_pos_emb": True, "dynamic_img_size": False}
KINDS = {
    "plain": {},  # cat: EVA-02
    "mixed": {"rope_type": "mixed", "use_abs_pos_emb": False},
    "dinov3": {
        "rope_type": "dinov3",
        "use_abs_pos_emb": False,
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
        "init_values": 0.1,
        "qkv_bias": False,
        "attn_type": "rope",
        "rope_rescale_coords": 2,
    },
    "grouped_queries": {"attn_type": "rope", "qkv_fused": False, "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
    "swiglu": {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "scale_attn_inner": True},
    "no_class_token": {"class_token": False, "use_pre_transformer_norm": True},
    "no_rope": {"use_rot_pos_emb": False},  # EVA
}
KINDS["attn_only_scale"] = {**KINDS["grouped_queries"], "init_values": 0.1, "attn_only_layer_scale": True}
KINDS["dynamic"] = {"dynamic_img_size": True}
_known = inspect.signature(Eva.__init__).parameters  # older versions of timm lack some
KINDS = {kind: {name: value for name, value in args.items() if name in _known} for kind, args in KINDS.items()}


class TestEva(ModelContract):
    name = "eva02_tiny_patch14_224"
    others: ClassVar = ("tofu",)
    any_size: ClassVar = {"dynamic_img_size": True}
    kwargs: ClassVar = {**TINY, **ROPE, "patch_size": 16}
    kinds: ClassVar = KINDS
    pools: ClassVar = ("", "avg", "avgmax", "max", "token", "map")
    shallow: ClassVar = {"depth": 2}
    dropout: ClassVar = {**ModelContract.dropout, "pos_drop_rate": 0.1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_rotary_positions_are_those_of_the_anchors(kind, fused):
    """Blocks behind merges, against attention query by query, each token with its own rotation, counted by size."""
    torch.manual_seed(0)
    plain = Eva(**{**TINY, **ROPE, **KINDS[kind]}).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.2 * torch.randn_like(p))
    for block in plain.blocks:
        block.attn.fused_attn = fused
    model = timm_ltm.convert(plain, "tome", r=[5, 4, 0])
    x = torch.randn(2, 3, 64, 64)
    expected = oracle(plain, x, model.forward_masks(x))
    merged, tokens = model.forward_merged(x)
    assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert tokens.size.shape == (2, 7)


def oracle(plain, images, masks):
    """Known masks: image by image and head by head, keys and values repeated as often as the token's size says."""
    prefix = plain.num_prefix_tokens
    embedded, rope = plain._pos_embed(plain.patch_embed(images))
    embedded, rows = plain.norm_pre(embedded), []
    for b, x in enumerate(embedded):
        anchors, size, merges = torch.arange(16), torch.ones(16), iter(zip(masks.masks, masks.accumulated, strict=True))
        for i, block in enumerate(plain.blocks):
            at = rope[i] if plain.rope_mixed and rope is not None else rope
            at = at[..., anchors, :] if at is not None else None
            y = attention(block.attn, block.norm1(x), at, torch.cat((torch.ones(prefix), size)), prefix)
            x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
            if i < 2:
                mask, whole = (m[b] for m in next(merges))
                x = torch.cat((x[:prefix], mask.t() @ x[prefix:]))
                size = (whole > 0).sum(dim=0).float()
                anchors = anchors[anchored(mask)]
            y = block.mlp(block.norm2(x.unsqueeze(0)))[0]
            x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
        rows.append(plain.norm(x))
    return torch.stack(rows)


def anchored(mask):
    """The anchor of each slot: of ToMe, tokens that stay are in order, and those that go are even ones."""
    goes = mask.shape[0] - mask.shape[1]
    for gone in torch.combinations(torch.arange(0, mask.shape[0], 2), goes):
        stays = [i for i in range(mask.shape[0]) if i not in gone.tolist()]
        if all(mask[i, slot] > 0 for slot, i in enumerate(stays)):
            return torch.tensor(stays)
    raise AssertionError("a mask of ToMe")


def rotate(t, rope, half):
    """Pairs of channels as complex numbers times cos + i sin, timm's rope (N, 2 K): sin, then cos."""
    sin, cos = rope.chunk(2, dim=-1)
    if half:
        K = t.shape[-1] // 2
        turned = torch.cat((-t[:, K:], t[:, :K]), dim=1)
    else:
        turned = torch.stack((-t[:, 1::2], t[:, ::2]), dim=2).flatten(1)
    return t * cos + turned * sin


def attention(attn, x, rope, size, prefix):
    """timm's attention module on one image x (N, D), one query at a time."""
    repeats, half = size.long(), getattr(attn, "rotate_half", False)
    if attn.qkv is not None:
        bias = 0 if getattr(attn, "q_bias", None) is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = (attn.qkv(x) + bias).chunk(3, dim=1)
    else:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    heads, out = attn.num_heads, []
    K = q.shape[1] // heads
    for h in range(heads):
        g = h * (k.shape[1] // K) // heads
        a, b, c = q[:, h * K : (h + 1) * K], k[:, g * K : (g + 1) * K], v[:, g * K : (g + 1) * K]
        a, b = attn.q_norm(a), attn.k_norm(b)
        if rope is not None:
            at = rope[h] if rope.ndim == 3 else rope
            a, b = (torch.cat((t[:prefix], rotate(t[prefix:], at, half))) for t in (a, b))
        b, c = b.repeat_interleave(repeats, dim=0), c.repeat_interleave(repeats, dim=0)
        out.append(torch.stack([(b @ query * K**-0.5).softmax(dim=0) @ c for query in a]))
    y = attn.norm(torch.cat(out, dim=1))
    return attn.proj(y if attn.gate is None else y * attn.gate(x).sigmoid())


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match=r"patch_drop_rate: got 0.5, expected 0"):
        timm.create_model("ltm_eva02_tiny_patch14_224", **TINY, patch_drop_rate=0.5)


def test_post_norm_is_refused():
    with pytest.raises(ValueError, match=r"blocks.0: got EvaBlockPostNorm"):
        timm_ltm.convert(Eva(**TINY, use_post_norm=True))


def test_bias_of_keys():
    """timm keeps one of zeros that it does not train: what stands there is added to keys as timm adds it."""
    torch.manual_seed(0)
    plain = Eva(**TINY, **ROPE).eval()
    with torch.no_grad():
        for block in plain.blocks:
            for bias in (block.attn.q_bias, block.attn.k_bias, block.attn.v_bias):
                bias.add_(torch.randn_like(bias))
    with pytest.warns(UserWarning, match="merges nothing"):
        model = timm_ltm.convert(plain, "tome", compression_ratio=0.99)
    x = torch.randn(2, 3, 64, 64)
    assert model.merging
    assert_close(model(x), plain(x))


def test_attention_of_another_class_gets_its_positions():
    class OtherAttention(AttentionRope):
        pass

    torch.manual_seed(0)
    plain = Eva(**TINY, **ROPE, attn_type="rope").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = timm_ltm.convert(plain, "tome", r=4)(x)
    for block in plain.blocks:
        block.attn.__class__ = OtherAttention
    assert_close(timm_ltm.convert(plain, "tome", r=4)(x), expected)
    for block in plain.blocks:
        block.attn.qkv = None
    with pytest.raises(ValueError, match=r"blocks.0.attn: got OtherAttention, expected one whose keys"):
        timm_ltm.convert(plain, "tome")


def test_rotary_models_say_so():
    rotary, other = (timm.create_model(f"ltm_{name}", device="meta") for name in ("eva02_tiny_patch14_224", "test_vit"))
    assert all(reducer.site.rotary for _, reducer in rotary.reducers())
    assert not any(reducer.site.rotary for _, reducer in other.reducers())
