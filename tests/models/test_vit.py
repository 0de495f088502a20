"""Vision Transformer and DeiT, merging."""

from __future__ import annotations

from typing import ClassVar

from .contract import ModelContract


class TestViT(ModelContract):
    name = "test_vit"
    shallow: ClassVar = {"depth": 2}
    dropout: ClassVar = {**ModelContract.dropout, "pos_drop_rate": 0.1}
    pools: ClassVar = ("", "avg", "avgmax", "max", "token", "map")
    kinds: ClassVar = {
        "plain": {},
        "layer_scale": {"init_values": 0.1},
        "registers": {"reg_tokens": 4},
        "qk_norm": {"qk_norm": True},
        "no_class_token": {"class_token": False, "global_pool": "avg"},
        "map": {"name": "test_vit3", "compression_ratio": [0.75, 0.75] + [1.0] * 6 + [0.75]},
        "diff_attention": {"attn_layer": "diff"},
        "pre_norm_no_bias": {"pre_norm": True, "qkv_bias": False, "no_embed_class": True},
    }
